"""DRaFT, arXiv 2309.17400: the gradient of the reward through the last K steps of the sampler, or through one of low variance.

    DRaFT-K    x_{i+1} = x_i - (t_i - t_{i+1}) v_theta(x_i)  for i = n - K .. n - 1,           L = max(0, cap - r(x_n))
    DRaFT-LV   x_t = (1 - t) sg(x_n) + t eps_j,  x0_hat = x_t - t v_theta(x_t),  j = 1 .. m,   L = mean_j max(0, cap - r(x0_hat))

K is the distance of the recorded node from the end: `steps: {name: late, kind: fixed, size: K}`; DRaFT is K = n. LV's copies and
their times are the recipe's `times` (`count` is m, 2 in the paper), around the last noise level. The equations are those of the
flow, the paper's are DDIM's. Where a grid ends with a step from t = 0.009, as SD3's does, K = 1 and LV at that level hardly touch
the picture: use K = 2 or more, and times of 0.2 to 0.4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from flowrl.batch import Noised, Step
from flowrl.samplers.flow import x0_from
from flowrl.train.objectives.base import Needs, Predict
from flowrl.train.objectives.climb import Climb, unroll


@dataclass(frozen=True)
class DRaFT(Climb):
    """Options of DRaFT-K. Samples by the ODE; `steps` names the node where the gradient ends, late."""

    #: Keep only the states of the chain, and compute each step once more for the gradient: memory of one step, time of K more.
    checkpoint: bool = False

    def end(self, predict: Predict, point: Step | Noised, v: Tensor) -> Tensor:
        assert isinstance(point, Step)
        return unroll(predict, point, v, save=self.checkpoint)


@dataclass(frozen=True)
class DRaFTLV(Climb):
    """Options of DRaFT-LV. Samples by the ODE; `times` names the noise level and the number of copies."""

    @property
    def needs(self) -> Needs:
        return replace(super().needs, points="noised")

    def end(self, predict: Predict, point: Step | Noised, v: Tensor) -> Tensor:
        return x0_from(point.x, v, point.t)
