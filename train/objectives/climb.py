"""What objectives that climb the gradient of a reward share: the loss of a picture, and the chain of steps that leads to it.

The gradient goes back through reward, decoder and denoiser, under guidance through both of its branches: the step is then
guidance_scale times as long, which a gradient clip feels and AdamW does not; training with guidance_scale=1 costs half. Pixels
that the decoder clamps to [0, 1] give no gradient. The advantage is not used: the gradient says where better is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowrl.batch import Loss, Noised, State, Step
from flowrl.samplers.transitions import ODE, Transition
from flowrl.train.objectives.base import Needs, Predict, check_positive, error

Metrics: TypeAlias = dict[str, Tensor | float]


@dataclass(frozen=True)
class Climb:
    """Options of every objective that climbs the gradient of its rewards. L = max(0, cap - r(x0)) + kl |v - v_ref|^2."""

    #: Stop climbing a sample whose weighted reward has reached this: the cheapest guard against hacking. None never stops.
    cap: float | None = None
    #: Weight of the pull towards the reference, in velocity space, where the gradient starts. 0 needs no reference pass.
    kl: float = 0.0
    #: Clips: how many of the frames, drawn anew for each batch, the rewards see. None: all.
    frames: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "kl", or_zero=True)
        if self.frames is not None:
            check_positive(self, "frames")

    @property
    def needs(self) -> Needs:
        return Needs(points="nodes", reference=self.kl > 0, differentiable=True)

    def end(self, predict: Predict, point: Step | Noised, v: Tensor) -> Tensor:
        """(B, ...) fp32 the final latents, or a guess of them, with graph to the velocity v (B, ...) at a point."""
        raise NotImplementedError

    def shortfall(self, r: Tensor) -> Tensor:
        """(B,) what is to be lowered, for weighted rewards r (B,)."""
        return -r if self.cap is None else (self.cap - r).relu()

    def value(self, predict: Predict, point: Step | Noised, v: Tensor) -> tuple[Tensor, Metrics]:
        """(B,) the loss of what the velocity v (B, ...) leads to, with graph, and metrics."""
        r = predict.reward(self.end(predict, point, v), self.frames)
        return self.shortfall(r), self.told(r)

    def told(self, r: Tensor) -> Metrics:
        """Metrics of weighted rewards r (B,)."""
        r = r.detach()
        metrics: Metrics = {"policy_loss": self.shortfall(r), "predicted_reward": r}
        return metrics if self.cap is None else {**metrics, "capped": (r >= self.cap).float()}

    def loss(self, predict: Predict, point: Step | Noised, advantage: Tensor) -> Loss:
        """Loss per sample (B,) at a point from which the gradient goes back. The advantage is not used."""
        v_ref = predict.reference(point) if self.kl > 0 else None
        v = predict(point)
        kl = None if v_ref is None else error(v, v_ref.float())
        values, metrics = self.value(predict, point, v)
        if kl is None:
            return Loss(values, metrics)
        return Loss(values, {**metrics, "kl": kl.detach()}, penalty=self.kl * kl)


def unroll(
    predict: Predict,
    step: Step,
    v: Tensor,
    *,
    transition: Transition | None = None,
    constant: Sequence[bool] = (),
    save: bool = False,
) -> Tensor:
    """(B, ...) fp32 where the sampler leads from a recorded step with velocity v (B, ...), with graph through all steps.

    transition: of the steps, Euler's by default. constant: for each of them, whether its velocity carries no gradient. save: keep
    the states only, and compute each velocity once more in the backward pass. The last step goes to t = 0 (diffusion models' own
    grids end at the first noise level, a little before).
    """
    grid, rule = [*predict.grid[:-1], 0.0], transition or ODE()
    x = step.x
    for i in range(step.index, len(grid) - 1):
        fixed = bool(constant) and constant[i - step.index]
        if i > step.index:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not fixed):
                v = velocity(predict, x, grid[i], save)
        gaussian = rule.transition(x, v.detach() if fixed else v, grid[i], grid[i + 1], step.t_max)
        x = gaussian.mean if rule.deterministic else gaussian.sample(predict.noise(x))
    return x


def velocity(predict: Predict, x: Tensor, t: float, save: bool = False) -> Tensor:
    """(B, ...) the velocity at states x (B, ...) that carry a graph, at one time. save: compute it once more for the gradient."""
    times = torch.full((len(x),), t, device=x.device)
    if not save:
        return predict(State(x, times))
    return checkpoint(lambda x: predict(State(x, times)), x, use_reentrant=False)
