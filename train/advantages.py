"""From rewards to advantages: group statistics, many rewards as one, abstaining rewards. Plain tensor functions.

    sum_then_normalize   A = norm(sum_k w_k r_k)                               Flow-GRPO, arXiv 2505.05470, eq. 5
    normalize_then_sum   A = norm_batch(sum_k w_k z_k), z_k = norm_group(r_k)  GDPO
    correlation          A = norm_batch(sum_k s_k w_k z_k), s = softmax((1 - b) / tau), b_k the mean correlation of k   CMO
    pareto               A = [i is not dominated] sum_k w_k z_k                Parrot; from four rewards up by rank
    softmin              A = norm(-tau log sum_k w_k exp(-z_k / tau))          the worst reward counts most

A reward of NaN abstains: it is left out of every mean, deviation and sum of its own reward, and never becomes 0.
The deviation is the sample deviation (divisor n - 1). A group whose deviation is below `floor`, in reward
units, has no signal: its advantages are 0, and it is counted in `frac_reward_zero_std`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
#: Deviations below this, in reward units, count as none.
STD_FLOOR = 1e-6


def group_mean_std(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sample deviation and number of valid members of each sample's group. rewards: (N,) or (N, K); group: (N,) int64.

    Returns three tensors shaped like rewards, gathered back per sample. Deviation 0 where fewer than two members are valid.
    """
    if group.dtype != torch.int64:
        raise TypeError(f"group ids are int64 (got {group.dtype}): other types merge large ids")
    _, inverse = torch.unique(group, return_inverse=True)
    groups = int(inverse.max()) + 1
    r = rewards.double()
    valid = ~r.isnan()
    total = r.new_zeros(groups, *r.shape[1:])
    count = total.index_add(0, inverse, valid.double())
    mean = total.index_add(0, inverse, r.nan_to_num(0.0) * valid) / count.clamp(min=1)
    centred = torch.where(valid, r - mean[inverse], 0.0)
    std = (total.index_add(0, inverse, centred**2) / (count - 1).clamp(min=1)).sqrt()
    return mean[inverse].float(), std[inverse].float(), count[inverse].float()


def _deviation(values: Tensor) -> Tensor:
    """Sample deviation over the valid entries of dimension 0, (K,) or ()."""
    valid = ~values.isnan()
    count = valid.sum(0).clamp(min=2)
    mean = values.nan_to_num(0.0).sum(0) / valid.sum(0).clamp(min=1)
    return (torch.where(valid, values - mean, 0.0).square().sum(0) / (count - 1)).sqrt()


def normalized(
    rewards: Tensor, group: Tensor, scale: Scale = "group", floor: float = STD_FLOOR, best: Tensor | None = None
) -> Tensor:
    """Each reward minus its group's mean, over a deviation: GRPO's advantage. rewards: (N,) or (N, K), NaN stays NaN.

    scale: "group" divides by the group's own deviation, "batch" by the deviation of all rewards of the batch (Flow-GRPO's
    default, so that prompts with little to gain weigh little), "none" does not divide. best: () or (K,), the largest possible
    reward, counts as one more member of each group (NGRPO's virtual sample): groups that are all wrong then have an advantage,
    -1/3 for 8 zeros of a 0/1 reward; NaN where a reward has no maximum.
    """
    if best is not None:
        virtual = group.unique()
        more = best.to(rewards).expand(len(virtual), *rewards.shape[1:])
        return normalized(torch.cat([rewards, more]), torch.cat([group, virtual]), scale, floor)[: len(rewards)]
    mean, std, _ = group_mean_std(rewards, group)
    centred = rewards.float() - mean
    if scale == "none":
        return centred
    divisor = std if scale == "group" else _deviation(rewards.float()).expand_as(std)
    alive = (std > floor) & (divisor > floor)
    return torch.where(rewards.isnan(), rewards.float(), torch.where(alive, centred / divisor.clamp(min=floor), 0.0))


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Sum over rewards of weight x value, (N, K) -> (N,), over the rewards that do not abstain, scaled up to all weights.

    NaN where every reward abstains.
    """
    valid = ~values.isnan()
    present = (valid * weights.abs()).sum(1)
    total = (values.nan_to_num(0.0) * weights).sum(1) * weights.abs().sum() / present.clamp(min=1e-12)
    return torch.where(valid.any(1), total, torch.nan)


@dataclass(frozen=True)
class Scaling:
    """How rewards become comparable, whatever combines them."""

    scale: Scale = "group"  #: Divide centred rewards by the deviation of the group, of the batch, or not.
    floor: float = STD_FLOOR  #: Deviations below it count as none.
    best: Tensor | None = None  #: (K,) the largest value of each reward, for NGRPO's virtual sample; NaN where there is none.
    temperature: float = 0.5  #: tau of `correlation` and `softmin`.

    def each(self, rewards: Tensor, group: Tensor, weights: Tensor) -> Tensor:
        """(N, K) each reward's own advantage, the other way round where its weight is negative. NaN stays NaN."""
        return normalized(rewards, group, self.scale, self.floor, self.best) * torch.where(weights < 0, -1.0, 1.0)

    def over_batch(self, values: Tensor, centre: bool = True) -> Tensor:
        """Values (N,) over their deviation in the batch. The virtual sample's push is never centred away."""
        deviation = _deviation(values)
        mean = values.mean() if centre and self.best is None else 0.0
        return (values - mean) / deviation if deviation > self.floor else torch.zeros_like(values)


