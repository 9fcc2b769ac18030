"""A step of a sampler is a Gaussian: x' = mean(x, v, t, t_next) + std(t, t_next) z.

Every transition here is an Euler step that swaps some of the predicted noise for fresh noise,

    x' = x - h v - removed * eps_hat + std * z        eps_hat = x + (1 - t) v,   h = t - t_next > 0,   z ~ N(0, I)
       = (1 - t_next) x0_hat + (t_next - removed) eps_hat + std * z

so a transition is its pair (removed, std):

    ODE        0                            0
    FlowSDE    g^2 h / (2 t)                g sqrt(h)                   g = noise_level sqrt(t / (1 - t))
    DanceSDE   g^2 h / (2 t)                g sqrt(h)                   g = noise_level
    CPS        t_next (1 - cos u)           t_next sin u                u = noise_level pi / 2
    DDIM       t_next - sqrt(t_next^2 - std^2)   eta t_next sqrt(1 - rho^2)   rho = (1 - t) t_next / ((1 - t_next) t)

If x0 were known, x' would have to hold noise of variance t_next^2. CPS and DDIM hold exactly that,
(t_next - removed)^2 + std^2 = t_next^2; the SDEs hold h^2 (g^2 / t + g^4 / (4 t^2)) more, which is the grain in
pictures drawn with few steps. A network knows the mean of x0 only, and then the question is what is left of the error
as steps become many: each class says.

The last step (t_next = 0) is the loop's to make deterministic: the SDEs would leave noise in the picture.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.samplers.flow import Time, eps_from, expand


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, std^2 I). mean: (B, ...) fp32; std: a number or a tensor that broadcasts, such as () or (B, 1, ..., 1).

    Log-densities and divergences are the MEAN over the non-batch dims, not the sum: a ratio of two densities is the
    D-th root of the true one, which keeps it finite for pictures and makes useful clip ranges small (1e-6 to 1e-3).
    """

    mean: Tensor
    std: Tensor | float

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std z. noise: (B, ...), standard normal. With std = 0 it is the mean."""
        return self.mean + expand(self.std, self.mean) * noise.float()

    def log_prob(self, x_next: Tensor) -> Tensor:
        """(B,): mean over dims of -(x' - mean)^2 / (2 std^2) - log(std) - log(2 pi) / 2.

        x_next is a stored state: pass it without a graph, or the gradient through it cancels the one through the mean.
        """
        std = self._positive_std()
        z = (x_next.float() - self.mean) / std
        return _mean_over_dims(-(z**2) / 2 - std.log()) - math.log(2 * math.pi) / 2

    def kl(self, other: "Gaussian") -> Tensor:
        """(B,): KL(self || other) per dim, mean over dims of (mean - other.mean)^2 / (2 std^2), for equal std only."""
        std = self._positive_std()
        if not torch.equal(std.expand_as(self.mean), expand(other.std, self.mean).expand_as(self.mean)):
            raise ValueError("kl compares two means under one std: take both from one transition at the same times.")
        return _mean_over_dims((self.mean - other.mean) ** 2 / (2 * std**2))

    def scaled(self, c: Time) -> "Gaussian":
        """The law of c x': a flow step in the coordinates of a diffusion model, c = flow.vp_scale(t_next)."""
        c = expand(c, self.mean)
        return Gaussian(c * self.mean, c * expand(self.std, self.mean))

    def _positive_std(self) -> Tensor:
        std = expand(self.std, self.mean)
        if bool((std <= 0).any()):
            raise ValueError(
                "A deterministic step (std = 0) has no density: leave it out of the trained steps "
                "(ODE, noise level 0, and the last step of CPS and DDIM are deterministic)."
            )
        return std


class Transition:
    """What the samplers share: the step written from the pair (removed, std). Subclasses give the pair and the paper.

    t, t_next, t_max: float, scalar tensor or (B,). t_max is the largest time of the grid below 1
    (schedules.t_max_of(grid)); it replaces t in 1 - t where that would divide by zero, and nowhere else.
    """

    @property
    def deterministic(self) -> bool:
        """True if no step of this transition draws noise."""
        raise NotImplementedError

    def swap(self, t: Tensor, t_next: Tensor, t_max: Tensor) -> tuple[Tensor, Tensor]:
        """(removed, std): how much of eps_hat is taken out, how much fresh noise is put in. Shaped like the times."""
        raise NotImplementedError

    def transition(self, x: Tensor, v: Tensor, t: Time, t_next: Time, t_max: Time) -> Gaussian:
        """The law of x' given x and v at time t. x, v: (B, ...). The mean carries the graph of v."""
        t, t_next, t_max = _times(expand(t, x), expand(t_next, x), expand(t_max, x))
        removed, std = self.swap(t, t_next, t_max)
        mean = x.float() - (t - t_next) * v.float() - removed * eps_from(x, v, t)
        return Gaussian(mean, std)

    def std(self, t: Time, t_next: Time, t_max: Time) -> Tensor:
        """The std of the step alone, shaped like the times: () or (B,)."""
        return self.swap(*_times(t, t_next, t_max))[1]

    def velocity_jacobian(self, t: Time, t_next: Time, t_max: Time) -> Tensor:
        """J = d mean / d v = -h - removed (1 - t), shaped like the times: () or (B,).

        A change dv of the velocity moves the mean by J dv, so the KL between two policies is J^2 mean(dv^2) / (2 std^2),
        and the gradient of log_prob in v at x' = mean + std z is J z / (std D) in D dims.
        """
        t, t_next, t_max = _times(t, t_next, t_max)
        removed, _ = self.swap(t, t_next, t_max)
        return -(t - t_next) - removed * (1 - t)


@dataclass(frozen=True)
class ODE(Transition):
    """Euler step of the probability-flow ODE: x' = x - h v.

    Marginals: in the limit of small steps, error O(h).
    """

    @property
    def deterministic(self) -> bool:
        return True

    def swap(self, t: Tensor, t_next: Tensor, t_max: Tensor) -> tuple[Tensor, Tensor]:
        removed = torch.zeros_like(t - t_next)
        return removed, torch.zeros_like(removed)


@dataclass(frozen=True)
class FlowSDE(Transition):
    """Flow-GRPO, arXiv 2505.05470: Euler step of the reverse SDE with g = a sqrt(t / (1 - t)), a = noise_level.

        x' = x - h [ v + g^2 / (2 t) (x + (1 - t) v) ] + g sqrt(h) z
           = x (1 - a^2 h / (2 (1 - t))) - (1 + a^2 / 2) h v + a sqrt(t h / (1 - t)) z            (t <= t_max)

    Marginals: in the limit of small steps only. The error is O(h^min(1, a^2)): on a grid that starts at t = 1 the first
    steps have g^2 h = a^2, a^2, a^2 / 2, a^2 / 3, ... whatever h is, and a small noise level forgets them slowly.
    """

    noise_level: float = 0.7  #: a. Paper: 0.7 (SD3.5); in use: 0.9 FLUX, 1.2 Qwen-Image. 0 is the ODE.

    def __post_init__(self) -> None:
        if not self.noise_level >= 0:
            raise ValueError(f"FlowSDE noise_level={self.noise_level} must not be negative: try 0.7, or 0 for the ODE.")

    @property
    def deterministic(self) -> bool:
        return self.noise_level == 0

    def swap(self, t: Tensor, t_next: Tensor, t_max: Tensor) -> tuple[Tensor, Tensor]:
        g = self.noise_level * (t / (1 - torch.minimum(t, t_max))).sqrt()
        return _sde_swap(g, t, t_next)


@dataclass(frozen=True)
class DanceSDE(Transition):
    """DanceGRPO, arXiv 2505.07818: Euler step of the reverse SDE with constant g = noise_level.

        x' = x - h v + g^2 h / 2 score + g sqrt(h) z,      score = -(x + (1 - t) v) / t

    Marginals: in the limit of small steps, error O(h).
    """

    noise_level: float = 0.3  #: g (the paper's eta). In use: 0.3 on FLUX, SD, Qwen, Wan; 0.25 on Hunyuan. 0 is the ODE.

    def __post_init__(self) -> None:
        if not self.noise_level >= 0:
            raise ValueError(f"DanceSDE noise_level={self.noise_level} must not be negative: try 0.3, or 0 for the ODE.")

    @property
    def deterministic(self) -> bool:
        return self.noise_level == 0

    def swap(self, t: Tensor, t_next: Tensor, t_max: Tensor) -> tuple[Tensor, Tensor]:
        g = torch.full_like(t, self.noise_level)
        return _sde_swap(g, t, t_next)


@dataclass(frozen=True)
class CPS(Transition):
    """Flow-CPS, arXiv 2509.05952: coefficients-preserving sampling, u = noise_level pi / 2.

        x' = (1 - t_next) x0_hat + t_next cos(u) eps_hat + t_next sin(u) z

    Marginals: NOT preserved, not even in the limit. The noise budget is exact for a known x0 and for any number of
    steps, so pictures are clean; but each step redraws a fixed share of the noise while x0_hat is a mean, so with more
    steps samples lose spread: N(mu, s^2) comes out with variance s^2 (1 + cos u) / 2 as h -> 0.
    Noise level 1 is the stochastic_sampling option of diffusers' FlowMatchEulerDiscreteScheduler.
    """

    noise_level: float = 0.8  #: Share of a right angle, 0 to 1. In use: 0.7 to 0.9. 0 is the ODE.

    def __post_init__(self) -> None:
        if not 0 <= self.noise_level <= 1:
            raise ValueError(f"CPS noise_level={self.noise_level} must lie in [0, 1], 1 being all noise fresh: try 0.8.")

    @property
    def deterministic(self) -> bool:
        return self.noise_level == 0

    def swap(self, t: Tensor, t_next: Tensor, t_max: Tensor) -> tuple[Tensor, Tensor]:
        u = self.noise_level * math.pi / 2
        share = torch.ones_like(t) * t_next
        return share * (1 - math.cos(u)), share * math.sin(u)


@dataclass(frozen=True)
class DDIM(Transition):
    """DDIM, arXiv 2010.02502, eq. 12 and 16, in flow coordinates; eta = 1 is ancestral (DDPM) sampling and SDE-DPM++ 1.

        x' = (1 - t_next) x0_hat + sqrt(t_next^2 - std^2) eps_hat + std z
        std = eta t_next sqrt(1 - rho^2),      rho = (1 - t) t_next / ((1 - t_next) t)

    Marginals: in the limit of small steps, error O(h), where it is FlowSDE(sqrt(2) eta); the noise budget is exact for
    a known x0 and for any number of steps. 1 - rho^2 is computed as (1 + rho) h / ((1 - t_next) t), which is equal and
    loses no digits when h is small.
    """

    eta: float = 1.0  #: 0 is the ODE, 1 is ancestral sampling (DDPO's choice).

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIM eta={self.eta} must lie in [0, 1]: 0 is deterministic, 1 is ancestral sampling.")

    @property
    def deterministic(self) -> bool:
        return self.eta == 0

    def swap(self, t: Tensor, t_next: Tensor, t_max: Tensor) -> tuple[Tensor, Tensor]:
        rho = (1 - t) * t_next / ((1 - t_next) * t)
        std = self.eta * t_next * ((1 + rho) * (t - t_next) / ((1 - t_next) * t)).sqrt()
        kept = t_next * (1 - self.eta**2 + self.eta**2 * rho**2).sqrt()
        return t_next - kept, std


TRANSITIONS = {"ode": ODE, "flow_sde": FlowSDE, "dance_sde": DanceSDE, "cps": CPS, "ddim": DDIM}


def _sde_swap(g: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
    """Euler-Maruyama on dx = [v - g^2 score / 2] dt + g dw, dt < 0, with score = -eps_hat / t."""
    h = t - t_next
    return g**2 * h / (2 * t), g * h.sqrt()


def _times(t: Time, t_next: Time, t_max: Time) -> tuple[Tensor, Tensor, Tensor]:
    """The times in fp32, checked: timesteps counted to 1000 or swapped arguments would end as NaN, or unnoticed."""
    t, t_next, t_max = (torch.as_tensor(u, dtype=torch.float32) for u in (t, t_next, t_max))
    if not bool(((t_next >= 0) & (t_next < t) & (t <= 1)).all()):
        raise ValueError(f"A step needs 0 <= t_next < t <= 1 (1 is noise, not 1000), got t={t}, t_next={t_next}.")
    if not bool((t_max < 1).all()):
        raise ValueError(f"t_max={t_max} must be below 1: pass the largest time of the grid that is, t_max_of(grid).")
    return t, t_next, t_max


def _mean_over_dims(x: Tensor) -> Tensor:
    """(B,). Row by row: a reduction over the whole batch adds up in an order that depends on its size, and a sample
    replayed in a smaller micro-batch would then have a ratio that is not exactly 1.
    """
    return torch.stack([row.mean() for row in x.reshape(x.shape[0], -1).unbind()])
