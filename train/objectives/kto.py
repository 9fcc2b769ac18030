"""Diffusion-KTO, arXiv 2404.04465, eq. 8: from pictures that are good or bad by themselves, without pairs.

    g = m_ref - m,    Q0 = max(0, mean g over all processes), a constant,    z = y beta (g - Q0),   y = sign A
    L = w_y (1 - U(z)),    U = sigmoid;   m = mean (v - (noise - x0))^2

beta is whole, not halved as in DPO. Of data, both pictures of a pair, and captioned pictures as good ones; of the policy's own
samples, those above and below their group's mean. The mean g is that of a batch: a smaller batch_size makes Q0 coarser. The name
of the equation is from memory; the utilities are the released code's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowrl.batch import Loss, Noised
from flowrl.train.objectives.base import Needs, Predict, check_choice, check_positive, error
from flowrl.train.objectives.preference import WEIGHTINGS

#: Utilities of z (B,). averse: a loss counts ever more, a gain ever less. seeking: the other way round.
UTILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "averse": logsigmoid,
    "seeking": lambda z: -logsigmoid(-z),
}


@dataclass(frozen=True)
class KTO:
    """Options of KTO."""

    #: A change of the error by some 1 / beta is where a picture stops to teach. 1000 in the paper.
    beta: float = 1000.0
    #: Who judges. sigmoid: cautious about losses and about gains. averse: log sigmoid. seeking: -log sigmoid(-z).
    utility: Literal["sigmoid", "averse", "seeking"] = "sigmoid"
    desirable_weight: float = 1.0  #: Of good pictures. With fewer of them than of bad ones: more.
    undesirable_weight: float = 1.0  #: Of bad pictures.
    #: Weigh each picture by |A|: of data by its own weight, of samples by how much better or worse than their group they are.
    weighted: bool = False
    #: What errors at time t count. constant, eps: (1 - t)^2, kl: (1 - t) / t up to 5.
    weighting: Literal["constant", "eps", "kl"] = "constant"

    def __post_init__(self) -> None:
        check_positive(self, "beta")
        check_positive(self, "desirable_weight", "undesirable_weight", or_zero=True)
        check_choice(self, "utility", "weighting")

    @property
    def needs(self) -> Needs:
        return Needs(points="noised", reference=True)

    def loss(self, predict: Predict, noised: Noised, advantage: Tensor) -> Loss:
        """Loss per sample (B,) at noised latents. advantage: (B,) fp32; one of 0 is neither good nor bad, and teaches nothing."""
        target = noised.target
        r = error(predict.reference(noised), target)
        v = predict(noised)
        m = error(v, target)
        g = WEIGHTINGS[self.weighting](noised.t) * (r - m)
        Q0 = predict.mean(g).clamp(min=0)
        good = advantage > 0
        weight = torch.where(good, self.desirable_weight, self.undesirable_weight) * (advantage != 0)
        if self.weighted:
            weight = weight * advantage.abs()
        values = weight * (1 - UTILITIES[self.utility](advantage.sign() * self.beta * (g - Q0)))
        metrics: dict[str, Tensor | float] = {
            "policy_loss": values.detach(),
            "baseline": Q0,
            "desirable": good.float(),
            "error": m.detach(),
            "change": -g.detach(),
            "implicit_accuracy": ((g - Q0).detach().sign() * advantage.sign() + 1) / 2,
        }
        return Loss(values, metrics)
