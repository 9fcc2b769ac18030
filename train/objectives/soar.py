"""SOAR (Tencent-Hunyuan/HY-SOAR): supervised training that also corrects the policy where its own steps take it.

    base        |v(x_t, t) - (noise - x0)|^2
    one step    z = x_t + (s1 - t) sg v(x_t, t),    s1 = max(t - 1/K, 0)
    and back    s' ~ U[s1, 1],   z' = (1 - a) z + a noise,   a = (s' - s1) / (1 - s1),    the same noise
    correction  |v(z', s') - (z' - x0) / s'|^2
    L = (base + lambda sum corrections) / (1 + lambda n)

z' lies off the straight path by what the step got wrong, and its target leads back to x0; where the step is right it is the
path's own velocity. But of the exact flow, too, z' knows of x0 no more than x_t did, so that the correction wants less of the
picture than the flow has at s': of a Gaussian at t = 3/4 .63 of it with K = 8, .89 with K = 40 (derived; `tests/test_soar.py`).
What it mends has to be worth that; K need not be the sampler's number of steps. The release takes that step with guidance 4.5;
here it is that of the velocity that is trained (guidance 1 in training), which the base term has computed already. s' is at
least 0.02: the release divides by any. No reward, no pairs, no reference. Of data, all pictures but the losers of pairs; of the
policy's own samples, the best of each group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.batch import Loss, Noised, Samples, State
from flowrl.samplers.flow import expand
from flowrl.train.objectives.base import Needs, Predict, check_positive, error
from flowrl.train.objectives.sft import SFT

SMALLEST = 0.02  #: Of s'.


@dataclass(frozen=True)
class SOAR:
    """Options of SOAR."""

    #: Corrections for each time; 6 in the release. Each is a pass with gradient.
    corrections: int = 1
    #: lambda: weight of a correction against the base term.
    weight: float = 1.0
    #: K: the step that is corrected is 1/K long.
    steps: int = 40

    def __post_init__(self) -> None:
        check_positive(self, "steps")
        check_positive(self, "corrections", "weight", or_zero=True)

    @property
    def needs(self) -> Needs:
        return Needs(points="noised")

    def choose(self, samples: Samples, advantage: Tensor) -> tuple[Tensor, Tensor]:
        return SFT().choose(samples, advantage)

    def loss(self, predict: Predict, noised: Noised, advantage: Tensor) -> Loss:
        """Loss per sample (B,) at noised latents. advantage: (B,) fp32, the weights of the pictures."""
        v = predict(noised)
        base = error(v, noised.target)
        off, corrections = torch.zeros_like(base), []
        for _ in range(self.corrections):
            u = torch.special.ndtr(predict.noise(noised.t[:, None])[:, 0])
            state, target = self.correction(noised, v.detach().float(), u)
            corrections.append(error(predict(state), target))
            off = off + error(target, noised.target) / self.corrections
        values = (base + self.weight * sum(corrections)) / (1 + self.weight * self.corrections)
        metrics: dict[str, Tensor | float] = {"policy_loss": values.detach(), "error": base.detach()}
        if corrections:
            metrics["correction"] = torch.stack(corrections).detach().mean(0)
            metrics["off_path"] = off
        return Loss(advantage * values, metrics)

    def correction(self, noised: Noised, v: Tensor, u: Tensor) -> tuple[State, Tensor]:
        """Where a correction is asked, and its target. v: (B, ...) at the noised latents. u: (B,) uniform in [0, 1], draws s'."""
        s1 = (noised.t - 1 / self.steps).clamp(min=0)
        z = noised.x + expand(s1 - noised.t, v) * v
        s = (s1 + (1 - s1) * u).clamp(min=SMALLEST, max=1)
        a = expand((s - s1) / (1 - s1), v)
        z = (1 - a) * z + a * noised.noise
        return State(z, s), (z - noised.x0) / expand(s, v)
