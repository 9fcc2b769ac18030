"""Flow-DPPO, arXiv 2606.11025: Flow-GRPO with a trust region in the divergence of a step, in place of the clipped ratio.

    rho = p_theta(x'|x) / p_old(x'|x),    m = KL(p_theta || p_old) = |mu_theta - mu_old|^2 / (2 s^2)
    L   = -A rho M  +  beta |v - v_ref|^2,    M = 0 where m >= delta and A (rho - 1) > 0, else 1

with means over latents. The ratio of one sample says little of how far the policy has moved: it is noise around 1 whose size is
sqrt(2 m / D). The divergence says it exactly, and per state. As with the clip, what leads back keeps its gradient. (From notes on
two implementations; the paper itself was not read.)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowrl.batch import Loss, Step
from flowrl.train.objectives.base import Needs, Predict, check_positive, pulled
from flowrl.train.objectives.grpo import divergence, ratio_metrics


@dataclass(frozen=True)
class FlowDPPO:
    """Options of Flow-DPPO."""

    #: Largest divergence of a step from the policy that sampled, as a mean over latents.
    delta: float = 1e-5
    #: Advantages are clipped to this magnitude.
    advantage_clip: float = 5.0
    #: Weight of the pull towards the reference, in velocity space. 0 needs no reference pass.
    beta: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "delta", "advantage_clip")
        check_positive(self, "beta", or_zero=True)

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.beta > 0, sampled_velocity=True, affine=True)

    def loss(self, predict: Predict, step: Step, advantage: Tensor) -> Loss:
        """Loss per sample (B,) at one recorded step. advantage: (B,) fp32."""
        v_ref = predict.reference(step) if self.beta > 0 else None
        v = predict(step)
        m = divergence("exact", step, v.detach(), step.sampled_velocity)
        ratio = (step.gaussian(v).log_prob(step.x_next) - step.log_prob).exp()
        A = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        left = (m >= self.delta) & (A * (ratio - 1) > 0)
        values = -A * ratio * ~left
        loss = Loss(values, {**ratio_metrics(ratio, left, values), "divergence": m})
        return loss if v_ref is None else pulled(loss, self.beta, divergence("velocity", step, v, v_ref))
