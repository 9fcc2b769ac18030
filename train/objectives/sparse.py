"""Sparse straight-through gradients (FlowBP, arXiv 2606.11075) and DRTune (arXiv 2405.00760): some steps, no chain.

    x_n = x_0 - sum_i (t_i - t_{i+1}) v_i  by the ODE, without gradient;        G = d max(0, cap - r(x_n)) / d x_n
    grad L = sum_{i in kept} -(t_i - t_{next(i)}) <G, grad v_theta(sg(x_i))>

Every kept node (`steps: {name: spread, size: K}`) stands for the steps up to the next one, and its input is a constant, so x_n is
linear in the kept velocities. The reward is taken at the real picture, once for a batch, and each node then goes back through one
call of the denoiser by itself: memory does not grow with K (derived; equal to the joint backward, checked in the tests). With all
nodes kept it is what full backpropagation gives where the velocity does not depend on x. DRTune is `stands_for: itself` and
`picture: guess`: a kept step counts for itself alone, and the picture is the guess from the last kept one, the early stop.
The released suite's late bias and rescaling are not reproduced (`steps.low` starts later; AdamW does not feel the scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowrl.batch import Loss, Noised, Step
from flowrl.samplers.flow import x0_from
from flowrl.train.objectives.base import Predict, check_choice
from flowrl.train.objectives.climb import Climb, Metrics


@dataclass(frozen=True)
class Sparse(Climb):
    """Options of sparse gradients. Samples by the ODE; `steps` names the nodes, spread."""

    #: The picture whose reward is climbed: the rollout's own, or the guess from the last of the nodes (DRTune).
    picture: Literal["real", "guess"] = "real"
    #: What a node's velocity counts for: the steps up to the next node, or its own step alone (DRTune; the last: all the rest).
    stands_for: Literal["next", "itself"] = "next"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "picture", "stands_for")

    def loss(self, predict: Predict, point: Step | Noised, advantage: Tensor) -> Loss:
        """One node's part of the linear loss, per sample (B,), times the number of nodes, since the loop takes their mean."""
        predict.once("gradient", lambda: self.gradient(predict))  # before the denoiser's graph takes its memory
        return super().loss(predict, point, advantage)

    def value(self, predict: Predict, point: Step | Noised, v: Tensor) -> tuple[Tensor, Metrics]:
        assert isinstance(point, Step)
        G, r = predict.once("gradient", lambda: self.gradient(predict))
        part = -self.span(predict, point) * (G * v.float()).flatten(1).sum(1)
        return len(predict.steps) * part, self.told(r)

    def gradient(self, predict: Predict) -> tuple[Tensor, Tensor]:
        """(B, ...) the gradient of the loss at the picture's latents, and the weighted rewards there (B,), without graph."""
        last = predict.steps[-1]
        with torch.no_grad():
            x0 = predict.final if self.picture == "real" else x0_from(last.x, predict(last), last.t)
        x0 = x0.detach().requires_grad_()
        r = predict.reward(x0, self.frames)
        return torch.autograd.grad(self.shortfall(r).sum(), x0)[0], r.detach()

    def span(self, predict: Predict, step: Step) -> float:
        """How much time the velocity at a node counts for."""
        if self.stands_for == "itself" and step is not predict.steps[-1]:
            return step.t - step.t_next
        later = [node.t for node in predict.steps if node.index > step.index]
        return step.t - max(later, default=0.0)
