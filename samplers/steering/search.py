"""Search: more samples, or better noise, for the same generator; the sample with the highest reward is returned. No gradient.

BestOfN     N independent samples
ZeroOrder   a pivot noise and its neighbours
Paths       go back up with fresh noise, come down a little further, keep the best
Rollover    one chain; try a step again until its look is better than any before, save what was not needed
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.samplers.flow import renoise, x0_from
from flowrl.samplers.steering.guidance import over
from flowrl.samplers.steering.loop import (
    History,
    Model,
    Move,
    Outcome,
    advance,
    best,
    check_noisy,
    check_positive,
    finish,
    gather,
    move_of,
    place,
)
from flowrl.samplers.transitions import CPS, ODE


@dataclass(frozen=True)
class BestOfN:
    """The best of N independent samples. KL(best of N || base) = log N - (N - 1) / N, whatever the reward. Costs N samples."""

    particles: int = 8  #: N.
    transition: Move = ODE()  #: How each is sampled, or its name; the ODE by default.

    def __post_init__(self) -> None:
        object.__setattr__(self, "transition", move_of(self.transition))
        check_positive(particles=self.particles)

    def run(self, model: Model) -> Outcome:
        state = finish(model, model.start(self.particles), 0, self.transition)
        return best(state, model.reward(model.flow(state, model.steps)))


@dataclass(frozen=True)
class ZeroOrder:
    """Zero-order search over the initial noise, arXiv 2501.09732. Costs rounds x particles samples.

    Each round tries neighbours of the pivot at a fixed angle, |n| (c n / |n| + sqrt(1 - c^2) w) with w a random unit vector
    orthogonal to n, and moves to the best; if none is better than the pivot, the next round starts from a fresh one.
    """

    rounds: int = 2  #: How often the pivot may move.
    particles: int = 4  #: Samples per round; in a pivot's first round it is one of them itself.
    cosine: float = 0.95  #: c, of the angle between pivot and neighbours: 1 stays, 0 is independent.

    def __post_init__(self) -> None:
        check_positive(rounds=self.rounds)
        if self.particles < 2:
            raise ValueError(f"particles={self.particles}: a round needs the pivot and at least one neighbour; use 2 or more")
        if not -1 < self.cosine < 1:
            raise ValueError(f"cosine={self.cosine} must lie between -1 and 1, exclusive: try 0.95")

    def run(self, model: Model) -> Outcome:
        pivot = model.start(1)
        known = torch.full((len(model.prompts),), -torch.inf, device=pivot.device)  # -inf: the pivot is yet to be tried
        ends, end_rewards = [], []
        for turn in range(self.rounds):
            noise = pivot.expand(-1, self.particles, *pivot.shape[2:])
            around = neighbours(noise, model.draw_noise(noise), self.cosine)
            fresh = over(known[:, None].isneginf(), pivot)
            noise = torch.cat([torch.where(fresh.bool(), pivot, around[:, :1]), around[:, 1:]], 1)
            state = finish(model, noise, 0, ODE())
            rewards = model.reward(model.flow(state, model.steps))
            top = rewards.argmax(1)
            ends.append(gather(state, top[:, None]))
            end_rewards.append(gather(rewards, top[:, None]))
            if turn == self.rounds - 1:
                break
            # A pivot that is the best of its own first round has no better neighbour either.
            stays = (fresh.flatten().bool() & (top == 0)) | (end_rewards[-1][:, 0] <= known)
            better = gather(noise, top[:, None])
            another = model.draw_noise(pivot).to(pivot.dtype)
            pivot = torch.where(over(stays[:, None], pivot).bool(), another, better)
            known = torch.where(stays, -torch.inf, end_rewards[-1][:, 0])
        return best(torch.cat(ends, 1), torch.cat(end_rewards, 1))


def neighbours(noise: Tensor, draws: Tensor, cosine: float) -> Tensor:
    """States at a fixed angle from `noise`, of the same length. noise, draws: (P, N, ...)."""
    n, w = noise.float().flatten(2), draws.float().flatten(2)
    if n.shape[2] > 1:
        w = w - (w * n).sum(2, keepdim=True) / (n * n).sum(2, keepdim=True) * n
    w = w / w.norm(dim=2, keepdim=True) * n.norm(dim=2, keepdim=True)
    return (cosine * n + math.sqrt(1 - cosine**2) * w).reshape(noise.shape).to(noise.dtype)


@dataclass(frozen=True)
class Paths:
    """Search over paths, arXiv 2501.09732: from N samples at a node, M times each back up with fresh noise, down past it, keep N.

    Levels are nodes of the grid. Costs N M of the first leg and N M (back + forward) denoiser calls per round; looks at x0_hat
    cost none, since Euler's last step knows it already.
    """

    particles: int = 2  #: N kept.
    children: int = 2  #: M tried from each; the first leg starts from N M noises.
    first: int = 5  #: Node that the first leg goes to.
    back: int = 3  #: Nodes up, with fresh noise.
    forward: int = 1  #: Nodes gained per round.

    def __post_init__(self) -> None:
        check_positive(particles=self.particles, children=self.children, first=self.first, back=self.back, forward=self.forward)
        if self.back > self.first:
            raise ValueError(f"back={self.back} leads behind the start: at most first={self.first}")

    def run(self, model: Model) -> Outcome:
        if self.first > model.steps:
            raise ValueError(f"first={self.first} is behind the {model.steps} denoising steps: use at most that")
        history, n = History(), self.particles
        node, state = 0, model.start(n * self.children)
        target = self.first
        while True:
            state, x0 = self.descend(model, state, node, target)
            rewards = model.reward(x0)
            kept = rewards.topk(n, dim=1).indices
            # Children of one parent stand together; of the first leg, each is its own.
            parents = kept if node == 0 and not history.t else kept // self.children
            state, rewards = gather(state, kept), gather(rewards, kept)
            if history.t or target == model.steps:
                history.add(model.t[target], torch.full((len(kept),), float(n)), parents)
            else:
                history.add(model.t[target], torch.full((len(kept),), float(n)), torch.arange(n).repeat(len(kept), 1))
            if target == model.steps:
                return best(state, rewards, history)
            node = target - self.back
            up = state.repeat_interleave(self.children, 1)
            x = renoise(model.flow(up, target), model.draw_noise(up), model.t[target], model.t[node])
            state, target = model.native(x, node), min(target + self.forward, model.steps)

    def descend(self, model: Model, state: Tensor, node: int, target: int) -> tuple[Tensor, Tensor]:
        """The ODE from a node to another: the state there, and the clean look of its last step."""
        for i in range(node, target):
            v = model.velocity(state, i)
            x0 = x0_from(model.flow(state, i), v, model.t[i])
            state = place(model, state, v, i, ODE(), None)
        return state, x0


@dataclass(frozen=True)
class Rollover:
    """Rollover budget forcing, arXiv 2503.19385: draw children of a step one at a time, each looked at through x0_hat.

    The first child whose look beats every look before is taken at once, and what is left of the step's share goes to the next
    step; when the share is used up, the best child is taken. Costs at most `budget` denoiser calls.
    """

    budget: int = 80  #: Denoiser calls per sample, at least one for each denoising step and each initial noise.
    initial: int = 8  #: Noises at the start, of which the one with the best look is followed.
    transition: Move = CPS(0.8)  #: The noisy step that children are drawn from, or its name.

    def __post_init__(self) -> None:
        object.__setattr__(self, "transition", move_of(self.transition))
        check_positive(budget=self.budget, initial=self.initial)
        check_noisy(self.transition)

    def run(self, model: Model) -> Outcome:
        noisy = model.steps - 1
        if self.budget < self.initial + noisy:
            raise ValueError(
                f"budget={self.budget} is too small for initial={self.initial} noises and {noisy} noisy steps: "
                f"use at least {self.initial + noisy}"
            )
        state = model.start(self.initial)
        v = model.velocity(state, 0)
        looks = model.reward(x0_from(model.flow(state, 0), v, model.t[0]))
        top = looks.argmax(1)[:, None]
        state, v, bar = gather(state, top), gather(v, top), gather(looks, top)[:, 0]
        share, extra = divmod(self.budget - self.initial, max(1, noisy))
        allowance = torch.full((len(model.prompts),), extra)
        for i in range(noisy):
            allowance += share
            state, v, bar = self.step(model, state, v, i, bar, allowance)
        state = advance(model, state, v, model.steps - 1, self.transition)
        return best(state, model.reward(model.flow(state, model.steps)))

    def step(
        self, model: Model, state: Tensor, v: Tensor, node: int, bar: Tensor, allowance: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of every chain: state and velocity (P, 1, ...) after it, and the best look so far. Spends of `allowance`."""
        following, v_next = torch.empty_like(state), torch.empty_like(v)
        looks = torch.full_like(bar, -torch.inf)
        active = list(range(len(model.prompts)))
        while active:
            part = model.only(active)
            child = advance(part, state[active], v[active], node, self.transition)
            v_child = part.velocity(child, node + 1)
            look = part.reward(x0_from(part.flow(child, node + 1), v_child, part.t[node + 1]))[:, 0]
            allowance[active] -= 1
            for k, p in enumerate(active):
                if look[k] > looks[p]:
                    following[p], v_next[p], looks[p] = child[k], v_child[k], look[k]
            active = [p for p in active if not looks[p] > bar[p] and allowance[p] > 0]
        return following, v_next, torch.maximum(bar, looks)
