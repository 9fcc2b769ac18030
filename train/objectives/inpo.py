"""DDIM-InPO, arXiv 2503.18454: DPO where each picture is noised by its own inversion, and not by fresh noise.

    x_0 = x0,   dx = v_theta(x, s) ds from 0 to t,    noise = (x_t - (1 - t) x0) / t,    then DPO at (x_t, t) with this noise

The paper inverts by DDIM; this is the same in flow coordinates (derived): noise = x0 + the mean velocity of the way from x0 to
x_t, so the target that winners are pulled to is that mean velocity, and nothing is divided by a small t. Winner and loser have
noises of their own. The inversion follows the current policy, without graph, and costs `inversion_steps` passes for each time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowrl.batch import Loss, Noised, State
from flowrl.samplers.flow import expand
from flowrl.train.objectives.base import Needs, Predict, check_positive
from flowrl.train.objectives.dpo import DPO


@dataclass(frozen=True)
class InPO(DPO):
    """Options of DPO, and of the inversion."""

    #: Euler steps from the picture up to the time that is trained. 10 in the paper.
    inversion_steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "inversion_steps")

    @property
    def needs(self) -> Needs:
        return Needs(points="noised", unit="pair", reference=True)

    def loss(self, predict: Predict, noised: Noised, advantage: Tensor) -> Loss:
        """Loss per pair (B / 2,) at the inverted latents; the noise it is handed is not used. advantage: (B,) fp32."""
        return super().loss(predict, inverted(predict, noised, self.inversion_steps), advantage)


@torch.no_grad()
def inverted(predict: Predict, noised: Noised, steps: int) -> Noised:
    """The same latents and times with the noise that the policy itself came from."""
    x, t = noised.x0, noised.t
    total = torch.zeros_like(x)
    for k in range(steps):
        v = predict(State(x, (t * k / steps).clamp(min=1e-3))).float()
        x = x + expand(t / steps, x) * v
        total = total + v
    return replace(noised, noise=noised.x0 + total / steps)
