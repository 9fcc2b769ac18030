"""Guidance: estimates of u = grad_x log h_t(x), each fed to the one `tilt`. They differ in what they differentiate.

    noisy          lam r_phi(x, t), a process reward trained on noisy latents      backward through the process reward
    denoiser       lam r(x0_hat(x))                                                backward through reward, decoder, denoiser
    jacobian_free  steps on x0_hat itself, x_t held fixed                          backward through reward and decoder
    spsa           differences of rewards around x0_hat                            nothing: rewards only
    doob           rewards of the next step's draws, as a score-function estimate  backward through the denoiser only

The plug-in estimates replace log E[exp(lam r(x0)) | x] by lam r(E[x0 | x]), which is too strong: see the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowrl.samplers.flow import eps_from, x0_from
from flowrl.samplers.steering.loop import (
    Model,
    Move,
    Outcome,
    advance,
    best,
    check_positive,
    check_strength,
    check_times,
    move_of,
    stochastic,
    strength_of,
)
from flowrl.samplers.steering.tilt import children_weights, tilt, untilted
from flowrl.samplers.transitions import DDIM, ODE, Transition

Estimate = Callable[["Guidance", Model, Tensor, int, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Guidance:
    """Tilt every velocity by an estimate of u, then step as usual. With several particles, return the best of them."""

    #: What estimates u. Flow-NRG, arXiv 2501.13918, eq. 11: noisy. DPS and universal guidance: denoiser. MPGD and universal
    #: guidance backward: jacobian_free. DOIT: doob.
    estimate: Literal["noisy", "denoiser", "jacobian_free", "spsa", "doob"] = "denoiser"
    tilt_strength: float | None = None  #: lam. By default lam r spreads by 1.5 over base samples, drawn first and counted.
    particles: int = 1  #: Independent guided samples, of which the best is returned.
    t_from: float = 0.95  #: Guidance starts at this time: at t = 1, where the tilt has a pole, x0_hat says nothing.
    t_to: float = 0.0  #: Guidance ends at this time.
    draws: int = 8  #: spsa: pairs of rewards per step. doob: draws of the next step, an even number (z and -z).
    look: Literal["reuse", "child"] = "child"  #: doob: what is scored of a draw; see `LOOKS`.
    radius: float = 0.1  #: spsa: how far from x0_hat rewards are read, per dimension.
    inner: int = 1  #: jacobian_free: steps on x0_hat per denoising step; each costs a decode and a gradient.
    transition: Move = ODE()  #: The step after the tilt, or its name; any noise is right.

    def __post_init__(self) -> None:
        object.__setattr__(self, "transition", move_of(self.transition))
        if self.estimate not in ESTIMATES:
            raise ValueError(f"estimate={self.estimate!r} is unknown: known are {', '.join(ESTIMATES)}")
        check_positive(particles=self.particles, draws=self.draws, radius=self.radius, inner=self.inner)
        check_strength(self.tilt_strength)
        check_times(self.t_from, self.t_to)
        check_look(self.look)
        if self.estimate == "doob" and self.draws % 2:
            raise ValueError(f"draws={self.draws}: doob draws come in pairs z, -z; use {self.draws + 1}")

    def run(self, model: Model) -> Outcome:
        lam = strength_of(model, self.tilt_strength)
        state = model.start(self.particles)
        for i in range(model.steps):
            t = model.t[i]
            if lam and self.t_to <= t <= self.t_from and t < 1:
                v, u = ESTIMATES[self.estimate](self, model, state, i, lam)
                v = tilt(v, t, u)
            else:
                v = model.velocity(state, i)
            state = advance(model, state, v, i, self.transition)
        return best(state, model.reward(model.flow(state, model.steps)), strength=lam)


# ------------------------------------------------------------------------------------------------ estimates of u


def noisy(method: Guidance, model: Model, state: Tensor, node: int, lam: float) -> tuple[Tensor, Tensor]:
    """Flow-NRG: u = lam grad_x r_phi(x, t)."""
    x = model.flow(state, node)
    return model.velocity(state, node), lam * reward_gradient(model, x, lambda m, x: m.noisy_reward(x, model.t[node]))


def denoiser(method: Guidance, model: Model, state: Tensor, node: int, lam: float) -> tuple[Tensor, Tensor]:
    """DPS: u = lam grad_x r(x0_hat(x))."""
    v, _, u = through_denoiser(model, state, node, lam)
    return v, u


def jacobian_free(method: Guidance, model: Model, state: Tensor, node: int, lam: float) -> tuple[Tensor, Tensor]:
    """MPGD, universal guidance backward: ascend on x0_hat by d, and take the u that moves it there.

    The posterior covariance of x0 that the exact tilt would use, t^2 / (1 - t) dx0_hat/dx, is taken to be that of data of
    variance one: t^2 / S with S = (1 - t)^2 + t^2. So d = lam t^2 / S grad r, exact for unit Gaussian data and linear r.
    """
    t = model.t[node]
    v = model.velocity(state, node)
    x0 = x0_from(model.flow(state, node), v, t)
    d = torch.zeros_like(x0)
    for _ in range(method.inner):
        d = d + lam / method.inner * unit_variance(t) * reward_gradient(model, x0 + d, lambda m, x0: m.reward(x0))
    return v, untilted(d, t)


def spsa(method: Guidance, model: Model, state: Tensor, node: int, lam: float) -> tuple[Tensor, Tensor]:
    """The same step on x0_hat from reward values: grad r ~ mean of (r(x0 + s e) - r(x0 - s e)) / (2 s) e, s the radius."""
    t, s = model.t[node], method.radius
    v = model.velocity(state, node)
    x0 = x0_from(model.flow(state, node), v, t)
    g = torch.zeros_like(x0)
    for _ in range(method.draws):
        e = model.draw_noise(x0)
        slope = (model.reward(x0 + s * e) - model.reward(x0 - s * e)) / (2 * s)
        g = g + over(slope, e) * e / method.draws
    return v, untilted(lam * unit_variance(t) * g, t)


def doob(method: Guidance, model: Model, state: Tensor, node: int, lam: float) -> tuple[Tensor, Tensor]:
    """DOIT: with x' = mean(x) + std z of a noisy step, grad_x log E[h(x')] = J^T E[w z] / std, J = d mean / d x, w ~ h(x').

    The reward needs no gradient; J^T is one backward pass through the denoiser. The noisy step of the estimate is ancestral
    (DDIM with eta 1), whatever step is then taken.
    """
    step = DDIM(1.0)
    if not stochastic(model, node, step):
        return model.velocity(state, node), torch.zeros_like(model.flow(state, node))
    z = pairs(model, state, method.draws)
    v, u = [], []
    for part, rows in model.parts(state.shape[1]):
        with torch.enable_grad():
            x = model.flow(state[rows], node).detach().requires_grad_()
            v_part = part.velocity(part.native(x, node), node)
            law = step.transition(x, v_part, model.t[node], model.t[node + 1], model.t_max)
        v.append(v_part.detach())
        w = children_weights(lam * rewards_of_draws(part, state[rows], v[-1], node, step, z[rows], method.look))
        e = (over(w, z[rows]) * z[rows]).sum(2) / law.std
        u.append(torch.autograd.grad(law.mean, x, e)[0])
    model.counts.denoiser_backwards += state.shape[0] * state.shape[1]
    return torch.cat(v), torch.cat(u)


ESTIMATES: dict[str, Estimate] = {
    "noisy": noisy,
    "denoiser": denoiser,
    "jacobian_free": jacobian_free,
    "spsa": spsa,
    "doob": doob,
}


# ------------------------------------------------------------------------------------------------ gradients


def through_denoiser(model: Model, state: Tensor, node: int, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """v, the value lam r(x0_hat(x)) (P, N) and its gradient in x, from one forward and one backward pass."""
    t = model.t[node]

    def value(part: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        v = part.velocity(part.native(x, node), node)
        return v, lam * part.reward(x0_from(x, v, t))

    return differentiate(model, state, node, value)


def differentiate(
    model: Model, state: Tensor, node: int, value: Callable[[Model, Tensor], tuple[Tensor, Tensor]], passes: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """For value(x) = (v, log h (P, N)): v, log h and grad_x log h, without graph. Goes through the prompts in parts.

    passes: how many denoiser calls the gradient goes through.
    """
    out = []
    for part, rows in model.parts(state.shape[1]):
        with torch.enable_grad():
            x = model.flow(state[rows], node).detach().requires_grad_()
            v, log_h = value(part, x)
        out.append((v.detach(), log_h.detach(), gradient(log_h, x)))
    model.counts.denoiser_backwards += state.shape[0] * state.shape[1] * passes
    model.counts.reward_backwards += state.shape[0] * state.shape[1]
    v, log_h, u = (torch.cat(column) for column in zip(*out, strict=True))
    return v, log_h, u


def reward_gradient(model: Model, x: Tensor, reward: Callable[[Model, Tensor], Tensor]) -> Tensor:
    """Gradient of a reward at x, (P, N, ...). Goes through the prompts in parts."""
    out = []
    for part, rows in model.parts(x.shape[1]):
        with torch.enable_grad():
            leaf = x[rows].detach().requires_grad_()
            out.append(gradient(reward(part, leaf), leaf))
    model.counts.reward_backwards += x.shape[0] * x.shape[1]
    return torch.cat(out)


def gradient(values: Tensor, x: Tensor) -> Tensor:
    """d sum(values) / d x, each value depending on its own x. Raises ValueError where the values carry no graph."""
    if not values.requires_grad:
        raise ValueError(
            "this reward has no gradient, which this method needs: use one that is differentiable, or a method that only "
            "compares rewards (fk, doob, best_of_n, guidance with estimate=spsa or doob)"
        )
    (g,) = torch.autograd.grad(values, x, torch.ones_like(values))
    return g


def unit_variance(t: float) -> float:
    """Posterior variance of x0 given x_t for data of variance one: t^2 / ((1 - t)^2 + t^2)."""
    return t**2 / ((1 - t) ** 2 + t**2)


# ------------------------------------------------------------------------------------------------ draws of the next step


#: How a draw of the next step is looked at.
#: reuse   x0_m = (x'_m - t' eps_hat(x)) / (1 - t'): DOIT. Free, but takes all of z for signal: it steers much too hard.
#: child   x0_m = x0_hat(x'_m): SVDD. One denoiser call per draw.
LOOKS = ("reuse", "child")


def rewards_of_draws(model: Model, state: Tensor, v: Tensor, node: int, transition: Transition, z: Tensor, look: str) -> Tensor:
    """Reward of the clean look of each draw of the next step, (P, N, M). z: (P, N, M, ...)."""
    t, t_next, x = model.t[node], model.t[node + 1], model.flow(state, node)
    law = transition.transition(x, v, t, t_next, model.t_max)
    x_next = (law.mean[:, :, None] + law.std * z).flatten(1, 2)
    if look == "reuse":
        x0 = (x_next - t_next * eps_from(x, v, t).repeat_interleave(z.shape[2], 1)) / (1 - t_next)
    else:
        child = model.native(x_next, node + 1)
        x0 = x0_from(model.flow(child, node + 1), model.velocity(child, node + 1), t_next)
    return model.reward(x0).unflatten(1, z.shape[1:3])


def check_look(look: str) -> None:
    if look not in LOOKS:
        raise ValueError(f"look={look!r} is unknown: known are {', '.join(LOOKS)}")


def pairs(model: Model, like: Tensor, draws: int) -> Tensor:
    """Antithetic draws z, -z of standard normal noise, (P, N, M, ...)."""
    half = [model.draw_noise(like) for _ in range(draws // 2)]
    return torch.stack([*half, *(-z for z in half)], 2)


def over(values: Tensor, like: Tensor) -> Tensor:
    """Shaped to broadcast over the dims of a sample: (P, N) becomes (P, N, 1, ...)."""
    return values.reshape(*values.shape, *[1] * (like.dim() - values.dim())).to(like.dtype)
