"""Time grids, which of their steps are stochastic and trained, and how the noise level falls along them.

A schedule answers `steps(num_steps, seed, update)`: the sorted indices of the steps that draw noise and are trained.
All others follow the ODE. Step i goes from grid[i] to grid[i + 1]; the last one ends at t = 0 and is never trained, except by
a reward's gradient (`Late`, `Spread`), for which all follow the ODE.

The answer depends on its arguments alone, through a hash that is the same in every process and on every platform: all
ranks and all members of a group share it, a random one is drawn anew for each update, and a resumed run draws the same.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor


def time_grid(num_steps: int, shift: float = 1.0) -> Tensor:
    """(num_steps + 1,) fp32: even steps from 1 to 0, moved towards noise by t -> shift t / (1 + (shift - 1) t).

    diffusers' FlowMatchEulerDiscreteScheduler gives this grid when a pipeline passes it sigmas = 1, ..., 1/num_steps
    (FLUX, Qwen-Image). Left to itself (SD3) it spends its last step near t = 0: num_steps values even from 1 to
    sigma_min = shift / (1000 + shift - 1), then shifted, then 0.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1.")
    if not shift > 0:
        raise ValueError(f"shift={shift} must be positive: 1 leaves the grid even, 3 is SD3's.")
    t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * t / (1 + (shift - 1) * t)).float()


def t_max_of(grid: Tensor) -> Tensor:
    """The largest time of the grid below 1 (within 1e-6 of 1 counts as 1). It stands in for t at the 1 - t pole."""
    return grid[grid < 1 - 1e-6].max()


@dataclass(frozen=True)
class AllButLast:
    """Every step but the last (Flow-GRPO, arXiv 2505.05470)."""

    def steps(self, num_steps: int, seed: int, update: int) -> list[int]:
        return list(range(_trainable(num_steps)))


@dataclass(frozen=True)
class Fraction:
    """A random part of the steps, drawn anew for each update (after DanceGRPO, arXiv 2505.07818).

    DanceGRPO keeps the other steps stochastic too and draws a subset per sample; here they follow the ODE.
    """

    fraction: float = 0.6  #: Part of the num_steps - 1 steps before the last, rounded to whole steps, at least one.

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"Fraction fraction={self.fraction} must lie in (0, 1]: try 0.6.")

    def steps(self, num_steps: int, seed: int, update: int) -> list[int]:
        steps = range(_trainable(num_steps))
        count = max(1, round(self.fraction * len(steps)))
        return sorted(sorted(steps, key=lambda i: _hash(seed, update, i))[:count])