def sum_then_normalize(rewards: Tensor, group: Tensor, weights: Tensor, scaling: Scaling) -> Tensor:
    """The weighted sum of rewards counts as one reward: of two that disagree, the one that varies more wins."""
    top = None if scaling.best is None else (scaling.best * weights).sum()
    total = weighted_sum(rewards.float(), weights)
    return normalized(total, group, scaling.scale, scaling.floor, top).nan_to_num(0.0)


def normalize_then_sum(rewards: Tensor, group: Tensor, weights: Tensor, scaling: Scaling) -> Tensor:
    """No reward drowns another by its scale."""
    z = scaling.each(rewards, group, weights)
    return scaling.over_batch((z.nan_to_num(0.0) * weights.abs()).sum(1))


def correlation(rewards: Tensor, group: Tensor, weights: Tensor, scaling: Scaling) -> Tensor:
    """Rewards that agree with the others in their group weigh less: they say the same thing several times.

    b_k is the mean over the other rewards of their correlation with k (`binding`). Wants at least 3 samples in a group.
    """
    z = scaling.each(rewards, group, weights)
    share = torch.zeros_like(z)
    for members in _members(group):
        oriented = rewards[members] * weights.sign()
        present = (~oriented.isnan()).any(0) & (weights != 0)
        if present.any():
            b = binding(oriented[:, present], scaling.floor).to(z)
            share[members.unsqueeze(1), present.nonzero().squeeze(1)] = ((1 - b) / scaling.temperature).softmax(0)
    return scaling.over_batch((z.nan_to_num(0.0) * share * weights.abs()).sum(1))


def pareto(rewards: Tensor, group: Tensor, weights: Tensor, scaling: Scaling) -> Tensor:
    """Samples that another of their group beats in every reward teach nothing (Parrot).

    From four rewards up nearly every sample is the best in some combination of them (0.6 of 16 independent ones), so there the
    rank of its front counts, and within a front how much room it has (NSGA-II), as one score of the group. Weights then only say
    which rewards count, and which way.
    """
    oriented = rewards * weights.sign()
    counting = oriented[:, weights != 0]
    kept = ~counting.isnan().all(1)
    score = torch.full_like(rewards[:, 0], torch.nan, dtype=torch.float32)
    for members in _members(group):
        own = members[kept[members]]
        if len(own):
            front = fronts(counting[own])
            score[own] = room(counting[own], front) / 2 - front
    if counting.shape[1] >= 4:
        return normalized(score, group, scaling.scale, scaling.floor).nan_to_num(0.0)
    z = scaling.each(rewards, group, weights)
    first = score >= 0  # front 0
    return scaling.over_batch((z.nan_to_num(0.0) * weights.abs()).sum(1) * first, centre=False)


def softmin(rewards: Tensor, group: Tensor, weights: Tensor, scaling: Scaling) -> Tensor:
    """A smooth minimum of the normalised rewards: of a sample's rewards the worst counts most. tau to infinity is their mean."""
    z, tau = scaling.each(rewards, group, weights), scaling.temperature
    share = torch.where(z.isnan(), 0.0, weights.abs())
    share = share / share.sum(1, keepdim=True).clamp(min=1e-12)
    low = -tau * (share.log() - z.nan_to_num(0.0) / tau).logsumexp(1)
    low = torch.where(share.sum(1) > 0, low, torch.nan)
    return normalized(low, group, scaling.scale, scaling.floor).nan_to_num(0.0)


#: By the name that a recipe's `aggregation` uses.
AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Scaling], Tensor]] = {
    "sum_then_normalize": sum_then_normalize,
    "normalize_then_sum": normalize_then_sum,
    "correlation": correlation,
    "pareto": pareto,
    "softmin": softmin,
}


