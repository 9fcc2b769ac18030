"""SFT: flow matching, arXiv 2210.02747, on the best samples of each group or on data; the baseline of all others.

    L = |v - (eps - x0)|^2    of the samples that `choose` keeps

On its own samples this is rejection sampling: the best of each group, and none of a group without a difference. Of preference
pairs it keeps the preferred pictures, of captioned pictures all.

Its own samples are not the reference's. Few Euler steps draw pictures that are a little too even (8 steps of the embedded model:
the latents' deviation is 4 % short, 2 % at 20 steps); regression learns that, and the next samples are evener still, until
nothing is left (measured: docs/papers.md). `solver: dpmpp2m` draws them right (1 %), `kl` holds the policy to the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.batch import Loss, Noised, Samples
from flowrl.train.objectives.base import Needs, Predict, check_positive, error, pulled


@dataclass(frozen=True)
class SFT:
    """Options of supervised fine-tuning. Samples by the ODE; also learns from data."""

    #: How many of each group are kept, at most: those with the largest positive advantages.
    keep: int = 1
    #: Weigh each by its advantage; of data that is the weight of its pair. Otherwise all weigh 1.
    weighted: bool = False
    #: Weight of the pull towards the reference, in velocity space. 0 needs no reference pass.
    kl: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "keep")
        check_positive(self, "kl", or_zero=True)

    @property
    def needs(self) -> Needs:
        return Needs(points="noised", reference=self.kl > 0)

    def choose(self, samples: Samples, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """The best rows of each group (M,) int64, in their order, and their weights (M,) fp32. advantage: (N,)."""
        best = [places[advantage[places].argsort(descending=True, stable=True)[: self.keep]] for places in samples.by_group()]
        rows = torch.cat(best).sort().values
        rows = rows[advantage[rows] > 1e-6]
        return rows, advantage[rows] if self.weighted else torch.ones(len(rows))

    def loss(self, predict: Predict, noised: Noised, advantage: Tensor) -> Loss:
        """Loss per sample (B,) at noised final latents. advantage: (B,) fp32, the weights that `choose` gave."""
        v_ref = predict.reference(noised) if self.kl > 0 else None
        v = predict(noised)
        m = error(v, noised.target)
        values = advantage * m
        loss = Loss(values, {"policy_loss": values.detach(), "error": m.detach()})
        return loss if v_ref is None else pulled(loss, self.kl, error(v, v_ref.float()))
