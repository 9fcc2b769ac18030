"""AlignProp, arXiv 2310.03739: the gradient of the reward through the whole sampler, cut off at a random step.

    x_{i+1} = x_i - (t_i - t_{i+1}) v_i,    v_i = sg(v_theta(x_i)) for i < k, else v_theta(x_i),    L = max(0, target - r(x_n))

The cut is drawn once per trajectory, k ~ N(42, 5) of 50: `steps: {name: late, kind: normal, size: 8, std: 5}`, one for all
samples of an update. No weights lie behind the noise, so the steps before the cut carry no gradient at all, and the rollout has
taken them: this is DRaFT-K with a random K. `cut: each` is another estimator, that of TRL's former trainer (derived): each step
draws a cut of its own, so that step i of n keeps its velocity's gradient with probability (i + 1) / (n + 1), the last one always;
what reaches earlier ones has skipped denoisers on its way, along the chain's linear part. Our rollout is the ODE (released: DDIM
with eta 1); `cap` is the paper's target, whose loss |target - r| is the same below it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from flowrl.batch import Noised, Step
from flowrl.train.objectives.base import Predict, check_choice
from flowrl.train.objectives.climb import Climb, unroll


@dataclass(frozen=True)
class AlignProp(Climb):
    """Options of AlignProp. Samples by the ODE; `steps` names the cut, late (with `cut: each` the earliest that may be)."""

    #: once: every step from the recorded node on keeps its gradient. each: each draws whether it does, later ones more likely.
    cut: Literal["once", "each"] = "once"
    #: Keep only the states of the chain, and compute each step once more for the gradient.
    checkpoint: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "cut")

    def end(self, predict: Predict, point: Step | Noised, v: Tensor) -> Tensor:
        assert isinstance(point, Step)
        steps = len(predict.grid) - 1
        return unroll(predict, point, v, constant=CUTS[self.cut](steps, point.index, predict.rng), save=self.checkpoint)


def once(steps: int, start: int, rng: Generator) -> list[bool]:
    """For each step from `start` on, whether it is cut off: none is."""
    return [False] * (steps - start)


def each(steps: int, start: int, rng: Generator) -> list[bool]:
    """Where a whole number up to `steps`, drawn for it alone, exceeds its place. The last one never is: nothing would be left."""
    draws = [int(torch.randint(steps + 1, (), generator=rng)) for _ in range(start, steps - 1)]
    return [draw > i for i, draw in enumerate(draws, start)] + [False]


#: Which steps of a chain are cut off, by the name that `cut` uses.
CUTS = {"once": once, "each": each}
