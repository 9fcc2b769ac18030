"""Flow-GRPO, arXiv 2505.05470, eq. 6-10: clipped policy gradient on the stochastic steps of a trajectory.

    rho = p_theta(x'|x) / p_old(x'|x)
    L   = max(-A rho, -A clip(rho, 1 - epsilon, 1 + epsilon)) + beta KL(theta || reference)

log p is a mean over latent dimensions, so rho is the D-th root of the true ratio and useful clips are 1e-6 to 1e-3, not 0.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowrl.batch import Loss, Step
from flowrl.train.objectives.base import Needs, Predict, check_choice, check_positive, pulled


@dataclass(frozen=True)
class GRPO:
    """Options of Flow-GRPO. With a Window schedule it is Flow-GRPO-Fast, with CPS it is Flow-CPS."""

    #: Clip range of the ratio. 1e-4 for Flow-SDE, 1e-5 with log_prob=squared_error, 1e-3 for video.
    epsilon: float = 1e-4
    #: Advantages are clipped to this magnitude.
    advantage_clip: float = 5.0
    #: Weight of the KL to the reference. 0 needs no reference pass; 0.001 to 0.04 holds the model back.
    beta: float = 0.0
    #: velocity: mean (v - v_ref)^2. exact: the Gaussian KL of the step. flow_grpo: that times h, as its code has it.
    kl: Literal["velocity", "exact", "flow_grpo"] = "velocity"
    #: squared_error: -mean (x' - mean)^2, as Flow-CPS' code has it, which scales each step's gradient by 2 std^2.
    log_prob: Literal["gaussian", "squared_error"] = "gaussian"
    #: std: weigh a step by its noise (TempFlow-GRPO, eq. 8), with mean 1 over the trained steps.
    step_weight: Literal["none", "std"] = "none"

    def __post_init__(self) -> None:
        check_positive(self, "epsilon", "advantage_clip")
        check_positive(self, "beta", or_zero=True)
        check_choice(self, "kl", "log_prob", "step_weight")

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.beta > 0, affine=True)

    def loss(self, predict: Predict, step: Step, advantage: Tensor) -> Loss:
        """Loss per sample (B,) at one recorded step. advantage: (B,) fp32."""
        std = step.transition.std(step.t, step.t_next, step.t_max).to(advantage.device)
        v_ref = predict.reference(step) if self.beta > 0 else None
        v = predict(step)
        log_ratio = step.gaussian(v).log_prob(step.x_next) - step.log_prob
        if self.log_prob == "squared_error":
            log_ratio = log_ratio * 2 * std**2
        ratio = log_ratio.exp()
        A = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        values = clipped(ratio, A, self.epsilon)
        if self.step_weight == "std":
            values = values * std / predict.mean_std
        loss = Loss(values, ratio_metrics(ratio, (ratio - 1).abs() > self.epsilon, values))
        return loss if v_ref is None else pulled(loss, self.beta, divergence(self.kl, step, v, v_ref))


def clipped(ratio: Tensor, A: Tensor, epsilon: float) -> Tensor:
    """(B,) PPO's surrogate, the first line of L above: beyond the clip range only what leads back has a gradient."""
    return torch.maximum(-A * ratio, -A * ratio.clamp(1 - epsilon, 1 + epsilon))


def ratio_metrics(ratio: Tensor, outside: Tensor, values: Tensor) -> dict[str, Tensor | float]:
    """What every method with a ratio reports. outside: (B,) bool, the samples beyond the trust region. values: (B,) its loss."""
    return {
        "ratio": ratio.detach(),
        "ratio_deviation": (ratio.detach() - 1).abs(),
        "clip_ratio": outside.float().detach(),
        "policy_loss": values.detach(),
    }


def divergence(kind: str, step: Step, v: Tensor, v_ref: Tensor) -> Tensor:
    """KL of the policy's step to the reference's, (B,) with graph. v, v_ref: (B, ...). Kinds as in `GRPO.kl`."""
    if kind == "velocity":
        return (v.float() - v_ref.float()).square().flatten(1).mean(1)
    kl = step.gaussian(v).kl(step.gaussian(v_ref))
    return kl if kind == "exact" else kl * (step.t - step.t_next)
