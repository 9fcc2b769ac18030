"""The tilt: one identity behind every gradient method. The target is p*(x0) ~ p(x0) exp(lam r(x0)), lam = 1 / (KL weight).

With h_t(x) = E[exp(lam r(x0)) | x_t = x], noising the target gives exactly p_t(x) h_t(x). Hence, with u = grad_x log h_t(x),

    v~  = v - t / (1 - t) u         x0~ = x0_hat + t^2 / (1 - t) u         eps~ = eps_hat - t u         s~ = s + u

Only v is changed: the score that a step computes from v~ is s + u already, so the ODE and every SDE then sample the tilted
path. Methods differ in how they estimate u, and no more than that.

What else is done with u in the literature, and when it is the same thing (g^2 h = std^2 is the noise of a step):

    v - t / (1 - t) u           the tilt: right for the ODE and any noise
    mean + std^2 u              Doob's drift: right only for memoryless noise, g^2 = 2 t / (1 - t), where x_1 forgets x_0
    mean + std^2 u / 2          Langevin's part alone (Euphonium, flow-map tilting): needs weights to reach the target
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.samplers.flow import Time, expand


def tilt(v: Tensor, t: Time, u: Tensor) -> Tensor:
    """v~ = v - t / (1 - t) u. v, u: (B, ...); t: below 1, where the formula has its pole (skip the first step)."""
    t = expand(t, v)
    return v.float() - t / (1 - t) * u


def tilted_x0(x0: Tensor, t: Time, u: Tensor) -> Tensor:
    """x0~ = x0_hat + t^2 / (1 - t) u."""
    t = expand(t, x0)
    return x0.float() + t**2 / (1 - t) * u


def untilted(dx0: Tensor, t: Time) -> Tensor:
    """The u that moves x0_hat by dx0, x_t held fixed: (1 - t) / t^2 dx0. Then v~ = v - dx0 / t."""
    t = expand(t, dx0)
    return (1 - t) / t**2 * dx0


def doob_shift(std: Time, u: Tensor) -> Tensor:
    """What Doob's drift adds to the mean of a step: std^2 u."""
    return expand(std, u) ** 2 * u


def langevin_shift(std: Time, u: Tensor) -> Tensor:
    """What the Langevin part alone adds to the mean of a step: std^2 u / 2."""
    return doob_shift(std, u) / 2


def auto_strength(rewards: Tensor, spread: float = 1.5) -> float:
    """The lam at which lam r has standard deviation `spread` over base samples. rewards: (P, N): the spread is that of one
    prompt's samples, since a tilt compares no two prompts. Raises ValueError where no prompt's rewards differ."""
    std = rewards.double().var(dim=1).mean().sqrt()
    if not std > 0:
        raise ValueError(
            "tilt_strength cannot be chosen from base samples whose rewards are all equal: give a number, like tilt_strength=10"
        )
    return float(spread / std)


def children_weights(log_h: Tensor, dim: int = -1) -> Tensor:
    """Self-normalised weights of draws by their log h: softmax. log_h: (..., M)."""
    return torch.softmax(log_h.double(), dim).float()
