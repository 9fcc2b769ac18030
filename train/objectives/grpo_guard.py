"""GRPO-Guard, arXiv 2510.22319: Flow-GRPO with a ratio that is centred at 1 and of one scale at all steps.

    d = mu_theta - mu_old,    z = (x' - mu_old) / s,    rho = p_theta(x'|x) / p_old(x'|x)
    log rho_n = s (log rho + |d|^2 / (2 s^2)) = <d, z>                                                  (RatioNorm)
    L = max(-A rho_n, -A clip(rho_n, 1 - epsilon, 1 + epsilon)) / h  +  beta |v - v_ref|^2,    h = t - t'

with means over latents. Those give E[rho] = exp(-m (1 - 1/D)) < 1, m = |d|^2 / (2 s^2): good samples hardly ever reach the upper
clip, and steps of little noise use up the range. log rho_n has mean 0 and variance |d|^2 / D. The gradient of L is
-A J z / (D h), J = d mu / d v; for Flow-SDE J / h = -(1 + a^2 / 2) at every step: none dominates.

The bias |d|^2 is each sample's own; a released version averages it over the batch. <d, z> is computed as it stands: in fp32 it
errs by 5e-10, the difference of two log-densities of order 1 by 8e-8 (measured, D = 65,536), of a clip of 2e-6.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowrl.batch import Loss, Step
from flowrl.train.objectives.base import Needs, Predict, check_positive, pulled
from flowrl.train.objectives.grpo import clipped, divergence, ratio_metrics


@dataclass(frozen=True)
class GRPOGuard:
    """Options of GRPO-Guard."""

    #: Clip range of the ratio. 2e-6 for GenEval and OCR, 4e-6 for PickScore.
    epsilon: float = 2e-6
    #: Divide each step's loss by its length h, which makes the gradients of all steps equally long.
    grad_reweight: bool = True
    #: Advantages are clipped to this magnitude.
    advantage_clip: float = 5.0
    #: Weight of the pull towards the reference, in velocity space. 0 needs no reference pass.
    beta: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "epsilon", "advantage_clip")
        check_positive(self, "beta", or_zero=True)

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.beta > 0, sampled_velocity=True, affine=True)

    def loss(self, predict: Predict, step: Step, advantage: Tensor) -> Loss:
        """Loss per sample (B,) at one recorded step. advantage: (B,) fp32."""
        v_ref = predict.reference(step) if self.beta > 0 else None
        v = predict(step)
        old = step.gaussian(step.sampled_velocity)
        d = step.gaussian(v).mean - old.mean
        z = (step.x_next - old.mean) / old.std
        ratio = (d * z).flatten(1).mean(1).exp()
        A = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        values = clipped(ratio, A, self.epsilon)
        if self.grad_reweight:
            values = values / (step.t - step.t_next)
        loss = Loss(values, ratio_metrics(ratio, (ratio - 1).abs() > self.epsilon, values))
        return loss if v_ref is None else pulled(loss, self.beta, divergence("velocity", step, v, v_ref))
