"""A step of a sampler is a Gaussian: x' = mean(x, v, t, t_next) + std(t, t_next) z.

Every transition here is an Euler step that swaps some of the predicted noise for fresh noise,

    x' = x - h v - removed * eps_hat + std * z        eps_hat = x + (1 - t) v,   h = t - t_next > 0,   z ~ N(0, I)
       = (1 - t_next) x0_hat + (t_next - removed) eps_hat + std * z

so a transition is its pair (removed, std):

    ODE          0                                0
    FlowSDE      g^2 h / (2 t)                    g sqrt(h)                  g = noise_level sqrt(t / (1 - t))
    DanceSDE     g^2 h / (2 t)                    g sqrt(h)                  g = noise_level
    Memoryless   g^2 h / (2 t)                    g sqrt(h)                  g = sqrt(2 t / (1 - t))
    CPS          t_next (1 - cos u)               t_next sin u               u = noise_level pi / 2
    MatchedCPS   t_next (1 - r)                   t_next sqrt(1 - r^2)       r = rho^(noise_level^2 / 2)
    DDIM         t_next - sqrt(t_next^2 - std^2)  eta t_next sqrt(1 - rho^2)

with rho = (1 - t) t_next / ((1 - t_next) t). If x0 were known, x' would have to hold noise of variance t_next^2. CPS,
MatchedCPS and DDIM hold exactly that, (t_next - removed)^2 + std^2 = t_next^2; the SDEs hold h^2 (g^2 / t + g^4 / (4 t^2))
more, which is the grain in pictures drawn with few steps. A network knows the mean of x0 only, and then the question is
what is left of the error as steps become many: each class says.

`GLASS`, at the end, is not of this form: it draws x0 instead of taking its mean, so it has no density.

The last step (t_next = 0) is the loop's to make deterministic: the SDEs would leave noise in the picture.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowrl.samplers.flow import Time, eps_from, expand, x0_from
from flowrl.samplers.schedules import DECAYS


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
class Noisy(Transition):
    """A transition with a noise level, which may fall with t (`schedules.DECAYS`) from its option to final_level."""

    decay: Literal["none", "cosine"] = field(default="none", kw_only=True)  #: cosine: noise early (HiCoGen); none: constant.
    final_level: float = field(default=0.0, kw_only=True)  #: Where the decay ends at t = 0: between 0 and the noise level.

    option: ClassVar[str] = "noise_level"  # the one that holds the noise level
    limit: ClassVar[float] = math.inf

    def __post_init__(self) -> None:
        who, highest = f"{type(self).__name__} {self.option}={self.highest}", self.highest
        if not 0 <= highest <= self.limit:
            must = "must not be negative" if self.limit == math.inf else f"must lie in [0, {self.limit:g}]"
            raise ValueError(f"{who} {must}: try {getattr(type(self), self.option):g}, or 0 for the ODE.")
        if self.decay not in DECAYS:
            raise ValueError(f"{type(self).__name__} decay={self.decay!r} is unknown: use {' or '.join(map(repr, DECAYS))}.")
        if self.decay == "none" and self.final_level != 0:
            raise ValueError(f"{type(self).__name__} final_level={self.final_level} needs a decay that ends there: decay=cosine.")
        if not 0 <= self.final_level <= highest:
            raise ValueError(f"{who} cannot fall to final_level={self.final_level}: it must lie in [0, {highest:g}].")

    def __str__(self) -> str:
        """The options, without a schedule that is not there."""
        schedule = ["decay", "final_level"] if self.decay != "none" else []
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in [self.option, *schedule])
        return f"{type(self).__name__}({shown})"

    @property
    def highest(self) -> float:
        return getattr(self, self.option)

    @property
    def deterministic(self) -> bool:
        return self.highest == 0

    def level(self, t: Tensor) -> float | Tensor:
        """The noise level of a step from t: a number while it is constant, else shaped like t."""
        return DECAYS[self.decay](t, self.highest, self.final_level)


class SDE(Transition):
    """Euler-Maruyama step of the reverse SDE with any g(t); score = -eps_hat / t. Subclasses give g.

    dx = [v - g^2 score / 2] dt + g dw,   dt < 0:      x' = x - h [ v + g^2 / (2 t) (x + (1 - t) v) ] + g sqrt(h) z
    """

    def g(self, t: Tensor, t_max: Tensor) -> Tensor:
        raise NotImplementedError

    def swap(self, t: Tensor, t_next: Tensor, t_max: Tensor) -> tuple[Tensor, Tensor]:
        g, h = self.g(t, t_max), t - t_next
        return g**2 * h / (2 * t), g * h.sqrt()


@dataclass(frozen=True)
class FlowSDE(Noisy, SDE):
    """Flow-GRPO, arXiv 2505.05470: g = a sqrt(t / (1 - t)), a = noise_level.

        x' = x (1 - a^2 h / (2 (1 - t))) - (1 + a^2 / 2) h v + a sqrt(t h / (1 - t)) z            (t <= t_max)

    Marginals: in the limit of small steps only. The error is O(h^min(1, a^2)): on a grid that starts at t = 1 the first
    steps have g^2 h = a^2, a^2, a^2 / 2, a^2 / 3, ... whatever h is, and a small noise level forgets them slowly.
    """

    noise_level: float = 0.7  #: a. Paper: 0.7 (SD3.5); in use: 0.9 FLUX, 1.2 Qwen-Image. 0 is the ODE.

    def g(self, t: Tensor, t_max: Tensor) -> Tensor:
        return self.level(t) * (t / (1 - torch.minimum(t, t_max))).sqrt()


@dataclass(frozen=True)
class DanceSDE(Noisy, SDE):
    """DanceGRPO, arXiv 2505.07818: g = noise_level.

        x' = x - h v + g^2 h / 2 score + g sqrt(h) z,      score = -(x + (1 - t) v) / t

    Marginals: in the limit of small steps, error O(h).
    """

    noise_level: float = 0.3  #: g (the paper's eta). In use: 0.3 on FLUX, SD, Qwen, Wan; 0.25 on Hunyuan. 0 is the ODE.

    def g(self, t: Tensor, t_max: Tensor) -> Tensor:
        return self.level(t) * torch.ones_like(t)


@dataclass(frozen=True)
class Memoryless(SDE):
    """Adjoint Matching, arXiv 2409.08861: g^2 = 2 t / (1 - t), which is FlowSDE(sqrt(2)).

    The noising process run backwards: the only g for which x0 given x_t is distributed along the SDE as in
    x_t = (1 - t) x0 + t eps, so that E[exp(reward) | x_t] is the value function of the SDE too.
    Marginals: in the limit of small steps, error O(h). DDIM(1) is the same SDE without the excess noise of few steps.
    """

    @property
    def deterministic(self) -> bool:
        return False

    def g(self, t: Tensor, t_max: Tensor) -> Tensor:
        return (2 * t / (1 - torch.minimum(t, t_max))).sqrt()


@dataclass(frozen=True)
class CPS(Noisy):
    """Flow-CPS, arXiv 2509.05952: coefficients-preserving sampling, u = noise_level pi / 2.

        x' = (1 - t_next) x0_hat + t_next cos(u) eps_hat + t_next sin(u) z

    Marginals: NOT preserved, not even in the limit. The noise budget is exact for a known x0 and for any number of
    steps, so pictures are clean; but each step redraws a fixed share of the noise while x0_hat is a mean, so with more
    steps samples lose spread: N(mu, s^2) comes out with variance s^2 (1 + cos u) / 2 as h -> 0. With decay=cosine down to 0
    that share vanishes where it matters and the loss with it, slowly (noise level 0.8: 18 % in 20 steps, 4 % in 200).
    Noise level 1 is the stochastic_sampling option of diffusers' FlowMatchEulerDiscreteScheduler.
    """

    noise_level: float = 0.8  #: Share of a right angle, 0 to 1. In use: 0.7 to 0.9. 0 is the ODE.

    limit: ClassVar[float] = 1.0

    def swap(self, t: Tensor, t_next: Tensor, t_max: Tensor) -> tuple[Tensor, Tensor]:
        u = self.level(t) * math.pi / 2
        cos, sin = (u.cos(), u.sin()) if isinstance(u, Tensor) else (math.cos(u), math.sin(u))
        share = torch.ones_like(t) * t_next
        return share * (1 - cos), share * sin


@dataclass(frozen=True)
class MatchedCPS(Noisy):
    """CPS with the std of Flow-GRPO's SDE instead of a fixed angle: r = rho^(a^2 / 2), a = noise_level.

        x' = (1 - t_next) x0_hat + t_next r eps_hat + t_next sqrt(1 - r^2) z,      rho = (1 - t) t_next / ((1 - t_next) t)

    With any std s <= t_next, (1 - t_next) x0_hat + sqrt(t_next^2 - s^2) eps_hat + s z keeps the noise budget. This s solves
    FlowSDE(a) over the whole step for a known x0: d eps = g^2 / (2 t^2) eps dt + g / t dw has r = exp(-int g^2 / (2 t^2)).
    a = sqrt(2) is DDIM(1); a -> inf is CPS(1). At t = 1 all noise is fresh, whatever a is.

    Marginals: in the limit of small steps, error O(h), where it is FlowSDE(a); and no pole at t = 1, hence no grain.
    """

    noise_level: float = 0.7  #: a, as in FlowSDE: 0.7 to 1.4. 0 is the ODE.

    def swap(self, t: Tensor, t_next: Tensor, t_max: Tensor) -> tuple[Tensor, Tensor]:
        log_r = _log_correlation(self.level(t), t, t_next)
        return -t_next * torch.expm1(log_r), t_next * (-torch.expm1(2 * log_r)).sqrt()


@dataclass(frozen=True)
class DDIM(Noisy):
    """DDIM, arXiv 2010.02502, eq. 12 and 16, in flow coordinates; eta = 1 is ancestral (DDPM) sampling.

        x' = (1 - t_next) x0_hat + sqrt(t_next^2 - std^2) eps_hat + std z
        std = eta t_next sqrt(1 - rho^2),      rho = (1 - t) t_next / ((1 - t_next) t)

    DDIM(1) is SDE-DPM-Solver++ of order 1. Its order 2 reads the x0_hat of the step before: x' given x is then no Gaussian
    step, there is no ratio to train on, and it is left out. (For the steps of the ODE there is order 2: `solvers`.)

    Marginals: in the limit of small steps, error O(h), where it is FlowSDE(sqrt(2) eta); the noise budget is exact for
    a known x0 and for any number of steps. 1 - rho^2 is computed as (1 + rho) h / ((1 - t_next) t), which is equal and
    loses no digits when h is small.
    """

    eta: float = 1.0  #: 0 is the ODE, 1 is ancestral sampling (DDPO's choice).

    option: ClassVar[str] = "eta"
    limit: ClassVar[float] = 1.0

    def swap(self, t: Tensor, t_next: Tensor, t_max: Tensor) -> tuple[Tensor, Tensor]:
        eta = self.level(t)
        rho = (1 - t) * t_next / ((1 - t_next) * t)
        std = eta * t_next * ((1 + rho) * (t - t_next) / ((1 - t_next) * t)).sqrt()
        kept = t_next * (1 - eta**2 + eta**2 * rho**2).sqrt()
        return t_next - kept, std


#: By the name that a recipe uses. All have a density; GLASS, which has none, is not among them.
TRANSITIONS: dict[str, type[Transition]] = {
    "ode": ODE,
    "flow_sde": FlowSDE,
    "dance_sde": DanceSDE,
    "memoryless": Memoryless,
    "cps": CPS,
    "matched_cps": MatchedCPS,
    "ddim": DDIM,
}


@dataclass(frozen=True)
class GLASS:
    """GLASS flows, arXiv 2509.25170: a draw of x' given x by an inner ODE of the same network.

    Where MatchedCPS puts the mean of x0, this draws x0 given x, with the same r = rho^(a^2 / 2), a = noise_level. With
    b = r t_next / t it is x' = b x + y, and y is the end of

        y_u = alpha_u x0 + sigma_u z,   alpha_u = u (1 - t_next - b (1 - t)),   sigma_u = 1 - u + u t_next sqrt(1 - r^2)

    for u: 0 -> 1. x and y_u are two views of x0 with independent noise; together they are one, x_* at time t_*:

        q = (1 - t)^2 / t^2 + alpha^2 / sigma^2,                t_* = 1 / (1 + sqrt(q)),
        x_* = t_* / sqrt(q) ((1 - t) / t^2 x + alpha / sigma^2 y)

    so x0_hat(x_*, t_*) is E[x0 | x, y]. In k = alpha / sigma the ODE is d(y / sigma) = x0_hat dk, stepped at second order:

        y' / sigma' = y / sigma + (k' - k) D,      D = x0_hat + (x0_hat - x0_hat_before) / 2, at first D = x0_hat

    Marginals: kept for any outer steps, t_next = 0 included, in the limit of many inner steps, error O(1 / inner^2). With
    one inner step it is MatchedCPS(a). The law of x' is not Gaussian: no density in closed form, no ratio to train on.
    """

    inner: int = 4  #: Network calls per step: 4 to 8. Fewer where there are many outer steps.
    noise_level: float = math.sqrt(2)  #: a. sqrt(2) is the DDPM kernel; 0 redraws x0 and keeps the noise that belongs to it.

    def __post_init__(self) -> None:
        if self.inner < 1:
            raise ValueError(f"GLASS inner={self.inner} must be at least 1: try 4.")
        if not self.noise_level >= 0:
            raise ValueError(f"GLASS noise_level={self.noise_level} must not be negative: try {math.sqrt(2):.2f}.")

    def sample(self, velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Time, t_next: Time, noise: Tensor) -> Tensor:
        """x' at t_next, (B, ...) fp32. x: (B, ...) at t; noise: (B, ...), standard normal.

        velocity(x, t): (B, ...) in flow coordinates at times t (B,) fp32. It is called `inner` times, first at (x, t).
        """
        t, t_next, _ = _times(expand(t, x), expand(t_next, x), expand(0.0, x))
        x, y = x.float(), noise.float()
        log_r = _log_correlation(self.noise_level, t, t_next)
        b = log_r.exp() * t_next / t
        std = t_next * (-torch.expm1(2 * log_r)).sqrt()

        before = None
        for i in range(self.inner):
            u, u_next = i / self.inner, (i + 1) / self.inner
            alpha, alpha_next = (w * (1 - t_next - b * (1 - t)) for w in (u, u_next))
            sigma, sigma_next = (1 - w + w * std for w in (u, u_next))
            # sqrt(q) and the weights of the two views as a length and an angle: at t = 1, u = 0 both views are noise.
            length, angle = torch.hypot((1 - t) / t, alpha / sigma), torch.atan2(alpha / sigma, (1 - t) / t)
            t_star = 1 / (1 + length)
            x_star = t_star * (angle.cos() * x / t + angle.sin() * y / sigma)
            rows = t_star.reshape(-1).expand(len(x))
            x0_hat = x0_from(x_star, velocity(x_star, rows), rows)
            D = x0_hat if before is None else x0_hat + (x0_hat - before) / 2
            y = sigma_next / sigma * y + (alpha_next - sigma_next * alpha / sigma) * D
            before = x0_hat
        return b * x + y


def _log_correlation(level: float | Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """log r, r = rho^(level^2 / 2), with 1 - rho = h / ((1 - t_next) t): no digits are lost when h is small. 0 for level 0."""
    lost = ((t - t_next) / ((1 - t_next) * t)).clamp(max=1)
    return torch.special.xlog1py(torch.as_tensor(level, dtype=t.dtype, device=t.device) ** 2, -lost) / 2


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
