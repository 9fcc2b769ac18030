"""A Dense Reward View, arXiv 2402.08265: a listwise DPO loss that emphasises the first steps of the chain.

    z_k = C clip(log p_theta(x'|x_k) - log p_ref(x'|x_k), -d, d)            at one step, of the k-th best sample of a group
    L   = -sum_k log( exp z_k / sum_{j >= k} exp z_j )                      (Plackett-Luce), weighed by gamma^i

i: position of the step in the schedule, 0 the noisiest; the weights have mean 1 over the trained steps. The released code draws
steps with probability gamma^i / sum and averages z over those of an update, one of them with many prompts: this is then the
expectation of its loss. log p is a mean over latents. In a ranking with ties, only strictly worse samples compete with one:
equal ones say nothing of each other, and a group without a difference has loss 0 (the paper has no ties).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.batch import Loss, Step
from flowrl.train.objectives.base import Needs, Predict, by_group, check_positive
from flowrl.train.objectives.d3po import log_ratio_to_reference


@dataclass(frozen=True)
class DenseDPO:
    """Options of the Dense Reward View."""

    #: Temporal discount: a step counts gamma times the one before it. 1 for none; in use: 0.9.
    gamma: float = 0.9
    #: C, the temperature. In use: 10 with one prompt, 12.5 with many.
    scale: float = 12.5
    #: d, beyond which a sample's step has no gradient; 0 does not clip. In use: 1e-4 with one prompt, 5e-4 with many.
    clip: float = 5e-4

    def __post_init__(self) -> None:
        check_positive(self, "gamma", "scale")
        check_positive(self, "clip", or_zero=True)
        if self.gamma > 1:
            raise ValueError(f"gamma={self.gamma}: must lie in (0, 1]")

    @property
    def needs(self) -> Needs:
        return Needs(unit="group", reference=True)

    def loss(self, predict: Predict, step: Step, advantage: Tensor) -> Loss:
        """Loss per group (n,) at one recorded step of whole groups. advantage: (B,) fp32, of which only the order counts."""
        log_ratio = log_ratio_to_reference(predict, step)
        if self.clip > 0:
            log_ratio = log_ratio.clamp(-self.clip, self.clip)
        z, A = by_group(self.scale * log_ratio, step), by_group(advantage, step)
        weights = [self.gamma**other.index for other in predict.steps]
        values = plackett_luce(z, A) * self.gamma**step.index * len(weights) / sum(weights)
        metrics = {
            "policy_loss": values.detach(),
            "implicit_accuracy": order_agreement(z.detach(), A),
            "log_ratio_deviation": log_ratio.detach().abs(),
        }
        return Loss(values, metrics)


def plackett_luce(z: Tensor, A: Tensor) -> Tensor:
    """(n,) -log of the probability of the order that A (n, G) gives, best first, with strengths z (n, G); without the ties."""
    competes = (A[:, None, :] < A[:, :, None]) | torch.eye(A.shape[1], dtype=torch.bool, device=A.device)
    rivals = z[:, None, :].expand_as(competes).masked_fill(~competes, -torch.inf)
    return (rivals.logsumexp(2) - z).sum(1)


def order_agreement(z: Tensor, A: Tensor) -> Tensor:
    """(n,) share of the pairs of different A (n, G) that z orders alike; equal z count half. 1/2 where no pair differs."""
    ordered = A[:, :, None] > A[:, None, :]
    agree = ((z[:, :, None] - z[:, None, :]).sign() + 1) / 2
    count = ordered.flatten(1).sum(1)
    return torch.where(count > 0, (agree * ordered).flatten(1).sum(1) / count.clamp(min=1), 0.5)
