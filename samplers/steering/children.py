"""Steering one step at a time: draw M children of a particle, score them, and go on by their weights.

With p(x' | x) = N(mean, std^2) and h(x') = E[exp(lam r(x0)) | x'], the tilted step is p(x' | x) h(x') / h(x). Its mean is
mean + std E[w z], w ~ h(x'), which M draws estimate. h is read off a clean look at each draw (`guidance.LOOKS`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowrl.samplers.steering.guidance import check_look, over, pairs, rewards_of_draws
from flowrl.samplers.steering.loop import (
    Model,
    Outcome,
    advance,
    best,
    check_noisy,
    check_positive,
    check_strength,
    check_times,
    move_of,
    place,
    stochastic,
    strength_of,
)
from flowrl.samplers.steering.tilt import children_weights
from flowrl.samplers.transitions import CPS, Transition


@dataclass(frozen=True)
class Doob:
    """Doob's h-transform by Monte Carlo (DOIT), without gradient.

        mean     x' = mean + std sum_m w_m z_m + std z       noise sqrt(dims sum w^2) in the mean: many draws, few dims
        sample   x' = x'_m with probability w_m              SVDD, arXiv 2408.08252
        best     x' = x'_m of highest reward                 lam without limit

    Costs M decodes and rewards per step and particle, and M denoiser calls with look = child.
    """

    child: Literal["mean", "sample", "best"] = "sample"  #: What becomes of the draws.
    look: Literal["reuse", "child"] = "child"  #: What is scored of a draw: see `guidance.LOOKS`; reuse is free and too strong.
    draws: int = 8  #: M, an even number: draws come in pairs z, -z.
    tilt_strength: float | None = None  #: lam. By default lam r spreads by 1.5 over base samples, drawn first and counted.
    temperature: float | None = None  #: tau of DOIT, 0.3 to 0.7: weights softmax((r - mean) / (std tau)) per state; not lam.
    t_from: float = 0.8  #: Steer from this time: at higher noise the look at a child says little.
    t_to: float = 0.0  #: Steer down to this time.
    particles: int = 1  #: Independent chains, of which the best is returned.
    transition: Transition = CPS(0.8)  #: The noisy step, or its name, or {name: cps, noise_level: 0.7}.

    def __post_init__(self) -> None:
        object.__setattr__(self, "transition", move_of(self.transition))
        check_look(self.look)
        check_positive(particles=self.particles, draws=self.draws)
        check_strength(self.tilt_strength)
        check_times(self.t_from, self.t_to)
        if self.child not in ("mean", "sample", "best"):
            raise ValueError(f"child={self.child!r} is unknown: known are mean, sample, best")
        if self.draws % 2:
            raise ValueError(f"draws={self.draws}: draws come in pairs z, -z; use {self.draws + 1}")
        if self.temperature is not None:
            check_positive(temperature=self.temperature)
        check_noisy(self.transition, gaussian=True)

    def run(self, model: Model) -> Outcome:
        lam = strength_of(model, self.tilt_strength) if self.temperature is None and self.child != "best" else 1.0
        state = model.start(self.particles)
        for i in range(model.steps):
            v = model.velocity(state, i)
            if lam and self.t_to <= model.t[i] <= self.t_from and stochastic(model, i, self.transition):
                state = self.step(model, state, v, i, lam)
            else:
                state = advance(model, state, v, i, self.transition)
        return best(state, model.reward(model.flow(state, model.steps)), strength=lam)

    def step(self, model: Model, state: Tensor, v: Tensor, node: int, lam: float) -> Tensor:
        """Draw the children of each state and go on by their weights."""
        z = pairs(model, state, self.draws)
        r = rewards_of_draws(model, state, v, node, self.transition, z, self.look)
        if self.temperature is not None:
            r = (r - r.mean(2, keepdim=True)) / (r.std(2, keepdim=True).clamp(min=1e-6) * self.temperature)
        w = children_weights(lam * r)
        if self.child == "mean":
            std = self.transition.std(model.t[node], model.t[node + 1], model.t_max)
            return advance(model, state, v, node, self.transition, std * (over(w, z) * z).sum(2))
        if self.child == "sample":
            u = model.draw_uniform(w.shape[1])[:, :, None].to(w.device)
            m = (w.double().cumsum(2) < u).sum(2).clamp(max=self.draws - 1)
        else:
            m = r.argmax(2)
        picked = torch.take_along_dim(z, over(m[:, :, None], z).long(), 2)[:, :, 0]
        return place(model, state, v, node, self.transition, picked)
