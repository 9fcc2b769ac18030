"""Flow-RWR, arXiv 2501.13918: reward-weighted regression.

    L = exp(A / temperature) |v - (eps - x0)|^2

Its optimum is the flow of p(x0 | prompt) exp(A / temperature) / Z, where p drew the samples: bad ones count for little, none
pushes away. The paper has the reward itself in the exponent; A is the reward less its group's mean, over a deviation, so that
one temperature fits any. The weights are not divided by their mean over the group: with A of variance 1 that is much the same in
every group, about exp(1 / (2 temperature^2)), and AdamW divides it away; so each sample's loss is its own (derived).
On its own samples, round after round, it wants `kl`: see `sft`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowrl.batch import Loss, Noised
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

    def loss(self, predict: Predict, noised: Noised, advantage: Tensor) -> Loss:
        """Loss per sample (B,) at noised final latents. advantage: (B,) fp32."""
        v_ref = predict.reference(noised) if self.kl > 0 else None
        v = predict(noised)
        A = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        weight = (A / self.temperature).exp()
        m = error(v, noised.target)
        values = weight * m
        loss = Loss(values, {"policy_loss": values.detach(), "weight": weight, "error": m.detach()})
        return loss if v_ref is None else pulled(loss, self.kl, error(v, v_ref.float()))
