"""D3PO, arXiv 2311.13231: DPO at every step of two trajectories of one prompt.

    rho(w) = p_theta(x'_w | x_w) / p_ref(x'_w | x_w),    likewise rho(l), for the better and the worse sample
    L      = -log sigmoid( beta (log rho(w) - log rho(l)) )

A pair is the best and the worst sample of a group. Every step of the better trajectory counts as better (the paper's assumption).
log p is a mean over latents, as in the released code, whose beta of 0.1 and clip of 0.1 then leave the loss at ln 2 for ever, a
plain policy gradient: |u| <= 2 beta 0.1 = 0.02. Here the ratio is not clipped unless asked to (a hard clip takes the gradient on
both sides, so that what has left never returns), and beta says where a pair stops to teach: at a difference of about 3 / beta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from flowrl.batch import Loss, Samples, Step
from flowrl.train.objectives.base import Needs, Predict, check_positive
from flowrl.train.objectives.preference import best_and_worst, implicit_accuracy, pair_loss


@dataclass(frozen=True)
class D3PO:
    """Options of D3PO. Shared initial noise, as the paper has it for rewards: branches=[num_generations] in the recipe."""

    #: Temperature, for a log-likelihood that is a mean over latents: D times that of their sum.
    beta: float = 1000.0
    #: The ratio is cut to 1 - clip ... 1 + clip, without a gradient beyond; 0 does not. Released: 0.1.
    clip: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "beta")
        check_positive(self, "clip", or_zero=True)
        if self.clip >= 1:
            raise ValueError(f"clip={self.clip}: must lie below 1")

    @property
    def needs(self) -> Needs:
        return Needs(unit="pair", reference=True)

    def choose(self, samples: Samples, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """A pair of each group: its best sample, then its worst."""
        return best_and_worst(samples, advantage)

    def loss(self, predict: Predict, step: Step, advantage: Tensor) -> Loss:
        """Loss per pair (B / 2,) at one recorded step. Rows: the better sample, then the worse one."""
        log_ratio = log_ratio_to_reference(predict, step)
        if self.clip > 0:
            log_ratio = log_ratio.clamp(math.log(1 - self.clip), math.log(1 + self.clip))
        u = self.beta * (log_ratio[::2] - log_ratio[1::2])
        values = pair_loss("sigmoid", u)
        metrics = {
            "policy_loss": values.detach(),
            "implicit_accuracy": implicit_accuracy(u),
            "log_ratio_better": log_ratio[::2].detach(),
            "log_ratio_worse": log_ratio[1::2].detach(),
        }
        return Loss(values, metrics)


def log_ratio_to_reference(predict: Predict, step: Step) -> Tensor:
    """(B,) log p_theta - log p_ref of the step that was taken, with graph; a mean over latents."""
    v_ref = predict.reference(step)
    v = predict(step)
    return step.gaussian(v).log_prob(step.x_next) - step.gaussian(v_ref).log_prob(step.x_next)
