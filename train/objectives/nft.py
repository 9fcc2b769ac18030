"""DiffusionNFT, arXiv 2509.16117, eq. 7: forward-process RL between an implicit positive and an implicit negative policy.

    v+ = (1 - beta) v_old + beta v,    v- = (1 + beta) v_old - beta v,    x0+- = x_t - t v+-,    r = 1/2 + A / (2 A_max)
    L  = A_max / beta (r |x0+ - x0|^2 / w+  +  (1 - r) |x0- - x0|^2 / w-)  +  kl |v - v_ref|^2,    w = mean |x0+- - x0|

With w+ = w- = w, d = v - v_old and e = target - v_old this is  A_max beta t^2 / w |d|^2 - 2 A t^2 / w <e, d> + const:
advantage-weighted regression with a trust region of strength beta, whose minimum d = A e / (A_max beta) is finite for negative
advantages too. That is the paper's loss, which is in v (`weight: velocity`, w = t^2). The released code divides each branch by
its own w (`branch`), which leaves the gradient at v = v_old as it is, but makes |x0+- - x0|^2 / w a distance rather than its
square: of one sample, the minimum is then d = e / beta or -e / beta by the sign of A, however small A is. `old` takes w from
v_old for both: evened out over samples and times as released, with the paper's minimum (derived; checked in the tests).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from flowrl.batch import Loss, Noised
from flowrl.samplers.flow import x0_from
from flowrl.train.objectives.base import Needs, Predict, check_choice, check_positive, error

#: What an advantage (B,) counts as, by the name that a recipe uses.
SIGNALS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda A: A,
    "positive": lambda A: A.clamp(min=0),
    "negative": lambda A: A.clamp(max=0),
    "binary": lambda A: A.sign(),
}
#: w (B,) from v_old's error of x0 (B, ...) and t (B,); None leaves it to each branch.
WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {
    "branch": lambda error_old, t: None,
    "old": lambda error_old, t: size(error_old),
    "velocity": lambda error_old, t: t.double() ** 2,
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
    #: w. branch: each branch's own mean absolute error. old: that of v_old for both. velocity: t^2, so that the errors are of v.
    weight: Literal["branch", "old", "velocity"] = "branch"

    def __post_init__(self) -> None:
        check_positive(self, "beta", "advantage_clip")
        check_positive(self, "kl", or_zero=True)
        check_choice(self, "signal", "weight")

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
        w = WEIGHTS[self.weight](x0_from(x, v_old, t) - x0, t)
        positive = weighted_error(x0_from(x, (1 - self.beta) * v_old + self.beta * v.float(), t), x0, w)
        negative = weighted_error(x0_from(x, (1 + self.beta) * v_old - self.beta * v.float(), t), x0, w)
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


def size(difference: Tensor) -> Tensor:
    """(B,) fp64, mean |difference|, a constant."""
    return difference.detach().double().abs().flatten(1).mean(1)


def weighted_error(estimate: Tensor, truth: Tensor, w: Tensor | None = None) -> Tensor:
    """(B,) fp32, mean (estimate - truth)^2 / w, in fp64, as released. w: (B,), at least 1e-5; their own size by default."""
    difference = (estimate - truth).double()
    w = size(difference) if w is None else w
    return (difference.square().flatten(1).mean(1) / w.clamp(min=1e-5)).float()
