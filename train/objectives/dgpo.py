"""DGPO, direct group preference optimisation, arXiv 2510.08425: DPO between the good and the bad part of a group, without pairs.

    m_i = mean (v - (eps_i - x0_i))^2 of sample i, at one time for the group,    m_ref,i of the reference
    s   = beta / G sum_i A_i (m_i - m_ref,i)
    L   = -log sigma(-s) / beta  +  kl |v - v_ref|^2,    so that    grad L = sigma(s) / G sum_i A_i grad m_i

The released code has the gradient as its loss, sigma(s) A_i m_i with sigma(s) a constant; this is the scalar that belongs to it
(derived: equal gradients, and a value that falls, from ln 2 / beta). A group that already prefers what it should has s < 0 and
stops to teach at about s = -3: beta sets how far that is, in units of mean-square error, and not how long a step is.
The reference is what `reference_weights` names: `base`, or `ema` or `old` to let the margin follow the policy.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import softplus

from flowrl.batch import Loss, Noised
from flowrl.train.objectives.base import Needs, Predict, by_group, check_positive, error


@dataclass(frozen=True)
class DGPO:
    """Options of DGPO. Samples by the ODE."""

    #: Sharpness: a group is learnt when its margin is about 3 / beta, in mean-square error. 10 to 5000 in use, by model.
    beta: float = 100.0
    #: Weight of the pull towards the reference, in velocity space.
    kl: float = 1e-3
    #: Advantages are clipped to this magnitude.
    advantage_clip: float = 5.0
    #: All samples of a group get the same noise, and not only the same time: their errors then differ by the pictures alone.
    shared_noise: bool = True
    #: A sample whose exp(m_old - m) has left 1 +- epsilon in the direction of its advantage has no gradient; 0.05 as released.
    #: Keeps a slow copy `old`, which then also samples. 0 does neither.
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "beta", "advantage_clip")
        check_positive(self, "kl", "epsilon", or_zero=True)

    @property
    def needs(self) -> Needs:
        return Needs(points="noised", unit="group", shared_noise=self.shared_noise, reference=True, old=self.epsilon > 0)

    def loss(self, predict: Predict, noised: Noised, advantage: Tensor) -> Loss:
        """Loss per group (n,) at noised final latents of whole groups. advantage: (B,) fp32."""
        target = noised.target
        v_ref = predict.reference(noised)
        v_old = predict.old(noised) if self.epsilon > 0 else None
        v = predict(noised)
        A = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        m = error(v, target)
        metrics: dict[str, Tensor | float] = {"error": m.detach()}
        if v_old is not None:
            ratio = (error(v_old, target) - m.detach()).exp()
            far = ((A > 0) & (ratio > 1 + self.epsilon)) | ((A <= 0) & (ratio < 1 - self.epsilon))
            m = m.detach().where(far, m)
            metrics["clip_ratio"] = far.float()
        s = self.beta * by_group(A * (m - error(v_ref, target)), noised).mean(1)
        values = softplus(s) / self.beta
        kl = error(v, v_ref.float())
        metrics |= {"policy_loss": values.detach(), "group_weight": s.detach().sigmoid(), "kl": kl.detach()}
        return Loss(values, metrics, penalty=self.kl * by_group(kl, noised).mean(1))
