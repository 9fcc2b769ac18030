"""Data whose velocity is known exactly: Gaussians and mixtures of Gaussians, in any number of dims.

With x_t = (1 - t) x0 + t eps and x0 ~ sum_k w_k N(mu_k, s_k^2 I):

    p_t(x)    = sum_k w_k N(x; m_k, S_k I),      m_k = (1 - t) mu_k,   S_k = (1 - t)^2 s_k^2 + t^2
    E[x0 | x] = sum_k r_k(x) (mu_k + (1 - t) s_k^2 / S_k (x - m_k)),      r_k = P(component k | x)
    E[eps| x] = sum_k r_k(x) t / S_k (x - m_k),                           v = E[eps - x0 | x]

All in fp64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.samplers import ODE, Transition, t_max_of


@dataclass(frozen=True, eq=False)
class Mixture:
    """weights: (K,), adding up to 1; means: (K, D); stds: (K,), 0 for a point."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def marginal(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Means m_k and variances S_k of the components: (K, D) and (K,) at one time, (B, K, D) and (B, K) at (B,)."""
        t = torch.as_tensor(t, dtype=torch.float64)[..., None]
        return (1 - t)[..., None] * self.means, (1 - t) ** 2 * self.stds**2 + t**2

    def mean(self, t: float = 0.0) -> Tensor:
        """E[x_t], (D,)."""
        return self.weights @ self.marginal(t)[0]

    def cov(self, t: float = 0.0) -> Tensor:
        """Cov[x_t], (D, D): within the components plus between them."""
        m, S = self.marginal(t)
        d = m - self.mean(t)
        return (self.weights @ S) * torch.eye(m.shape[1], dtype=m.dtype) + d.T @ (self.weights[:, None] * d)

    def log_joint(self, x: Tensor, t: float | Tensor) -> Tensor:
        """log(w_k p_t(x | k)), (B, K). x: (B, D)."""
        m, S = self.marginal(t)
        square = ((x.double()[:, None] - m) ** 2).sum(-1)
        return self.weights.log() - square / (2 * S) - x.shape[1] / 2 * (2 * torch.pi * S).log()

    def log_prob(self, x: Tensor, t: float = 0.0) -> Tensor:
        """log p_t(x), (B,): the sum over dims."""
        return self.log_joint(x, t).logsumexp(1)

    def responsibilities(self, x: Tensor, t: float | Tensor = 0.0) -> Tensor:
        """r_k(x), (B, K). Their mean over samples estimates the weights of the modes."""
        return self.log_joint(x, t).softmax(1)

    def velocity(self, x: Tensor, t: float | Tensor) -> Tensor:
        """v(x, t) = E[eps - x0 | x_t = x], (B, D). t: one time or (B,)."""
        m, S = self.marginal(t)
        d = x.double()[:, None] - m
        t = torch.as_tensor(t, dtype=torch.float64)[..., None]
        x0 = self.means + ((1 - t) * self.stds**2 / S)[..., None] * d
        eps = (t / S)[..., None] * d
        return (self.responsibilities(x, t[..., 0])[..., None] * (eps - x0)).sum(1)

    def sample(self, n: int, seed: int) -> Tensor:
        """Draws of x0, (n, D)."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[k] + self.stds[k, None] * z


def gaussian(mean: float | list[float], std: float) -> Mixture:
    """N(mean, std^2 I). A number is one dim, a list one number per dim."""
    return mixture([1.0], [mean], [std])


def mixture(weights: list[float], means: list, stds: list[float]) -> Mixture:
    """Sum of w_k N(mean_k, std_k^2 I)."""
    mu = torch.tensor(means, dtype=torch.float64).reshape(len(weights), -1)
    return Mixture(torch.tensor(weights, dtype=torch.float64), mu, torch.tensor(stds, dtype=torch.float64))


def simulate(
    transition: Transition,
    velocity: Callable[[Tensor, float], Tensor],
    grid: Tensor,
    n: int,
    seed: int,
    dims: int = 1,
    last_step: Transition | None = None,
) -> Tensor:
    """x at the end of the grid, (n, dims) fp32, from standard normal noise. The last step is the ODE unless given."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dims, generator=generator)
    t_max = t_max_of(grid)
    for i in range(len(grid) - 1):
        t, t_next = float(grid[i]), float(grid[i + 1])
        step = (last_step or ODE()) if i == len(grid) - 2 else transition
        x = step.transition(x, velocity(x, t), t, t_next, t_max).sample(torch.randn(n, dims, generator=generator))
    return x


def propagate(transition: Transition, data: Mixture, grid: Tensor, last_step: Transition | None = None) -> tuple[float, float]:
    """Mean and variance at the end of the grid for Gaussian data in one dim, without sampling.

    Every step is x' = a + b x + s z (`affine_steps`), which gives mean' = a + b mean and var' = b^2 var + s^2. The start is
    the exact marginal at grid[0]; the last step is the ODE unless given.
    """
    m, S = data.marginal(float(grid[0]))
    mean, var = float(m[0, 0]), float(S[0])
    for a, b, s in affine_steps(transition, data, grid, last_step):
        mean, var = a + b * mean, b**2 * var + s**2
    return mean, var


def memory(transition: Transition, data: Mixture, grid: Tensor) -> float:
    """d E[x at the end | x at the start] / dx for Gaussian data in one dim: what the samples keep of where they started."""
    return math.prod(b for _, b, _ in affine_steps(transition, data, grid))


def affine_steps(
    transition: Transition, data: Mixture, grid: Tensor, last_step: Transition | None = None
) -> list[tuple[float, float, float]]:
    """(a, b, s) of each step x' = a + b x + s z: the velocity of Gaussian data is affine in x, hence so is every mean.

    a and b are read off the transition at x = 0 and x = 1, in one batch with one time per sample.
    """
    zero, one = torch.zeros(len(grid) - 1, 1), torch.ones(len(grid) - 1, 1)
    steps = []
    for step in (transition, last_step or ODE()):
        times = grid[:-1], grid[1:], t_max_of(grid)
        at_zero = step.transition(zero, data.velocity(zero, grid[:-1]), *times)
        at_one = step.transition(one, data.velocity(one, grid[:-1]), *times)
        a = at_zero.mean[:, 0]
        steps.append(torch.stack([a, at_one.mean[:, 0] - a, step.std(*times)], 1).tolist())
    return [*steps[0][:-1], steps[1][-1]]


#: Of which samplers and steering methods have been measured: mean -0.3, std 1.5408. Tilted by exp(x): mean 1.449, std 0.858,
#: log of the normaliser 0.739.
TWO_MODES = mixture([0.6, 0.4], [-1.5, 1.5], [0.5, 0.4])
