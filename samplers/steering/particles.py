"""Particle methods: N weighted samples of each prompt, resampled on the way.

    FK        potentials at a few times, from the reward of x0_hat: no gradient
    Twisted   the same with proposals that follow the reward's gradient: needs a gradient through the denoiser
    FlowMap   gradient drift from a look-ahead along the ODE, repaired by exact weights

Weights live in log space, per particle, and are carried until a resampling resets them. Resampling copies particles; whatever
belongs to a particle is gathered with it, only its noise stream stays with its place, so that copies part at the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowrl.samplers.flow import x0_from
from flowrl.samplers.steering.guidance import differentiate, over, through_denoiser
from flowrl.samplers.steering.loop import (
    History,
    Model,
    Move,
    Outcome,
    advance,
    check_noisy,
    check_positive,
    check_strength,
    check_times,
    gather,
    move_of,
    place,
    stochastic,
    strength_of,
)
from flowrl.samplers.steering.tilt import doob_shift, langevin_shift
from flowrl.samplers.transitions import CPS, DDIM, FlowSDE, Transition

# ------------------------------------------------------------------------------------------------ weights


def ess(log_weights: Tensor) -> Tensor:
    """Effective sample size (sum w)^2 / sum w^2, (P,). log_weights: (P, N)."""
    return 1 / log_weights.softmax(1).square().sum(1)


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """log(1/N sum w), (P,)."""
    return log_weights.logsumexp(1) - math.log(log_weights.shape[1])


def systematic(weights: Tensor, u: Tensor) -> Tensor:
    """Ancestors (P, N): one uniform number per prompt, positions (u + i) / N. Particle i gets floor or ceil of N W_i copies.

    weights: (P, N), rows adding up to 1; u: (P, 1) in [0, 1).
    """
    return _at((u + torch.arange(weights.shape[1], device=u.device)) / weights.shape[1], weights)


def stratified(weights: Tensor, u: Tensor) -> Tensor:
    """Ancestors (P, N): one uniform number per particle, positions (u_i + i) / N. u: (P, N)."""
    return systematic(weights, u)


def multinomial(weights: Tensor, u: Tensor) -> Tensor:
    """Ancestors (P, N): independent draws, the noisiest. u: (P, N)."""
    return _at(u.sort(1).values, weights)


def _at(positions: Tensor, weights: Tensor) -> Tensor:
    cumulative = weights.double().cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]
    # Below the last edge, whatever rounding did: a position of exactly 1 would point behind the last particle.
    return torch.searchsorted(cumulative, positions.double(), right=True).clamp(max=weights.shape[1] - 1)


RESAMPLING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
}


@dataclass
class Weights:
    """log_weights: (P, N), carried; log_z: (P,), what resamplings have already moved out of them."""

    log_weights: Tensor
    log_z: Tensor
    history: History

    @classmethod
    def start(cls, prompts: int, n: int, device: torch.device) -> Weights:
        return cls(
            torch.zeros(prompts, n, dtype=torch.float64, device=device),
            torch.zeros(prompts, dtype=torch.float64, device=device),
            History(),
        )

    def resample(self, model: Model, t: float, threshold: float, scheme: str) -> Tensor:
        """Ancestors (P, N): resampled where ESS < threshold N, the identity elsewhere. Their weights are then reset."""
        p, n = self.log_weights.shape
        size = ess(self.log_weights)
        low = size < threshold * n
        ancestors = torch.arange(n, device=low.device).repeat(p, 1)
        # Drawn whether needed or not: a population's numbers must not depend on whether a batch mate's weights are low.
        u = model.draw_uniform(1 if scheme == "systematic" else n).to(low.device)
        if bool(low.any()):
            ancestors = torch.where(low[:, None], RESAMPLING[scheme](self.log_weights.softmax(1), u), ancestors)
            self.log_z = self.log_z + torch.where(low, log_mean_exp(self.log_weights), 0.0)
            self.log_weights = torch.where(low[:, None], 0.0, self.log_weights)
        self.history.add(t, size, ancestors)
        return ancestors

    def outcome(self, model: Model, state: Tensor, rewards: Tensor, strength: float, returned: str) -> Outcome:
        """Choose by reward, or draw by weight, which returns a sample of the tilted law."""
        n = rewards.shape[1]
        self.history.add(model.t[-1], ess(self.log_weights), torch.arange(n).repeat(len(rewards), 1))
        if returned == "best":
            chosen = rewards.argmax(1)
        else:
            u = model.draw_uniform(1).to(state.device)
            chosen = _at(u, self.log_weights.softmax(1))[:, 0]
        log_z = self.log_z + log_mean_exp(self.log_weights)
        return Outcome(state, rewards, chosen, self.log_weights, log_z, strength, self.history)


# ------------------------------------------------------------------------------------------------ FK steering


@dataclass
class Past:
    """What a particle remembers of lam r at its ancestors' checkpoints, each (P, N): the sum of its log potentials, the highest
    value, the sum of the values. All zero, or minus infinity, before the first."""

    spent: Tensor
    highest: Tensor
    total: Tensor

    def gathered(self, ancestors: Tensor) -> Past:
        return Past(gather(self.spent, ancestors), gather(self.highest, ancestors), gather(self.total, ancestors))


def difference(value: Tensor, past: Past) -> Tensor:
    """log G_k = lam (r_k - r_{k-1}), r_0 = 0: the potentials so far always add up to the last value."""
    return value - past.spent


def maximum(value: Tensor, past: Past) -> Tensor:
    """log G_k = lam max_{j <= k} r_j."""
    return past.highest


def total(value: Tensor, past: Past) -> Tensor:
    """log G_k = lam sum_{j <= k} r_j."""
    return past.total


POTENTIALS: dict[str, Callable[[Tensor, Past], Tensor]] = {"difference": difference, "max": maximum, "sum": total}


@dataclass(frozen=True)
class FK:
    """Feynman-Kac steering, arXiv 2501.06848: potentials G_k with prod_k G_k = exp(lam r(x0)), whatever G_k before the last.

    The last potential is exact: G_K = exp(lam r(x0)) / prod_{k < K} G_k. So every choice of potential has the same target, and
    they differ in when weights decide. Copies of a particle part only by noise: the transition must not be deterministic.
    """

    particles: int = 8  #: N. Denoiser calls are N times those of one sample. In use: 4 to 8.
    tilt_strength: float | None = None  #: lam. By default lam r spreads by 1.5 over base samples, drawn first and counted.
    potential: Literal["difference", "max", "sum"] = "difference"  #: When the reward decides: its rise, highest value, or sum.
    checkpoints: int = 4  #: Looks at x0_hat on the way, evenly spaced in steps; each decodes and scores N pictures.
    t_from: float = 0.8  #: Time of the first checkpoint at the earliest: pictures at higher noise say little.
    t_to: float = 0.2  #: Time of the last checkpoint at the latest: copies made later hardly differ.
    ess: float = 0.5  #: Resample where the effective sample size is below this part of N: above 1 / N, or never; 1 is always.
    resampling: Literal["systematic", "stratified", "multinomial"] = "systematic"  #: How ancestors are drawn.
    transition: Move = CPS(0.8)  #: The noisy step, or its name, or {name: cps, noise_level: 0.7}; glass keeps the ODE's quality.
    returned: Literal["best", "sample"] = "best"  #: The particle of highest reward, or one drawn by its weight.

    def __post_init__(self) -> None:
        object.__setattr__(self, "transition", move_of(self.transition))
        check_positive(particles=self.particles)
        check_strength(self.tilt_strength)
        check_choices(self)
        check_noisy(self.transition)
        if self.checkpoints < 0:
            raise ValueError(f"checkpoints={self.checkpoints} must not be negative: 0 weighs only the finished samples")
        check_times(self.t_from, self.t_to)

    def run(self, model: Model) -> Outcome:
        lam, n = strength_of(model, self.tilt_strength), self.particles
        state = model.start(n)
        weights = Weights.start(len(model.prompts), n, state.device)
        none = torch.zeros_like(weights.log_weights)
        past = Past(none, none - torch.inf, none)
        looks = checkpoint_nodes(model.t, self.checkpoints, self.t_from, self.t_to) if lam else []
        for i in range(model.steps):
            v = model.velocity(state, i)
            if i in looks:
                value = lam * model.reward(x0_from(model.flow(state, i), v, model.t[i])).double()
                past.highest, past.total = torch.maximum(past.highest, value), past.total + value
                log_g = POTENTIALS[self.potential](value, past)
                past.spent = past.spent + log_g
                weights.log_weights = weights.log_weights + log_g
                ancestors = weights.resample(model, model.t[i], self.ess, self.resampling)
                state, v, past = gather(state, ancestors), gather(v, ancestors), past.gathered(ancestors)
            state = advance(model, state, v, i, self.transition)
        rewards = model.reward(model.flow(state, model.steps))
        weights.log_weights = weights.log_weights + lam * rewards.double() - past.spent
        return weights.outcome(model, state, rewards, lam, self.returned)


def checkpoint_nodes(t: Sequence[float], count: int, t_from: float, t_to: float) -> list[int]:
    """`count` nodes, evenly spaced among those with t_from >= t >= t_to; all of them where there are fewer."""
    inside = [i for i, time in enumerate(t[:-1]) if t_to - 1e-6 <= time <= t_from + 1e-6]
    count = min(count, len(inside))
    return sorted({inside[round(k * (len(inside) - 1) / max(1, count - 1))] for k in range(count)})


def check_choices(method: FK | Twisted | FlowMap) -> None:
    if not 0 <= method.ess <= 1:
        raise ValueError(f"ess={method.ess} is a part of the particles, in [0, 1]: try 0.5")
    if method.resampling not in RESAMPLING:
        raise ValueError(f"resampling={method.resampling!r} is unknown: known are {', '.join(RESAMPLING)}")
    if method.returned not in ("best", "sample"):
        raise ValueError(f"returned={method.returned!r} is unknown: known are best, sample")


# ------------------------------------------------------------------------------------------------ twisted SMC


@dataclass(frozen=True)
class Twisted:
    """Twisted SMC with tempering (DAS, arXiv 2501.05803): proposals follow the reward's gradient, weights repay them.

        log psi_t(x) = lam_t r(x0_hat(x))          lam_t = lam min((1 + gamma)^i - 1, 1) at step i
        q(x' | x) = N(mean + d, std^2),            d = std^2 grad log psi_t(x)
        log w += log p(x' | x) - log q(x' | x) + log psi_t'(x') - log psi_t(x)

    log p - log q = -(d . z) / std - |d|^2 / (2 std^2), summed over dims, from the drawn z itself: two log-densities of
    thousands of dims would cancel badly. Needs a differentiable reward.
    """

    particles: int = 4  #: N.
    tilt_strength: float | None = None  #: lam. By default lam r spreads by 1.5 over base samples, drawn first and counted.
    tempering: float = 0.0  #: gamma; 0 has full strength from the start. Paper: 0.008 with 100 steps.
    clip: float = 1.0  #: Longest move of a proposal, in standard deviations of its step, root mean square over dims.
    ess: float = 0.5  #: Resample where the effective sample size is below this part of N: above 1 / N, or never; 1 is always.
    resampling: Literal["systematic", "stratified", "multinomial"] = "systematic"  #: How ancestors are drawn.
    transition: Transition = DDIM(1.0)  #: The noisy step, or its name. Ancestral, for which the proposal is Doob's drift.
    returned: Literal["best", "sample"] = "best"  #: The particle of highest reward, or one drawn by its weight.

    def __post_init__(self) -> None:
        object.__setattr__(self, "transition", move_of(self.transition))
        check_positive(particles=self.particles, clip=self.clip)
        check_strength(self.tilt_strength)
        check_choices(self)
        check_noisy(self.transition, gaussian=True)
        if self.tempering < 0:
            raise ValueError(f"tempering={self.tempering} must not be negative: 0 has full strength from the start")

    def run(self, model: Model) -> Outcome:
        lam, n = strength_of(model, self.tilt_strength), self.particles
        state = model.start(n)
        weights = Weights.start(len(model.prompts), n, state.device)
        log_psi = torch.zeros_like(weights.log_weights)
        for i in range(model.steps):
            if not lam:
                state = advance(model, state, model.velocity(state, i), i, self.transition)
                continue
            lam_t = lam * (min((1 + self.tempering) ** i - 1, 1.0) if self.tempering else 1.0)
            v, value, u = through_denoiser(model, state, i, lam_t)
            weights.log_weights = weights.log_weights + value.double() - log_psi
            ancestors = weights.resample(model, model.t[i], self.ess, self.resampling)
            state, v, u, log_psi = (gather(a, ancestors) for a in (state, v, u, value.double()))
            if not stochastic(model, i, self.transition):
                state = place(model, state, v, i, self.transition, None)
                continue
            std = self.transition.std(model.t[i], model.t[i + 1], model.t_max)
            d, z = clipped(doob_shift(std, u), self.clip * float(std)), model.draw_noise(state)
            weights.log_weights = weights.log_weights + proposal_weight(d, z, std)
            state = place(model, state, v, i, self.transition, z, d)
        rewards = model.reward(model.flow(state, model.steps))
        weights.log_weights = weights.log_weights + lam * rewards.double() - log_psi
        return weights.outcome(model, state, rewards, lam, self.returned)


def proposal_weight(d: Tensor, z: Tensor, std: Tensor) -> Tensor:
    """log p(x' | x) - log q(x' | x), (P, N), for x' = mean + d + std z. d, z: (P, N, ...)."""
    d, z, std = d.double().flatten(2), z.double().flatten(2), std.double()
    return -(d * z).sum(2) / std - (d**2).sum(2) / (2 * std**2)


