"""Pref-GRPO, arXiv 2508.20751: a sample's reward is how often it wins against the others of its prompt.

    r_i = mean over j != i of w_ij          w_ij = 1[s_i > s_j] (1/2 for ties), or sigmoid((s_i - s_j) / tau), or a judge's word

Why: group-normalised advantages divide by the group's deviation, however small. Eight scores 0.8200, 0.8201, ... 0.8207 differ by
nothing that anybody could see, yet the best of them gets the advantage +1.4 and the worst -1.4: an illusory advantage, on which a
policy learns the scorer's noise. Soft win rates at tau = 0.01 put the same group between 0.490 and 0.510 *of a win*, a unit in
which a floor under the deviation means the same for every scorer. Hard wins keep only the order: one outlier cannot take all of
the group's deviation, but a difference in the fourth decimal is a whole win; they belong to scorers that compare pictures.
"""

from __future__ import annotations

import random
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.base import Traits, load_reward, traits_of

Strength = Literal["win_rate", "bradley_terry"]


def soft_wins(scores: Tensor, temperature: float | None = None) -> Tensor:
    """(G,) scores -> (G, G) in [0, 1]: [i, j] is how surely i beats j, 1 minus that is [j, i]. NaN on the diagonal and at NaN.

    temperature: tau in units of the score; None: 1, 0, or 1/2 for ties, without a gradient.
    """
    known = ~scores.isnan()
    filled = torch.where(known, scores, 0.0)  # NaN would reach the gradients of the others
    gap = filled[:, None] - filled[None, :]
    wins = (gap.sign() + 1) / 2 if temperature is None else torch.sigmoid(gap / temperature)
    return torch.where(_played(known[:, None] & known[None, :]), wins, torch.nan)


def win_rate(wins: Tensor) -> Tensor:
    """(G, G) wins in [0, 1], NaN where two did not meet -> (G,) mean over those met; NaN without any. The diagonal is ignored.

    The mean over the group is 1/2 when all met the same number of opponents.
    """
    played = _played(~wins.isnan())
    return torch.where(played, wins, 0.0).sum(1) / played.sum(1)  # 0 / 0 is NaN


def bradley_terry(wins: Tensor, prior: float = 0.1, steps: int = 100) -> Tensor:
    """(G, G) wins in [0, 1], NaN where two did not meet -> (G,) log-strengths with mean 0; NaN for those who met nobody.

    The theta that maximises  sum_ij w_ij log sigmoid(theta_i - theta_j), by Newton's method in fp64. Other than a win rate it
    accounts for who the opponents were, which matters once not everybody meets everybody. prior: so many further games of each
    against a fixed opponent of strength 0, half of them won; without any, those who won every game would be infinitely strong.
    """
    played = _played(~wins.isnan())
    w = torch.where(played, wins, 0.0).double()
    met = played.any(1)
    theta = torch.zeros(len(w), dtype=torch.float64, device=w.device)
    for _ in range(steps):
        p, base = torch.sigmoid(theta[:, None] - theta[None, :]), torch.sigmoid(theta)
        gradient = (w - (w + w.T) * p).sum(1) + prior * (0.5 - base)
        weight = (w + w.T) * p * (1 - p)
        curvature = torch.diag(weight.sum(1) + prior * base * (1 - base)) - weight
        step = torch.linalg.solve(curvature, gradient)
        theta = theta + step / step.abs().max().clamp_min(1.0)  # at most 1 at a time: far out, the parabola is a poor guide
        if step.abs().max() < 1e-12:
            break
    return torch.where(met, theta - theta[met].mean(), torch.nan).to(wins.dtype)


def strengths(kind: Strength, wins: Tensor) -> Tensor:
    return win_rate(wins) if kind == "win_rate" else bradley_terry(wins)


def schedule(seeds: list[int], opponents: int | None = None) -> list[tuple[int, int]]:
    """Who meets whom: pairs of places in a group. opponents: of each sample; None: all others.

    In a circle by seed everybody meets the next ones on both sides, so all have equally many opponents (an odd number is one more
    where the group is odd too) and the pairs depend on seeds alone, not on places.
    """
    size = len(seeds)
    circle = sorted(range(size), key=lambda i: seeds[i])
    wanted = size - 1 if opponents is None else min(opponents, size - 1)
    distances = [*range(1, wanted // 2 + 1)]
    if wanted % 2:
        distances.append(wanted // 2 + 1 if size % 2 else size // 2)  # straight across the circle: one opponent, not two
    return [
        (circle[i], circle[(i + distance) % size])
        for distance in distances
        for i in range(size // 2 if 2 * distance == size else size)
    ]


def coin(*seeds: int) -> bool:
    """A fair coin that falls the same way for the same seeds, on every machine."""
    return random.Random(" ".join(map(str, seeds))).random() < 0.5


class WinRate:
    """How often a sample wins against the others of its prompt by any pointwise reward, in [0, 1] (Pref-GRPO, arXiv 2508.20751).

        r_i = mean over j != i of w_ij      w_ij = 1[s_i > s_j] (1/2 for ties), or with a temperature sigmoid((s_i - s_j) / tau)

    Scores that differ by nothing that anybody could see do not get far apart, as they do in advantages that are divided by the
    group's deviation: give a temperature of the size of a difference that matters. Without one only the order counts, which is
    for rewards that compare pictures. A sample on which the inner reward abstains abstains, and the others are compared without
    it; so does one that is alone.
    """

    name = "win_rate"

    def __init__(
        self,
        of: Any,  #: The inner reward, by name, or {name: ..., option: ...}.
        temperature: float | None = None,  #: tau, in units of the inner reward; unset: plain wins, 1, 0, or 1/2 for ties.
        #: win_rate, or bradley_terry: log-strengths that account for who the opponents were.
        strength: Strength = "win_rate",
    ):
        if temperature is not None and temperature <= 0:
            raise ValueError(f"temperature={temperature:g}: a positive difference of the reward `of`, or none for plain wins")
        if strength not in ("win_rate", "bradley_terry"):
            raise ValueError(f"strength={strength!r}: choose win_rate or bradley_terry")
        self.of = load_reward(of)
        self.temperature, self.strength = temperature, strength
        inner = traits_of(self.of)
        if inner.arity != "point":
            raise ValueError(f"of={self.of.name}: it compares samples already; give a reward that scores one at a time")
        self.traits = Traits(
            arity="group",
            needs=inner.needs,
            columns=inner.columns,
            range=(0.0, 1.0) if strength == "win_rate" else (-torch.inf, torch.inf),
            differentiable=inner.differentiable and temperature is not None and strength == "win_rate",
            remote=inner.remote,
            licence=inner.licence,
        )

    def __call__(self, samples: Samples) -> Tensor:
        scores = self.of(samples)
        rates = torch.full_like(scores, torch.nan)
        for places in samples.by_group():
            places = places.to(scores.device)
            rates = rates.index_put((places,), strengths(self.strength, soft_wins(scores[places], self.temperature)))
        return rates


def _played(known: Tensor) -> Tensor:
    return known & ~torch.eye(len(known), dtype=torch.bool, device=known.device)
