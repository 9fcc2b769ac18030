"""From rewards to advantages: group statistics, GDPO, abstaining rewards. Plain tensor functions.

A reward of NaN abstains: it is left out of every mean, deviation and sum of its own reward, and never becomes 0.
The deviation is the sample deviation (divisor n - 1). A group whose deviation is below `floor`, in reward
units, has no signal: its advantages are 0, and it is counted in `frac_reward_zero_std`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
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


def advantages(
    rewards: Tensor,
    group: Tensor,
    weights: Tensor | None = None,
    aggregation: Aggregation = "sum_then_normalize",
    scale: Scale = "group",
    floor: float = STD_FLOOR,
    best: Tensor | None = None,
) -> Tensor:
    """Advantages (N,) from rewards (N, K), group ids (N,) and weights (K,). A sample that no reward scores has advantage 0.

    sum_then_normalize: A = norm(sum_k w_k r_k), Flow-GRPO (arXiv 2505.05470, eq. 5).
    normalize_then_sum: A = norm_batch(sum_k w_k norm_group(r_k)), GDPO: no reward drowns another by its scale.
    best: (K,) the largest possible value of each reward, for NGRPO's virtual sample (see `normalized`). With it, the sum is not
    centred over the batch again, which would take away what it gives.
    """
    weights = torch.ones(rewards.shape[1]) if weights is None else weights.to(rewards.device)
    if aggregation == "sum_then_normalize":
        top = None if best is None else (best * weights).sum()
        return normalized(weighted_sum(rewards.float(), weights), group, scale, floor, top).nan_to_num(0.0)
    if aggregation == "normalize_then_sum":
        z = normalized(rewards, group, scale, floor, best)
        a = (z.nan_to_num(0.0) * weights).sum(1)
        deviation = _deviation(a)
        mean = a.mean() if best is None else 0.0
        return (a - mean) / deviation if deviation > floor else torch.zeros_like(a)
    raise ValueError(f"aggregation is sum_then_normalize or normalize_then_sum, not {aggregation!r}")


def zero_variance_share(rewards: Tensor, group: Tensor, floor: float = STD_FLOOR) -> float:
    """Share of groups in which no reward (N, K) varies: they teach nothing."""
    _, std, _ = group_mean_std(rewards, group)
    first = {int(g): i for i, g in reversed(list(enumerate(group.tolist())))}
    flat = (std <= floor).reshape(len(group), -1).all(1)
    return sum(bool(flat[i]) for i in first.values()) / len(first)