@dataclass(frozen=True)
class Window:
    """`size` neighbouring steps within [low, high) (Flow-GRPO-Fast; progressive: MixGRPO, arXiv 2507.21802)."""

    size: int = 2  #: Number of stochastic steps. In use: 2 to 4.
    low: int = 0  #: First step the window may cover. Noise early in the trajectory changes rewards most.
    high: int | None = None  #: End of the range, exclusive; at most num_steps - 1. By default half of the steps.
    kind: Literal["fixed", "random", "progressive"] = "random"  #: At low; anywhere, per update; sliding up by one.
    every: int = 25  #: Progressive only: updates between two moves. After the last position it starts again at low.

    def __post_init__(self) -> None:
        if self.size < 1 or self.low < 0 or self.every < 1:
            raise ValueError(
                f"Window size={self.size}, low={self.low}, every={self.every}: size and every must be at least 1, low at least 0."
            )
        if self.kind not in ("fixed", "random", "progressive"):
            raise ValueError(f"Window kind={self.kind!r} is unknown: use 'fixed', 'random' or 'progressive'.")

    def steps(self, num_steps: int, seed: int, update: int) -> list[int]:
        high = num_steps // 2 if self.high is None else self.high
        if high > _trainable(num_steps):
            raise ValueError(
                f"Window high={high} covers the last of {num_steps} steps, which is deterministic: "
                f"set high to at most {num_steps - 1}."
            )
        starts = high - self.size - self.low + 1
        if starts < 1:
            raise ValueError(
                f"Window size={self.size} does not fit between low={self.low} and high={high} of {num_steps} steps: "
                f"set high to at least {self.low + self.size}, make it smaller, or sample with more steps."
            )
        shift = {"fixed": 0, "random": _hash(seed, update) % starts, "progressive": update // self.every % starts}
        start = self.low + shift[self.kind]
        return list(range(start, start + self.size))


def constant(t: Tensor, high: float, low: float) -> float:
    """level(t) = high."""
    return high


def cosine(t: Tensor, high: float, low: float) -> Tensor:
    """HiCoGen: level(t) = low + (high - low) (1 + cos(pi (1 - t))) / 2, shaped like t. high at t = 1, low at t = 0.

    Noise early changes what is drawn, noise late only its grain. It lowers the noise level of any transition, read at the
    start of the step: for Flow-SDE, Dance-SDE and MatchedCPS it multiplies g(t), for CPS the angle, for DDIM eta.
    """
    return low + (high - low) * (1 + (math.pi * (1 - t)).cos()) / 2


#: Noise level of a step from t, by the name that a transition's `decay` uses. high: the transition's own level.
DECAYS: dict[str, Callable[[Tensor, float, float], float | Tensor]] = {"none": constant, "cosine": cosine}


@dataclass(frozen=True)
class Backward:
    """The last steps before the end, reaching further back as training goes on (B2-DiffuRL, arXiv 2503.11240).

    Rewards are easy to assign near the picture; what was learned there is in place when earlier steps begin to train.
    """

    size: int = 2  #: Number of trained steps at the start.
    every: int = 25  #: Updates after which one more step trains, until all but the last one do.

    def __post_init__(self) -> None:
        if self.size < 1 or self.every < 1:
            raise ValueError(f"Backward size={self.size}, every={self.every}: both must be at least 1.")

    def steps(self, num_steps: int, seed: int, update: int) -> list[int]:
        end = _trainable(num_steps)
        return list(range(max(0, end - self.size - update // self.every), end))


# -- nodes from which the gradient of a reward goes back -----------------------------------------------------------------------
#
# The steps follow the ODE, so that the last one may be among them. Mind the grid: SD3's ends with a step from t = 0.009, which
# hardly moves the picture.


@dataclass(frozen=True)
class Late:
    """One step near the end: where a reward's gradient starts (ReFL, arXiv 2304.05977), or how far back it goes (DRaFT-K)."""

    size: int = 1  #: Number of steps from the earliest to the end: K of DRaFT-K, 10 of 40 in ReFL.
    kind: Literal["fixed", "random", "normal"] = "random"  #: `size` before the end; any of the last `size`; about there.
    std: float = 5.0  #: Normal only: deviation in steps. AlignProp (arXiv 2310.03739) has size=8, std=5 of 50.

    def __post_init__(self) -> None:
        if self.size < 1 or not self.std > 0:
            raise ValueError(f"Late size={self.size}, std={self.std}: size must be at least 1, std positive.")
        if self.kind not in ("fixed", "random", "normal"):
            raise ValueError(f"Late kind={self.kind!r} is unknown: use 'fixed', 'random' or 'normal'.")

    def steps(self, num_steps: int, seed: int, update: int) -> list[int]:
        if self.size > num_steps:
            raise ValueError(f"Late size={self.size} exceeds the {num_steps} steps: make it smaller, or sample with more steps.")
        start = num_steps - self.size
        u = (_hash(seed, update) + 0.5) / 2**64
        place = {
            "fixed": start,
            "random": start + int(u * self.size),
            "normal": round(NormalDist(start, self.std).inv_cdf(u)),
        }
        return [min(max(place[self.kind], 0), num_steps - 1)]


@dataclass(frozen=True)
class Spread:
    """`size` steps at even distances from `low` to the end: each stands for the steps up to the next one (sparse gradients)."""

    size: int = 4  #: Number of trained steps.
    low: int = 0  #: First step that they cover.
    kind: Literal["fixed", "random"] = "fixed"  #: Each first of its part of the steps; all moved alike within it, per update.

    def __post_init__(self) -> None:
        if self.size < 1 or self.low < 0:
            raise ValueError(f"Spread size={self.size}, low={self.low}: size must be at least 1, low at least 0.")
        if self.kind not in ("fixed", "random"):
            raise ValueError(f"Spread kind={self.kind!r} is unknown: use 'fixed' or 'random'.")

    def steps(self, num_steps: int, seed: int, update: int) -> list[int]:
        covered = num_steps - self.low
        if self.size > covered:
            raise ValueError(
                f"Spread size={self.size} exceeds the {covered} steps from low={self.low} to the end of {num_steps}."
            )
        shift = _hash(seed, update) % (covered // self.size) if self.kind == "random" else 0
        return [self.low + shift + i * covered // self.size for i in range(self.size)]


# -- times of a forward process ------------------------------------------------------------------------------------------------
#
# Answers `at(u, grid)`: times (B,) for quantiles u (B,) in [0, 1), strictly between 0 and 1 or equal to 1 at most.


@dataclass(frozen=True)
class Times:
    """At which times clean latents are noised to train on them. Quantiles are stratified: `count` even strata per sample."""

    count: int = 4  #: Times per sample and update, each a denoiser call with gradient.
    low: float = 0.0  #: Smallest time. Errors near 0 are of the grain alone.
    high: float = 0.99  #: Largest time. At 1 there is nothing but noise.
    shared: bool = False  #: One time for the whole batch: wanted where guidance is on, and by models of two experts.

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.low < self.high <= 1:
            raise ValueError(f"count={self.count}, low={self.low}, high={self.high}: at least 1, and 0 <= low < high <= 1")

    def at(self, u: Tensor, grid: Sequence[float]) -> Tensor:
        raise NotImplementedError

    def _within(self, t: Tensor) -> Tensor:
        return t.clamp(max(self.low, 1e-3), self.high)


@dataclass(frozen=True)
class GridTimes(Times):
    """Those of the sampler's own grid (DiffusionNFT, arXiv 2509.16117): what is trained is what is asked for later."""

    def at(self, u: Tensor, grid: Sequence[float]) -> Tensor:
        times = torch.tensor([t for t in grid if max(self.low, 1e-6) <= t <= self.high])
        if not len(times):
            raise ValueError(f"no time of the grid lies within low={self.low} and high={self.high}")
        return times[(u * len(times)).long()]


@dataclass(frozen=True)
class UniformTimes(Times):
    """Even over [low, high]."""

    def at(self, u: Tensor, grid: Sequence[float]) -> Tensor:
        return self._within(self.low + (self.high - self.low) * u)


@dataclass(frozen=True)
class LogitNormalTimes(Times):
    """t = sigmoid(mean + std z), z normal: mostly the middle, as flow models are pretrained (SD3, arXiv 2403.03206)."""

    mean: float = 0.0  #: Larger: noisier.
    std: float = 1.0  #: Spread before the sigmoid.

    def at(self, u: Tensor, grid: Sequence[float]) -> Tensor:
        return self._within((self.mean + self.std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))).sigmoid())


TIMES = {"grid": GridTimes, "uniform": UniformTimes, "logit_normal": LogitNormalTimes}


SCHEDULES = {
    "all_but_last": AllButLast,
    "fraction": Fraction,
    "window": Window,
    "backward": Backward,
    "late": Late,
    "spread": Spread,
}


def _trainable(num_steps: int) -> int:
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps} leaves no step to train, as the last is deterministic: use at least 2.")
    return num_steps - 1


def _hash(*numbers: int) -> int:
    """A 64-bit hash that, unlike Python's, never changes between processes, versions and platforms."""
    text = " ".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
