"""B2-DiffuRL, arXiv 2503.11240: train from the picture backwards, on the best and the worst branch of each set.

    the last n steps train, n grows over training                         (schedule `backward`)
    the branches of a set part where training begins                      (recipe option `branches`)
    of each set:  argmax A if A >= threshold,  argmin A if A <= -threshold;  A <- beta1 A if A > 0 else beta2 A
    L = GRPO's on those, with ratios clipped at 0.1

A reward says little of the first steps before the last ones are good; and two pictures of one past differ by what the trained
steps did. A set is what started from one state: branches=[3] in a group of 12 makes four sets. A is the z-score in the prompt's
group (the released code's: with the last 8 rounds of the prompt too, which would mix policies here).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.train.objectives.base import Needs, check_positive
from flowrl.train.objectives.grpo import GRPO


@dataclass(frozen=True)
class B2DiffuRL(GRPO):
    """Options of B2-DiffuRL, and those of GRPO."""

    #: Clip range of the ratio. The paper's 0.1 means little for a mean over latents: no step ever gets there.
    epsilon: float = 0.1
    #: A branch is kept if its advantage is at least this far from 0. In use: 0.5 and 0.7.
    threshold: float = 0.5
    #: Weight of the best branches.
    beta1: float = 1.0
    #: Weight of the worst branches.
    beta2: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "threshold")
        check_positive(self, "beta1", "beta2", or_zero=True)

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.beta > 0)

    def choose(self, samples: Samples, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (M,) int64 of the branches that are trained on, and their advantages (M,) fp32."""
        rows, values = [], []
        for places in samples.by_start():
            own = advantage[places]
            best, worst = int(own.argmax()), int(own.argmin())
            if own[best] >= self.threshold:
                rows.append(int(places[best]))
                values.append(self.beta1 * float(own[best]))
            if own[worst] <= -self.threshold:
                rows.append(int(places[worst]))
                values.append(self.beta2 * float(own[worst]))
        return torch.tensor(rows, dtype=torch.int64), torch.tensor(values, dtype=torch.float32)
