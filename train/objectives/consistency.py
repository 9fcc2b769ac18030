"""T2V-Turbo, arXiv 2405.18750: consistency distillation of few-step sampling, with rewards on the one-step picture.

    x_s = x_t - (t - s) v_ref(x_t),    f(x, t) = x - t v(x, t)
    L   = d(f_theta(x_t, t), sg f_old(x_s, s)) + max(0, cap - r(f_theta(x_t, t)))

with s the next time of the sampler's grid and d the pseudo-Huber distance, mean sqrt(e^2 + c^2) - c, of latent consistency models
(arXiv 2310.04378). The teacher is the reference, one Euler step of it, guided if `teacher_guidance` says so; the target is the
slow copy. x_t are the policy's own samples, noised again. Weights are the recipe's (the paper's: 1 for pictures, 2 for
clips); of clips, rewards see a few random frames, `frames`. The paper draws the teacher's guidance from [5, 15] and tells the
student; here it is one number. Its equations are DDIM's, these the flow's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowrl.batch import Noised, State, Step
from flowrl.samplers.flow import expand, x0_from
from flowrl.train.objectives.base import Needs, Predict, check_choice, check_positive
from flowrl.train.objectives.climb import Climb, Metrics


@dataclass(frozen=True)
class Consistency(Climb):
    """Options of consistency distillation with rewards. Samples by the ODE; `times` says where they are noised: grid."""

    #: Where the distance turns from square to absolute.
    c: float = 1e-3
    #: Guidance of the teacher, which the student learns to do without. None: as the recipe samples.
    teacher_guidance: float | None = None
    #: Whose guess is aimed at: the slow copy's (which then also samples), or the policy's own, without gradient.
    target: Literal["old", "policy"] = "old"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "c")
        check_choice(self, "target")
        if self.teacher_guidance is not None:
            check_positive(self, "teacher_guidance")

    @property
    def needs(self) -> Needs:
        return Needs(points="noised", reference=True, old=self.target == "old", differentiable=True)

    def value(self, predict: Predict, point: Step | Noised, v: Tensor) -> tuple[Tensor, Metrics]:
        assert isinstance(point, Noised)
        x, t = point.x, point.t
        s = following(predict.grid, t)
        teacher = {} if self.teacher_guidance is None else {"guidance_scale": self.teacher_guidance}
        v_ref = predict.reference(point, **teacher)
        x_s = x - expand(t - s, x) * v_ref.float()
        at = State(x_s, s.clamp(min=1e-3))
        with torch.no_grad():
            goal = x0_from(x_s, predict.old(at) if self.target == "old" else predict(at), s)
        x0_hat = x0_from(x, v, t)
        distance = (((x0_hat - goal).square() + self.c**2).sqrt() - self.c).flatten(1).mean(1)
        r = predict.reward(x0_hat, self.frames)
        return distance + self.shortfall(r), {**self.told(r), "consistency_loss": distance.detach()}


def following(grid: Sequence[float], t: Tensor) -> Tensor:
    """(B,) the time of the grid after each t (B,), and 0 after the last one."""
    lower = torch.tensor([*grid[:-1], 0.0], device=t.device)
    return torch.where(lower < t[:, None] - 1e-6, lower, 0.0).amax(1)
