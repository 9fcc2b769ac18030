"""Rewards made of rewards: ensembles, gates, trees. A part that abstains (NaN) is left out; where all do, the whole abstains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.base import Reward, RewardError, Traits, as_scores, load_reward, load_rewards, traits_of
from flowrl.reward_models.shaping import softmin

_ORDER = ("point", "group", "batch")


def joint_traits(of: Sequence[Reward], bounds: tuple[float, float] = (-math.inf, math.inf)) -> Traits:
    """Traits of a reward that calls all of these: the widest arity, everyone's needs, differentiable if all are."""
    traits = [traits_of(reward) for reward in of]
    return Traits(
        arity=max((t.arity for t in traits), key=_ORDER.index),
        needs=tuple(dict.fromkeys(need for t in traits for need in t.needs)),
        columns=tuple(dict.fromkeys(column for t in traits for column in t.columns)),
        range=bounds,
        differentiable=all(t.differentiable for t in traits),
        remote=any(t.remote for t in traits),
        licence="; ".join(dict.fromkeys(t.licence for t in traits if t.licence)),
    )


class Ensemble:
    """Several rewards as one: their mean, minimum, or mean minus kappa deviations (Helping or Herding?, arXiv 2312.09244).

    Ensembles do not see what all members miss: mix families, not seeds.
    """

    def __init__(
        self,
        of: Mapping[str, Any] | Sequence[Any],  #: Rewards, or {label: weight}; weights count in the mean.
        #: mean, min, or mean_std: mean - kappa std, the sample deviation over members.
        reduce: Literal["mean", "min", "mean_std"] = "mean",
        kappa: float = 1.0,  #: Deviations that mean_std takes off.
        #: First subtract each member's mean over the batch and divide by its deviation, for members on different scales.
        standardize: bool = False,
    ):
        if reduce not in ("mean", "min", "mean_std"):
            raise ValueError(f"ensemble: reduce={reduce!r}: choose mean, min or mean_std")
        loaded = load_rewards(of)
        if len(loaded) < 2:
            raise ValueError("ensemble: `of` wants at least two rewards")
        self.of = [reward for reward, _ in loaded.values()]
        self.weights = torch.tensor([weight for _, weight in loaded.values()])
        if not bool((self.weights > 0).all()):
            raise ValueError("ensemble: the weights of its members must be positive")
        self.reduce, self.kappa, self.standardize, self.name = reduce, kappa, standardize, "ensemble"
        ranges = [traits_of(reward).range for reward in self.of]
        bounds = (min(low for low, _ in ranges), max(high for _, high in ranges))
        plain = not standardize and reduce != "mean_std"
        self.traits = joint_traits(self.of, bounds if plain else (-math.inf, math.inf))
        if standardize:
            self.traits = replace(self.traits, arity="batch")

    def __call__(self, samples: Samples) -> Tensor:
        return combined(self.members(samples), self.weights, self.reduce, self.kappa)

    def members(self, samples: Samples) -> Tensor:
        """(N, M): what each member says."""
        values = torch.stack([as_scores(reward(samples), len(samples), reward.name) for reward in self.of], 1)
        if not self.standardize:
            return values
        centred = values - values.nanmean(0)
        deviation = centred.square().nanmean(0).sqrt()
        return torch.where(deviation > 1e-8, centred / deviation.clamp(min=1e-8), 0.0 * centred)


def combined(values: Tensor, weights: Tensor, reduce: str, kappa: float = 1.0) -> Tensor:
    """Members (N, M) as one number each (N,); NaN members are left out."""
    valid = ~values.isnan()
    known = values.nan_to_num(0.0)
    w = weights * valid
    mean = (w * known).sum(1) / w.sum(1).clamp(min=1e-12)
    if reduce == "min":
        result = values.masked_fill(~valid, math.inf).amin(1)
    elif reduce == "mean_std":
        plain = known.sum(1) / valid.sum(1).clamp(min=1)
        variance = (torch.where(valid, known - plain[:, None], 0.0) ** 2).sum(1) / (valid.sum(1) - 1).clamp(min=1)
        result = mean - kappa * variance.sqrt()
    else:
        result = mean
    return torch.where(valid.any(1), result, torch.nan)


