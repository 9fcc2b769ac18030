"""CRD, centred reward distillation, arXiv 2603.14128: the policy's implicit reward is fitted to the reward, inside each prompt.

    R_i = |v_old - v*|^2 / w_old - |v - v*|^2 / w,    v* = eps_i - x0_i,    w = mean |v - v*| a constant
    L   = A_max / beta (beta (R_i - <R>) - (r_i - <r>))^2  +  kl |v - v_ref|^2,    r = 1/2 + A / (2 A_max)

The optimum of a KL-regularised reward has log p / p_old = r / beta - log Z(prompt): centring, <.> over the samples of the prompt,
takes the unknown Z away. At v = v_old the gradient is that of A |v - v*|^2 / w, NFT's without one factor t (derived; checked in
the tests). With `centre: softmax`, <.> leans to the best samples by weights softmax(r / temperature), then to the worst by
softmax(-r / temperature), and L is the mean of both. A released version centres over whatever lies in the batch, here it is
the prompt, as in the paper. That version keeps three sets of weights, of which the slowest samples and the other is R's; here
`old` does both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowrl.batch import Loss, Noised
from flowrl.train.objectives.base import Needs, Predict, by_group, check_choice, check_positive, error
from flowrl.train.objectives.nft import weighted_error

SLACK = 1e-4  #: The least pull of `adaptive_kl`.

#: Weights of a group's mean, (k, n, G) of r (n, G) over a temperature: k means, and the loss is averaged over them.
CENTRES: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda r: torch.full_like(r, 1 / r.shape[1])[None],
    "softmax": lambda r: torch.stack([r.softmax(1), (-r).softmax(1)]),
}


@dataclass(frozen=True)
class CRD:
    """Options of CRD. Samples by the ODE from the slow copy `old`, without guidance."""

    #: How strongly the fit is regularised: the implicit reward aims at r / beta, so smaller means larger steps.
    beta: float = 1.0
    #: Weight of the pull towards the reference, in velocity space. 0 needs no reference pass.
    kl: float = 0.1
    #: The pull on a sample is from 1e-4 (r = 0) to `kl` (r = 1): good ones are held where the reference is, bad ones let go.
    adaptive_kl: bool = False
    #: Guidance of the reference in that pull: the policy, which samples without, then learns to look as if it were guided. 4.5 in
    #: the paper. A second call of the denoiser; unset, the reference is called as the policy is.
    kl_guidance: float | None = None
    #: Advantages are clipped to this magnitude, at which r is 0 or 1.
    advantage_clip: float = 5.0
    #: Around which mean of the group both rewards are centred.
    centre: Literal["uniform", "softmax"] = "uniform"
    #: Of softmax, in units of r, which lies in [0, 1].
    temperature: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, "beta", "advantage_clip", "temperature")
        check_positive(self, "kl", or_zero=True)
        check_choice(self, "centre")

    @property
    def needs(self) -> Needs:
        return Needs(points="noised", unit="group", old=True, reference=self.kl > 0)

    def loss(self, predict: Predict, noised: Noised, advantage: Tensor) -> Loss:
        """Loss per sample (B,) at noised final latents of whole groups. advantage: (B,) fp32."""
        target = noised.target
        guided = {} if self.kl_guidance is None else {"guidance_scale": self.kl_guidance}
        v_ref = predict.reference(noised, **guided) if self.kl > 0 else None
        v_old = predict.old(noised).float()
        v = predict(noised)
        A = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        r = by_group(0.5 + A / (2 * self.advantage_clip), noised)
        R = by_group(weighted_error(v_old, target) - weighted_error(v.float(), target), noised)
        weights = CENTRES[self.centre](r / self.temperature)
        gap = self.beta * centred(R, weights) - centred(r, weights)
        values = self.advantage_clip / self.beta * gap.square().mean(0).flatten()
        metrics: dict[str, Tensor | float] = {
            "policy_loss": values.detach(),
            "implicit_reward": R.detach().flatten(),
            "old_deviation": error(v.detach(), v_old),
            "error": error(v.detach(), target),
        }
        if v_ref is None:
            return Loss(values, metrics)
        kl = error(v, v_ref.float())
        metrics["kl"] = kl.detach()
        held = SLACK + r.flatten() * (self.kl - SLACK) if self.adaptive_kl else self.kl
        return Loss(values, metrics, penalty=held * kl)


def centred(values: Tensor, weights: Tensor) -> Tensor:
    """(k, n, G) values (n, G) less each of their k weighted means, which are constants."""
    return values - (weights * values).sum(2, keepdim=True).detach()
