"""ReFL, arXiv 2304.05977, algorithm 1: one step near the end, its guess of the picture, and the gradient of the reward.

    x_t by the ODE without gradient,    x0_hat = x_t - t v_theta(x_t),    L = max(0, cap - r(x0_hat))

Which step: a random one of the last ten of 40 in the paper, here `steps: {name: late, size: ...}`. The paper's cap is 2 for
ImageReward, whose deviation is 1, and its loss is scaled by 1e-3, which AdamW does not feel. Its loss of pretraining on pictures
is left out, as in its code; `kl` is ours in its stead.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowrl.batch import Noised, Step
from flowrl.samplers.flow import x0_from
from flowrl.train.objectives.base import Predict
from flowrl.train.objectives.climb import Climb


@dataclass(frozen=True)
class ReFL(Climb):
    """Options of ReFL. Samples by the ODE; `steps` names the node, late or spread."""

    def end(self, predict: Predict, point: Step | Noised, v: Tensor) -> Tensor:
        return x0_from(point.x, v, point.t)