class Gate:
    """A reward held back by another one, a in [0, 1] (arXiv 2601.03468 adds an artifact reward so, linearly).

    A product is what no size of r can trade off; a sum is outweighed by a large r.
    """

    def __init__(
        self,
        of: Any,  #: The reward r.
        by: Any,  #: The reward a that holds it back, in [0, 1].
        #: multiply: r a^power, for an r that is never negative (shape it by a sigmoid first). add: r - cost (1 - a).
        #: threshold: r where a reaches `at`, else `otherwise`.
        how: Literal["multiply", "add", "threshold"] = "multiply",
        power: float = 1.0,  #: Of a, in multiply.
        cost: float = 1.0,  #: What a = 0 takes off, in add.
        at: float = 0.5,  #: Where a lets r pass, in threshold.
        otherwise: float = 0.0,  #: The reward below that.
    ):
        if how not in ("multiply", "add", "threshold"):
            raise ValueError(f"gate: how={how!r}: choose multiply, add or threshold")
        self.of = [load_reward(of), load_reward(by)]
        self.how, self.power, self.cost, self.at, self.otherwise = how, power, cost, at, otherwise
        self.name = self.of[0].name
        (low, high), (least, most) = (traits_of(reward).range for reward in self.of)
        if least < 0 or most > 1:
            raise ValueError(f"gate: {self.of[1].name} has values in [{least}, {most}], a gate's lie in [0, 1]: shape it first")
        if how == "multiply" and low < 0:
            raise ValueError(
                f"gate: {self.name} may be negative (it lies in [{low}, {high}]), and a factor would then reward what it should "
                "hold back: shape it by a sigmoid round its usual value, or use how=add"
            )
        bounds = {
            "multiply": (0.0, high),
            "add": (low - cost, high),
            "threshold": (min(low, otherwise), max(high, otherwise)),
        }
        self.traits = joint_traits(self.of, bounds[how])

    def __call__(self, samples: Samples) -> Tensor:
        r, a = (as_scores(reward(samples), len(samples), reward.name) for reward in self.of)
        if self.how == "add":
            return r - self.cost * (1 - a)
        if self.how == "threshold":
            return torch.where(a.isnan(), torch.nan, torch.where(a >= self.at, r, self.otherwise))
        if bool((r < 0).any()):
            raise RewardError(
                f"reward {self.name!r} says that it lies above 0 and is {float(r[~r.isnan()].min()):.3g}: a factor would reward "
                "what it should hold back"
            )
        return r * a**self.power


class Tree:
    """A hierarchy of criteria (HiCoGen, CVPR 2026: global + subject + relation). Nodes are rewards, or trees again.

    The paper's weights are not published; ours are the recipe's.
    """

    def __init__(
        self,
        of: Mapping[str, Any],  #: {label: weight} or {label: {weight: ..., name: ..., option: ...}}.
        #: Weighted sum or mean, min, softmin, or product (weights are exponents; values in [0, 1]).
        combine: Literal["sum", "mean", "min", "softmin", "product"] = "mean",
        #: A label whose value must reach `at`, else the other nodes count as 0: what is absent has no position.
        requires: str | None = None,
        at: float = 0.5,  #: What `requires` wants.
        temperature: float = 0.1,  #: Of softmin: the smaller, the nearer to min.
    ):
        if combine not in ("sum", "mean", "min", "softmin", "product"):
            raise ValueError(f"tree: combine={combine!r}: choose sum, mean, min, softmin or product")
        loaded = load_rewards(of)
        self.labels = list(loaded)
        if requires is not None and requires not in self.labels:
            raise ValueError(f"tree: requires={requires!r} is none of its nodes {', '.join(self.labels)}")
        self.of = [reward for reward, _ in loaded.values()]
        self.weights = torch.tensor([weight for _, weight in loaded.values()])
        self.combine, self.requires, self.at, self.temperature, self.name = combine, requires, at, temperature, "tree"
        self.traits = joint_traits(self.of)

    def nodes(self, samples: Samples) -> Tensor:
        """(N, M), columns as in `labels`, after `requires`."""
        values = torch.stack([as_scores(reward(samples), len(samples), reward.name) for reward in self.of], 1)
        if self.requires is not None:
            parent = self.labels.index(self.requires)
            others = torch.arange(len(self.labels)) != parent
            values = torch.where((values[:, parent] < self.at)[:, None] & others & ~values.isnan(), 0.0, values)
        return values

    def __call__(self, samples: Samples) -> Tensor:
        values = self.nodes(samples)
        valid = ~values.isnan()
        if self.combine == "softmin":
            return softmin(values, self.temperature, 1)
        if self.combine == "product":
            result = values.clamp(min=0).nan_to_num(1.0).pow(torch.where(valid, self.weights, 0.0)).prod(1)
            return torch.where(valid.any(1), result, torch.nan)
        if self.combine == "sum":
            return torch.where(valid.any(1), (values.nan_to_num(0.0) * self.weights).sum(1), torch.nan)
        return combined(values, self.weights, self.combine)