def advantages(
    rewards: Tensor,
    group: Tensor,
    weights: Tensor | None = None,
    aggregation: str = "sum_then_normalize",
    scale: Scale = "group",
    floor: float = STD_FLOOR,
    best: Tensor | None = None,
    temperature: float = 0.5,
) -> Tensor:
    """Advantages (N,) from rewards (N, K), group ids (N,) and weights (K,). A sample that no reward scores has advantage 0.

    aggregation: one of AGGREGATIONS. scale, floor, best, temperature: as in `Scaling`. Raises ValueError for an unknown one.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is one of {', '.join(AGGREGATIONS)}, not {aggregation!r}")
    weights = torch.ones(rewards.shape[1]) if weights is None else weights.to(rewards.device)
    return AGGREGATIONS[aggregation](rewards, group, weights, Scaling(scale, floor, best, temperature))


def _members(group: Tensor) -> list[Tensor]:
    """The indices of each group's samples."""
    return [(group == g).nonzero().squeeze(1) for g in group.unique()]


def binding(rewards: Tensor, floor: float = STD_FLOOR) -> Tensor:
    """(K,) in [-1, 1]: the mean correlation of each reward with the others, over one group's rewards (G, K).

    A correlation is taken over the n samples that both rewards score, and shrunk by 1 - 1 / n; below 3 it is 0. A reward that
    does not vary binds with 1, as in Flow-GRPO's code for CMO; the only one with 0.
    """
    r, valid = rewards.double(), ~rewards.isnan()
    both = valid.double()
    n = both.T @ both
    mean = r.nan_to_num(0.0).sum(0) / both.sum(0).clamp(min=1)
    x = torch.where(valid, r - mean, 0.0)
    first = (x.T @ both) / n.clamp(min=1)  # [k, l]: mean of k over the samples that l scores, too
    covariance = (x.T @ x) / n.clamp(min=1) - first * first.T
    variance = ((x**2).T @ both) / n.clamp(min=1) - first**2
    spread = (variance * variance.T).clamp(min=0).sqrt()
    rho = torch.where((n >= 3) & (spread > floor**2), covariance / spread.clamp(min=floor**2), 0.0)
    rho = rho.clamp(-1, 1) * (1 - 1 / n.clamp(min=1))
    others = max(1, rewards.shape[1] - 1)
    b = (rho.sum(1) - rho.diagonal()) / others
    flat = (x**2).sum(0) / (both.sum(0) - 1).clamp(min=1) <= floor**2
    return torch.where(flat & (rewards.shape[1] > 1), 1.0, b)


def fronts(values: Tensor) -> Tensor:
    """(N,) int64: 0 where no sample dominates, 1 where none but those of front 0 do, and so on. values: (N, K), more is better.

    One sample dominates another that is nowhere better and somewhere worse, over the rewards that score both.
    """
    a, b = values.unsqueeze(1), values.unsqueeze(0)
    unknown = a.isnan() | b.isnan()
    dominates = ((a >= b) | unknown).all(2) & ((a > b) & ~unknown).any(2)
    front = torch.full((len(values),), -1)
    level = 0
    while (left := front < 0).any():
        free = left & ~(dominates & left.unsqueeze(1)).any(0)
        front[free if free.any() else left] = level  # a circle, which abstentions allow, is one front
        level += 1
    return front


def room(values: Tensor, front: Tensor) -> Tensor:
    """(N,) in [0, 1]: c / (1 + c) of the crowding distance c within each front, 1 at either end of a reward (NSGA-II).

    c sums, over rewards, the gap between the next larger and the next smaller value of the front, over its range; equal values
    count once, so that the order of samples does not matter.
    """
    distance = torch.zeros(len(values))
    for level in front.unique():
        for k in range(values.shape[1]):
            own = ((front == level) & ~values[:, k].isnan()).nonzero().squeeze(1)
            levels, place = values[own, k].float().unique(return_inverse=True)
            gaps = torch.full_like(levels, torch.inf)
            if len(levels) > 2:
                gaps[1:-1] = (levels[2:] - levels[:-2]) / (levels[-1] - levels[0])
            distance[own] += gaps[place]
    return torch.where(distance.isinf(), 1.0, distance / (1 + distance))


def zero_variance_share(rewards: Tensor, group: Tensor, floor: float = STD_FLOOR) -> float:
    """Share of groups in which no reward (N, K) varies: they teach nothing."""
    _, std, _ = group_mean_std(rewards, group)
    first = {int(g): i for i, g in reversed(list(enumerate(group.tolist())))}
    flat = (std <= floor).reshape(len(group), -1).all(1)
    return sum(bool(flat[i]) for i in first.values()) / len(first)
