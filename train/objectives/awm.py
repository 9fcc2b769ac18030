"""AWM, advantage weighted matching, arXiv 2509.25050: policy gradient with the flow-matching loss as log-likelihood.

    lp  = -W(m, t),    m = mean (v - (eps - x0))^2
    rho = exp(lp - lp_old)
    L   = max(-A rho, -A clip(rho, 1 - epsilon, 1 + epsilon)) + beta |v - v_ref|^2 + old_beta |v - v_old|^2

lp_old is, as released, that of the first of several passes over the same noise; there is one pass, so rho is 1 and the gradient
that of -A lp. In this loop every noise is fresh, also where a rollout serves several updates, so the same holds (`ratio: own`).
`ratio: old` is ours: lp of the slow copy that drew the samples, under the same noise.
With W = w m and d = v - v_old, e = target - v_old, this is  A w |d|^2 - 2 A w <e, d> + const:  the pull of NFT, but where A < 0
the curvature is negative, so that nothing but the two KL terms ends the flight from a bad sample (derived).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowrl.batch import Loss, Noised
from flowrl.train.objectives.base import Needs, Predict, check_choice, check_positive, error

TINY = 1e-10  #: Keeps the slope of a root finite at 0.
POWER = 0.25  #: Of ghuber.

#: W(m, t), (B,), of mean-square errors m and times t, both (B,), by the name that a recipe uses.
WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "uniform": lambda m, t: m,
    "t": lambda m, t: t * m,
    "t2": lambda m, t: t**2 * m,
    "huber": lambda m, t: t * ((m + TINY).sqrt() - TINY**0.5),
    "ghuber": lambda m, t: t / POWER * ((m + TINY) ** POWER - TINY**POWER),
}


@dataclass(frozen=True)
class AWM:
    """Options of AWM. Samples by the ODE, from the slow copy `old` where one is kept."""

    #: How an error counts: as it is, times t, or times t^2 (the error of x0); huber and ghuber are t times its powers 1/2 and
    #: 1/4, whose slope evens out which samples are hard to predict.
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber"
    #: own: the ratio is 1 and the gradient is that of -A lp. old: the ratio to the slow copy, which `epsilon` clips.
    ratio: Literal["own", "old"] = "own"
    #: Clip range of the ratio.
    epsilon: float = 1.0
    #: Advantages are clipped to this magnitude ...
    advantage_clip: float = 5.0
    #: ... and rescaled, so that the largest is this.
    advantage_max: float = 1.0
    #: Weight of the pull towards the reference, in velocity space. 0 needs no reference pass; 1e-4 to 3e-3 in use.
    beta: float = 1e-3
    #: Weight of the pull towards the slow copy, the trust region. 0 keeps no copy.
    old_beta: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "epsilon", "advantage_clip", "advantage_max")
        check_positive(self, "beta", "old_beta", or_zero=True)
        check_choice(self, "weighting", "ratio")

    @property
    def needs(self) -> Needs:
        old = self.old_beta > 0 or self.ratio == "old"
        return Needs(points="noised", old=old, reference=self.beta > 0, affine=self.ratio == "own")

    def loss(self, predict: Predict, noised: Noised, advantage: Tensor) -> Loss:
        """Loss per sample (B,) at noised final latents. advantage: (B,) fp32."""
        t, target, W = noised.t, noised.target, WEIGHTINGS[self.weighting]
        v_ref = predict.reference(noised) if self.beta > 0 else None
        v_old = predict.old(noised) if self.needs.old else None
        v = predict(noised)
        A = advantage.clamp(-self.advantage_clip, self.advantage_clip) / self.advantage_clip * self.advantage_max
        lp = -W(error(v, target), t)
        lp_old = -W(error(v_old, target), t) if self.ratio == "old" and v_old is not None else lp.detach()
        ratio = (lp - lp_old).exp()
        values = torch.maximum(-A * ratio, -A * ratio.clamp(1 - self.epsilon, 1 + self.epsilon))
        metrics: dict[str, Tensor | float] = {
            "policy_loss": values.detach(),
            "ratio": ratio.detach(),
            "clip_ratio": ((ratio - 1).abs() > self.epsilon).float().detach(),
            "error": error(v.detach(), target),
        }
        penalty = torch.zeros_like(values)
        if v_ref is not None:
            kl = error(v, v_ref.float())
            penalty, metrics["kl"] = penalty + self.beta * kl, kl.detach()
        if v_old is not None:
            old_kl = error(v, v_old.float())
            penalty, metrics["old_deviation"] = penalty + self.old_beta * old_kl, old_kl.detach()
        return Loss(values, metrics, penalty)
