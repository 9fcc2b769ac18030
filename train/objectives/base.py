"""What every objective shares: what it asks of the loop, what the loop hands it, and the checks of its options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar, get_args, get_type_hints

from torch import Generator, Tensor

from flowrl.batch import Loss, Noised, Point, Step

T = TypeVar("T")


@dataclass(frozen=True)
class Needs:
    """What the loop must provide for an objective; nothing else reads it."""

    #: Where the loss is asked: at recorded stochastic `steps`, at `noised` final latents (drawn by the ODE, or data), or at
    #: `nodes` of an ODE rollout, from which the gradient of a reward goes back.
    points: Literal["steps", "noised", "nodes"] = "steps"
    #: Which rows of a batch belong together: none (`sample`), two in turn, the better one first (`pair`), or a whole `group`.
    unit: Literal["sample", "pair", "group"] = "sample"
    shared_noise: bool = False  #: The rows of a unit share their noise, and not only their times (`noised`).
    reference: bool = False  #: The reference's velocity.
    old: bool = False  #: A slowly moving copy of the policy, `old`, which also samples.
    sampled_velocity: bool = False  #: The velocity that each step was sampled from.
    affine: bool = False  #: Its values are affine in the advantage where that is not clipped: several rewards may share one pass.
    process: bool = False  #: `Step.process`: the advantage of each step by a process reward, which also guides the rollout.
    maps: bool = False  #: `Noised.map`: where the pictures are good, by a reward that says so.
    rewards: bool = True  #: Scores; without, it learns from data alone.
    differentiable: bool = False  #: Rewards whose gradients reach the latents.

    @property
    def trajectory(self) -> bool:
        """Recorded stochastic steps with their log-probs."""
        return self.points == "steps"


class Predict(Protocol):
    """The denoiser behind a pipeline, as an objective sees it; guidance, adapters, autocast and prompts are the loop's.

    Asked twice at the same point it answers twice, but computes once.
    """

    def __call__(self, at: Point) -> Tensor:
        """The policy's velocity (B, ...), with graph where gradients are enabled. at: a point with a row for each prompt."""

    def reference(self, at: Point, **call: Any) -> Tensor:
        """The reference's, without graph. call: arguments of the pipeline's call that differ (guidance_scale)."""

    def old(self, at: Point) -> Tensor:
        """The slow copy's, without graph."""

    @property
    def mean_std(self) -> float:
        """Mean noise of the trained steps, to weigh a step by its own."""

    @property
    def grid(self) -> Sequence[float]:
        """The times that the sampler visits, from noise to 0."""

    def mean(self, values: Tensor) -> Tensor:
        """The mean () of values over all processes, without graph."""

    @property
    def steps(self) -> Sequence[Step]:
        """The recorded steps of the batch, noisiest first."""

    @property
    def final(self) -> Tensor:
        """(B, ...) fp32, the final latents of the batch."""

    @property
    def rng(self) -> Generator:
        """Of the batch: what is drawn with it depends on the run's seed and the step, and on what was drawn before."""

    def noise(self, like: Tensor) -> Tensor:
        """(B, ...) fp32 standard normal, each row its sample's own; every call draws anew."""

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """compute(), called at the first of a batch's points; the others get the same."""

    def pictures(self, x0: Tensor, frames: int | None = None) -> Tensor | None:
        """(B, 3, H, W) or (B, F, 3, H, W) in [0, 1], decoded from final latents (B, ...), with graph. None if no reward looks.

        frames: of clips, this many frames in their order, drawn by `rng`.
        """

    def scores(self, x0: Tensor, images: Tensor | None) -> Tensor:
        """(B, K) the rewards of latents and their pictures, with graph, before weights; NaN abstains."""

    def weighted(self, scores: Tensor) -> Tensor:
        """(B,) the weighted sum of scores (B, K), where one abstains without it."""

    def rewards(self, x0: Tensor, frames: int | None = None) -> Tensor:
        """(B, K) the rewards of the pictures of final latents (B, ...), with graph, before weights; NaN abstains."""

    def reward(self, x0: Tensor, frames: int | None = None) -> Tensor:
        """(B,) their weighted sum, with graph."""


def check_positive(options: Any, *names: str, or_zero: bool = False) -> None:
    for name in names:
        value = getattr(options, name)
        if not (value > 0 or (or_zero and value == 0)):
            raise ValueError(f"{name}={value}: must be {'zero or ' if or_zero else ''}positive")


def check_choice(options: Any, *names: str) -> None:
    hints = get_type_hints(type(options))
    for name in names:
        if getattr(options, name) not in get_args(hints[name]):
            raise ValueError(f"{name}={getattr(options, name)!r}: choose one of {', '.join(get_args(hints[name]))}")


def error(v: Tensor, target: Tensor) -> Tensor:
    """(B,) fp32, the mean over latents of (v - target)^2. A mean, so that weights transfer between resolutions."""
    return (v.float() - target).square().flatten(1).mean(1)


def pulled(loss: Loss, beta: float, kl: Tensor) -> Loss:
    """The same loss with a pull of weight beta towards the reference. kl: (B,) with graph."""
    pull = beta * kl if loss.penalty is None else loss.penalty + beta * kl
    return replace(loss, metrics={**loss.metrics, "kl": kl.detach()}, penalty=pull)


def by_group(values: Tensor, point: Noised | Step) -> Tensor:
    """(n, G) what (B,) says of each of n groups of G; a group's rows lie side by side."""
    assert point.group is not None
    size = int((point.group == point.group[0]).sum())
    return values.reshape(-1, size)
