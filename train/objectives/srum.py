"""SRUM (WayneJin0918/SRUM): supervised training on the policy's own pictures, weighted by where they are good.

    L = mean M (v - (noise - x0))^2 + lambda mean (v - (noise - x0))^2

M in [0, 1] is the map of a reward that has one (`region_map`), on the latents' grid. The published method trains on a bad
picture by its map and on a good one without; as released, both are the model's own sample, which is what this is: regression
that keeps more of what is right. It cannot push away: M is at least 0 (by the published rule, half the score of the whole).
A picture whose map is NaN, because its prompt says nothing that could be checked, counts 0.
On its own samples, round after round, it wants `kl`: see `sft`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowrl.batch import Loss, Noised
from flowrl.train.objectives.base import Needs, Predict, check_positive, error, pulled


@dataclass(frozen=True)
class SRUM:
    """Options of SRUM. Wants a reward with a map, such as `rewards.region_map=1`, which is all that teaches."""

    #: lambda: weight of the term without the map. 0.5 in the release's script.
    consistency: float = 0.5
    #: Divide the map by its mean over the batch, so that the learning rate does not depend on how good the pictures are.
    normalize: bool = True
    #: Weight of the pull towards the reference, in velocity space. 0 needs no reference pass.
    kl: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "consistency", "kl", or_zero=True)

    @property
    def needs(self) -> Needs:
        return Needs(points="noised", maps=True, reference=self.kl > 0)

    def loss(self, predict: Predict, noised: Noised, advantage: Tensor) -> Loss:
        """Loss per sample (B,) at noised latents with their maps. The advantage (B,) is not used: the map is."""
        assert noised.map is not None
        known = ~noised.map.flatten(1).isnan().any(1)
        M = noised.map.nan_to_num(0.0).to(noised.x0)
        mean = predict.mean(M[known]).clamp(min=1e-6) if self.normalize else 1.0
        v_ref = predict.reference(noised) if self.kl > 0 else None
        v = predict(noised)
        wrong = (v.float() - noised.target).square()
        weighted = (over_latents(M, wrong) * wrong).flatten(1).mean(1)
        base = error(v, noised.target)
        values = known * (weighted / mean + self.consistency * base)
        metrics: dict[str, Tensor | float] = {
            "policy_loss": values.detach(),
            "error": base.detach(),
            "map": M.flatten(1).mean(1),
            "known": known.float(),
        }
        loss = Loss(values, metrics)
        return loss if v_ref is None else pulled(loss, self.kl, error(v, v_ref.float()))


def over_latents(M: Tensor, latents: Tensor) -> Tensor:
    """A map (B, h, w) in a shape that multiplies latents: (B, C, h, w), (B, C, F, h, w), or packed (B, h w, C)."""
    if latents.ndim == 3:
        return M.flatten(1)[..., None]
    return M.reshape(len(M), *[1] * (latents.ndim - 3), *M.shape[1:])
