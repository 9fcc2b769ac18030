"""What every objective shares: what it asks of the loop, what the loop hands it, and the checks of its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, get_args, get_type_hints

from torch import Tensor

from flowrl.batch import Step


@dataclass(frozen=True)
class Needs:
    """What the loop must provide for an objective; nothing else reads it."""

    trajectory: bool = False  #: Recorded stochastic steps with their log-probs.
    reference: bool = False  #: The reference's velocity.
    old: bool = False  #: A slowly moving copy of the policy, named "old".
    sampled_velocity: bool = False  #: The velocity that each step was sampled from.


class Predict(Protocol):
    """The denoiser behind a pipeline, as an objective sees it; guidance, adapters, autocast and prompts are the loop's."""

    def __call__(self, step: Step) -> Tensor:
        """The policy's velocity at a recorded step, (B, ...), with graph."""

    def reference(self, step: Step) -> Tensor:
        """The reference's, without graph."""

    @property
    def mean_std(self) -> float:
        """Mean noise of the trained steps, to weigh a step by its own."""


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
