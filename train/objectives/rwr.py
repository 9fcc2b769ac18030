"""Flow-RWR, arXiv 2501.13918: reward-weighted regression.

    L = w |v - (eps - x0)|^2,    w = exp(A / temperature) / mean over the prompt's samples of exp(A / temperature)

Its optimum is the flow of p(x0 | prompt) exp(A / temperature) / Z, where p drew the samples: bad ones count for little, none
pushes away. The paper has the reward itself in the exponent, and no Z; A is the reward less its group's mean, over a deviation,
so that one temperature fits any. The group's mean estimates the prompt's own Z. Without it a prompt of which one sample in eight
is right weighs six times as much as one of which seven are (A clipped at 1.5, temperature 0.3), and `kl` is another pull at each
temperature. A group without a difference has weights of 1, which teach nothing on average: it is left out.
On its own samples, round after round, it wants `kl`: see `sft`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.batch import Loss, Noised, Samples
from flowrl.train.objectives.base import Needs, Predict, check_positive, error, pulled


@dataclass(frozen=True)
class RWR:
    """Options of Flow-RWR. Samples by the ODE; also learns from data."""

    #: Smaller: only the best samples count. Of data, the preferred picture weighs exp(2 / temperature) times the other.
    temperature: float = 1.0
    #: Advantages are clipped to this magnitude.
    advantage_clip: float = 5.0
    #: Weight of the pull towards the reference, in velocity space. 0 needs no reference pass.
    kl: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "temperature", "advantage_clip")
        check_positive(self, "kl", or_zero=True)

    @property
    def needs(self) -> Needs:
        return Needs(points="noised", reference=self.kl > 0)

    def choose(self, samples: Samples, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """The rows (M,) int64 of all groups with a difference, in their order, and their weights (M,) fp32. advantage: (N,)."""
        A = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        weights, taught = torch.ones_like(A), torch.zeros(len(A), dtype=torch.bool)
        for places in samples.by_group():
            weights[places] = len(places) * (A[places] / self.temperature).softmax(0)
            taught[places] = len(places) == 1 or bool(A[places].max() - A[places].min() > 1e-6)
        rows = taught.nonzero().squeeze(1)
        return rows, weights[rows]

    def loss(self, predict: Predict, noised: Noised, advantage: Tensor) -> Loss:
        """Loss per sample (B,) at noised final latents. advantage: (B,) fp32, the weights that `choose` gave."""
        v_ref = predict.reference(noised) if self.kl > 0 else None
        v = predict(noised)
        m = error(v, noised.target)
        values = advantage * m
        loss = Loss(values, {"policy_loss": values.detach(), "weight": advantage, "error": m.detach()})
        return loss if v_ref is None else pulled(loss, self.kl, error(v, v_ref.float()))
