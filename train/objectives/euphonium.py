"""Euphonium, arXiv 2602.04928: Dual-Reward GRPO on rollouts whose noisy steps lean towards a process reward r(x, t).

    x' = mu + std^2 / 2 grad_x r(x, t) / beta + std z                                        (rollout, see samplers/steering)
    A_process = (r(x', t') - mean_group) / std_group,    one for each step,    A = the pictures' advantage
    L = c_outcome PPO(rho, A) + c_process PPO(rho, A_process),    PPO(rho, A) = max(-A rho, -A clip(rho))

rho is the ratio of the laws without the lean, as in the released code: a sample is drawn from another law than p_old, and no
weight corrects for it. The update then pulls the policy towards guided moves that turned out well, which is how guidance is
internalised. r is the first reward of the recipe that scores noisy states (a method `noisy`, as `tiny_latent` has); its weight in
the pictures' reward may be 0. Where r abstains, A_process is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowrl.batch import Loss, Step
from flowrl.train.objectives.base import Needs, Predict, check_positive, pulled
from flowrl.train.objectives.grpo import clipped, divergence, ratio_metrics


@dataclass(frozen=True)
class Euphonium:
    """Options of Euphonium."""

    #: Clip range of the ratio.
    epsilon: float = 1e-4
    #: c_outcome, the weight of the pictures' advantage.
    outcome_weight: float = 1.0
    #: c_process, the weight of each step's own advantage; 0 only guides.
    process_weight: float = 1.0
    #: Lean in rollouts. Without, this is GRPO with dense rewards.
    guide: bool = True
    #: How hard: the KL weight that the tilt belongs to, smaller is stronger. Released: 3.125 with Dance-SDE at 0.25.
    beta: float = 3.125
    #: Part of the denoising steps, counted from the end, that lean. Released: the last quarter.
    last: float = 0.25
    #: Divide the gradient of a sample by its norm.
    normalize: bool = False
    #: Advantages are clipped to this magnitude.
    advantage_clip: float = 5.0
    #: Weight of the pull towards the reference, in velocity space. 0 needs no reference pass.
    kl: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "epsilon", "beta", "advantage_clip")
        check_positive(self, "outcome_weight", "process_weight", "kl", or_zero=True)
        if not 0 < self.last <= 1:
            raise ValueError(f"last={self.last}: a part of the steps, in (0, 1]")

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.kl > 0, affine=True, process=True)

    @property
    def guidance(self) -> dict[str, Any] | None:
        """Options of the lean (`flowrl.samplers.steering.Euphonium`), or None for a plain rollout."""
        return {"beta": self.beta, "last": self.last, "normalize": self.normalize} if self.guide else None

    def loss(self, predict: Predict, step: Step, advantage: Tensor) -> Loss:
        """Loss per sample (B,) at one recorded step. advantage: (B,) fp32, of the pictures."""
        assert step.process is not None
        v_ref = predict.reference(step) if self.kl > 0 else None
        v = predict(step)
        ratio = (step.gaussian(v).log_prob(step.x_next) - step.log_prob).exp()
        A, A_process = (a.clamp(-self.advantage_clip, self.advantage_clip) for a in (advantage, step.process.to(advantage)))
        values = self.outcome_weight * clipped(ratio, A, self.epsilon)
        process = self.process_weight * clipped(ratio, A_process, self.epsilon)
        metrics = ratio_metrics(ratio, (ratio - 1).abs() > self.epsilon, values)
        loss = Loss(values, {**metrics, "process_loss": process.detach()}, penalty=process)
        return loss if v_ref is None else pulled(loss, self.kl, divergence("velocity", step, v, v_ref))
