"""MaPO, arXiv 2406.06424: margin-aware preference optimisation without a reference.

    L = m_w - beta log sigmoid(T [phi(m_w) - phi(m_l)]),    phi(m) = s m / (exp(s m) - 1),    s = 1/2,   T = 1000

m = mean (v - (noise - x0))^2 at the same t and noise. phi falls from 1 at m = 0. The first term is supervised training on
winners, the second asks for a margin. One pass of one network: half of DPO's cost; and nothing holds it to where it started,
which is wanted where the data has another style. The paper's m is the error of the noise: weighting eps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowrl.batch import Loss, Noised, Samples
from flowrl.train.objectives.base import Needs, Predict, check_choice, check_positive, error
from flowrl.train.objectives.preference import WEIGHTINGS, best_and_worst, implicit_accuracy


@dataclass(frozen=True)
class MaPO:
    """Options of MaPO: of data, its pairs; of the policy's own samples, the best and the worst of each group."""

    #: Weight of the margin against the supervised term.
    beta: float = 0.1
    #: T: a difference of errors of some 4 / (s T) is where the margin is wide enough.
    temperature: float = 1000.0
    #: s of phi.
    steepness: float = 0.5
    #: What errors at time t count. constant, eps: (1 - t)^2, kl: (1 - t) / t up to 5.
    weighting: Literal["constant", "eps", "kl"] = "constant"
    #: Weigh each pair: of data by its own weight, of samples by half the difference of their advantages.
    weighted: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "temperature", "steepness")
        check_positive(self, "beta", or_zero=True)
        check_choice(self, "weighting")

    @property
    def needs(self) -> Needs:
        return Needs(points="noised", unit="pair", shared_noise=True)

    def choose(self, samples: Samples, advantage: Tensor) -> tuple[Tensor, Tensor]:
        return best_and_worst(samples, advantage, weighted=self.weighted)

    def loss(self, predict: Predict, noised: Noised, advantage: Tensor) -> Loss:
        """Loss per pair (B / 2,) at noised latents, the better row first. advantage: (B,) fp32, the pair's weight times 1, -1."""
        m = WEIGHTINGS[self.weighting](noised.t) * error(predict(noised), noised.target)
        u = self.temperature * (phi(self.steepness * m[0::2]) - phi(self.steepness * m[1::2]))
        values = advantage[0::2] * (m[0::2] - self.beta * logsigmoid(u))
        metrics: dict[str, Tensor | float] = {
            "policy_loss": values.detach(),
            "implicit_accuracy": implicit_accuracy(u),
            "margin": (m[1::2] - m[0::2]).detach(),
            "logit": u.detach(),
            "error_winner": m[0::2].detach(),
            "error_loser": m[1::2].detach(),
        }
        return Loss(values, metrics)


def phi(x: Tensor) -> Tensor:
    """x / (exp(x) - 1) for x >= 0, which is 1 - x / 2 + O(x^2) near 0, with its gradient."""
    return torch.where(x < 1e-4, 1 - x / 2, x / torch.expm1(x.clamp(min=1e-4)))
