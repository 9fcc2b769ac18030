"""DiffusionNFT, arXiv 2509.16117, eq. 7: forward-process RL between an implicit positive and an implicit negative policy.

    v+ = (1 - beta) v_old + beta v,    v- = (1 + beta) v_old - beta v,    x0+- = x_t - t v+-,    r = 1/2 + A / (2 A_max)
    L  = A_max / beta (r |x0+ - x0|^2 / w+  +  (1 - r) |x0- - x0|^2 / w-)  +  kl |v - v_ref|^2,    w = mean |x0+- - x0|

With w+ = w- = w, d = v - v_old and e = target - v_old this is  A_max beta t^2 / w |d|^2 - 2 A t^2 / w <e, d> + const:
advantage-weighted regression with a trust region of strength beta, whose minimum d = A e / (A_max beta) is finite for negative
advantages too (derived; checked in the tests). The paper writes the loss in v and without w; w is the released code's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from flowrl.batch import Loss, Noised
from flowrl.samplers.flow import x0_from
from flowrl.train.objectives.base import Needs, Predict, check_choice, check_positive, error

#: What an advantage (B,) counts as, by the name that a recipe uses.
SIGNALS = {
    "all": lambda A: A,
    "positive": lambda A: A.clamp(min=0),
    "negative": lambda A: A.clamp(max=0),
    "binary": lambda A: A.sign(),
}


@dataclass(frozen=True)
class NFT:
    """Options of DiffusionNFT. Samples by the ODE from the slow copy `old`, without guidance."""

    #: Trust region: smaller means larger steps. 1 for most rewards, 0.1 for text rendering or many rewards.
    beta: float = 1.0
    #: Weight of the pull towards the reference, in velocity space. 0 needs no reference pass.
    kl: float = 1e-4
    #: Advantages are clipped to this magnitude, at which r is 0 or 1.
    advantage_clip: float = 5.0
    #: positive, negative: advantages of the other sign count as 0, which still holds v to v_old. binary: as 1 and -1.
    signal: Literal["all", "positive", "negative", "binary"] = "all"

    def __post_init__(self) -> None:
        check_positive(self, "beta", "advantage_clip")
        check_positive(self, "kl", or_zero=True)
        check_choice(self, "signal")

    @property
    def needs(self) -> Needs:
        return Needs(points="noised", old=True, reference=self.kl > 0, affine=self.signal == "all")

    def loss(self, predict: Predict, noised: Noised, advantage: Tensor) -> Loss:
        """Loss per sample (B,) at noised final latents. advantage: (B,) fp32."""
        x, x0, t = noised.x, noised.x0, noised.t
        v_ref = predict.reference(noised) if self.kl > 0 else None
        v_old = predict.old(noised).float()
        v = predict(noised)
        A = SIGNALS[self.signal](advantage).clamp(-self.advantage_clip, self.advantage_clip)
        r = 0.5 + A / (2 * self.advantage_clip)
        positive = weighted_error(x0_from(x, (1 - self.beta) * v_old + self.beta * v.float(), t), x0)
        negative = weighted_error(x0_from(x, (1 + self.beta) * v_old - self.beta * v.float(), t), x0)
        values = self.advantage_clip / self.beta * (r * positive + (1 - r) * negative)
        metrics: dict[str, Tensor | float] = {
            "policy_loss": values.detach(),
            "old_deviation": error(v.detach(), v_old),
            "error": error(v.detach(), noised.target),
        }
        if v_ref is None:
            return Loss(values, metrics)
        kl = error(v, v_ref.float())
        metrics["kl"] = kl.detach()
        return Loss(values, metrics, penalty=self.kl * kl)


def weighted_error(estimate: Tensor, truth: Tensor) -> Tensor:
    """(B,) fp32, mean (estimate - truth)^2 / w, w = mean |estimate - truth| a constant of at least 1e-5; in fp64, as released."""
    difference = (estimate - truth).double().flatten(1)
    w = difference.detach().abs().mean(1).clamp(min=1e-5)
    return (difference.square().mean(1) / w).float()