def clipped(d: Tensor, longest: float) -> Tensor:
    """d shortened to a root mean square of at most `longest`. d: (P, N, ...)."""
    rms = d.flatten(2).square().mean(2).sqrt()
    return d * over((longest / rms.clamp(min=1e-30)).clamp(max=1.0), d)


# ------------------------------------------------------------------------------------------------ flow-map tilting


@dataclass(frozen=True)
class FlowMap:
    """Flow-map trajectory tilting, arXiv 2511.22688: Langevin drift towards the reward of where the ODE leads, exact weights.

        r_t(x) = (1 - t) lam r(X(x))               X: the flow map from t to 0, here `map_steps` Euler steps of the ODE
        mean += std^2 / 2 grad_x r_t
        log w += lam r(X(x)) dt                    by the trapezoid rule

    The weight is that simple because r(X) is constant along the ODE. With map_steps = 1 the map is the denoiser, along which
    it is not: fast, and biased. Needs a differentiable reward and a noisy transition that keeps the marginals.
    """

    particles: int = 4  #: N.
    tilt_strength: float | None = None  #: lam. By default lam r spreads by 1.5 over base samples, drawn first and counted.
    map_steps: int = 4  #: Euler steps of the look-ahead, each a denoiser call with gradient.
    clip: float = 1.0  #: Longest drift, in standard deviations of its step, root mean square over dims; cut drifts are biased.
    ess: float = 0.5  #: Resample where the effective sample size is below this part of N: above 1 / N, or never; 1 is always.
    resampling: Literal["systematic", "stratified", "multinomial"] = "systematic"  #: How ancestors are drawn.
    transition: Transition = FlowSDE(0.7)  #: The noisy step, or its name.
    returned: Literal["best", "sample"] = "best"  #: The particle of highest reward, or one drawn by its weight.

    def __post_init__(self) -> None:
        object.__setattr__(self, "transition", move_of(self.transition))
        check_positive(particles=self.particles, map_steps=self.map_steps, clip=self.clip)
        check_strength(self.tilt_strength)
        check_choices(self)
        check_noisy(self.transition, gaussian=True)

    def run(self, model: Model) -> Outcome:
        lam, n = strength_of(model, self.tilt_strength), self.particles
        state = model.start(n)
        weights = Weights.start(len(model.prompts), n, state.device)
        before = torch.zeros_like(weights.log_weights)
        for i in range(model.steps):
            if not lam:
                state = advance(model, state, model.velocity(state, i), i, self.transition)
                continue
            t, t_next = model.t[i], model.t[i + 1]

            def ahead(part: Model, x: Tensor, i: int = i) -> tuple[Tensor, Tensor]:
                v = part.velocity(part.native(x, i), i)
                return v, lam * part.reward(part.flow_map(x, v, part.t[i], self.map_steps))

            v, value, u = differentiate(model, state, i, ahead, self.map_steps)
            if i:
                weights.log_weights = weights.log_weights + (before + value.double()) / 2 * (model.t[i - 1] - t)
            ancestors = weights.resample(model, t, self.ess, self.resampling)
            state, v, u, before = (gather(a, ancestors) for a in (state, v, u, value.double()))
            std = self.transition.std(t, t_next, model.t_max)
            shift = clipped(langevin_shift(std, (1 - t) * u), self.clip * float(std))
            state = advance(model, state, v, i, self.transition, shift)
        rewards = model.reward(model.flow(state, model.steps))
        weights.log_weights = weights.log_weights + (before + lam * rewards.double()) / 2 * (model.t[-2] - model.t[-1])
        return weights.outcome(model, state, rewards, lam, self.returned)
