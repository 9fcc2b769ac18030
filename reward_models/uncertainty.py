"""How sure a reward is of itself: Ctrl-U (grenoble-zhang/Ctrl-U) carried over to rewards that need no gradient.

Ctrl-U lets two generations of one condition disagree, u = |o1 - o2|, and weighs its reward loss by exp(-u). Here:

    r_i = mean_i - kappa u_i                              a reward: what one can be sure of
    w_i = exp(-u_i / tau) / mean_j exp(-u_j / tau)        weights of advantages, mean 1: `confidence`

u_i is the deviation over views of one picture ("augment") or over rewards ("members"), what the reward itself says ("sigma"), or
how far the samples of one prompt disagree ("pairs", Ctrl-U's own; it holds back whole prompts, as their samples share it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.batch import Samples
from flowrl.data import generators
from flowrl.reward_models.base import Traits, as_scores, load_reward, load_rewards, traits_of
from flowrl.reward_models.composite import joint_traits

Kind = Literal["augment", "members", "sigma", "pairs"]


def confidence(u: Tensor, tau: float | None = None) -> Tensor:
    """w = exp(-u / tau), (N,), divided by its mean over the samples whose u is known; 1 for the others (NaN).

    tau: in the units of the reward; None for the mean of u, so that a sample as unsure as most has weight about 1.
    """
    known = ~u.isnan()
    scale = float(u[known].mean()) if tau is None and known.any() else tau or 1.0
    w = torch.exp(-(u - u[known].amin() if known.any() else u) / max(scale, 1e-12))  # the least one drops out of the ratio
    return torch.where(known, w / w[known].mean(), 1.0)


def spread(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sample deviation over the views (N, V) that are no NaN; NaN where fewer than two are left."""
    valid = ~values.isnan()
    count = valid.sum(1)
    mean = values.nan_to_num(0.0).sum(1) / count.clamp(min=1)
    variance = torch.where(valid, values - mean[:, None], 0.0).square().sum(1) / (count - 1).clamp(min=1)
    u = variance.clamp(min=1e-24).sqrt()  # a derivative where all views agree: 0
    return torch.where(count > 1, mean, torch.nan), torch.where(count > 1, u, torch.nan)


def disagreement(r: Tensor, group: Tensor) -> Tensor:
    """Mean |r_j - r_k| over the pairs of a sample's group, (N,): equal for all of its members. NaN where there is no pair."""
    u = torch.full_like(r, torch.nan)
    for g in group.unique():
        rows = ((group == g).to(r.device) & ~r.isnan()).nonzero()[:, 0]
        if len(rows) > 1:
            u[rows] = torch.pdist(r[rows, None].double(), p=1).mean().to(r.dtype)
    return u


def jittered(images: Tensor, seeds: Sequence[int], view: int, shift: float = 1 / 32, light: float = 0.03) -> Tensor:
    """The same picture to anybody who looks: moved by up to `shift` of its sides, brighter or darker by up to `light`.

    images: (N, 3, H, W) or clips (N, F, 3, H, W), whose frames move together; in [0, 1]. No flips: left and right mean something.
    """
    by = [max(1, round(side * shift)) for side in images.shape[-2:]]
    rows = []
    for image, generator in zip(images, generators(seeds, offset=1), strict=True):
        draws = torch.rand(view, 3, generator=generator)[-1]  # of view 1, 2, ...
        top, left = (int(draw * (2 * n + 1)) for draw, n in zip(draws[:2], by, strict=True))
        frames = F.pad(image[None] if image.ndim == 3 else image, (by[1], by[1], by[0], by[0]), mode="replicate")
        moved = frames[..., top : top + image.shape[-2], left : left + image.shape[-1]].reshape(image.shape)
        rows.append(moved * (1 + light * (2 * float(draws[2]) - 1)))
    return torch.stack(rows).clamp(0, 1)


class Uncertain:
    """mean - kappa u of a reward: what one can be sure of, where u is its own doubt about the sample (after Ctrl-U).

    A sample for which u is unknown abstains. With the recipe's `confidence` set to its label, advantages are weighed by
    exp(-u / tau), divided by its mean over the batch; with a weight of 0 that is all it does.
    """

    def __init__(
        self,
        of: Any,  #: A reward, by name, or {name: ..., option: ...}; of `members` several, on one scale.
        #: Where u comes from. augment: the deviation over `views` of one picture, moved and lit a little differently. members:
        #: the deviation over several rewards. sigma: what the reward itself says, such as a preference model with a gaussian
        #: head. pairs: how far the samples of one prompt disagree (Ctrl-U's own), which holds back whole prompts.
        kind: Kind = "augment",
        views: int = 4,  #: How often `augment` asks, once about the picture as it is.
        kappa: float = 1.0,  #: How much doubt costs, in units of u.
        tau: float | None = None,  #: Of the weights exp(-u / tau), in units of the reward; unset: the batch's mean u.
    ):
        if kind not in ("augment", "members", "sigma", "pairs"):
            raise ValueError(f"uncertain: kind={kind!r}: choose augment, members, sigma or pairs")
        if views < 2 or not math.isfinite(kappa) or (tau is not None and not tau > 0):
            raise ValueError(f"uncertain: views={views} must be at least 2, kappa={kappa} finite and tau={tau} positive")
        self.of: Any
        if kind == "members":
            self.of = [reward for reward, _ in load_rewards(of).values()]
            if len(self.of) < 2:
                raise ValueError("uncertain: kind=members wants several rewards in `of`")
        else:
            self.of = load_reward(of)
            if kind == "sigma" and not hasattr(self.of, "distribution"):
                raise ValueError(f"uncertain: reward {self.of.name!r} does not say how sure it is; use kind=augment")
        self.kind, self.views, self.kappa, self.tau = kind, views, kappa, tau
        self.name = "uncertain"
        self.traits = self._traits()

    def _traits(self) -> Traits:
        traits = joint_traits(self.of) if self.kind == "members" else traits_of(self.of)
        if self.kind == "pairs" and traits.arity == "point":
            traits = replace(traits, arity="group")
        return traits if self.kappa == 0 and self.kind != "members" else replace(traits, range=(-math.inf, math.inf))

    def distribution(self, samples: Samples) -> Tensor:
        """(N, 2): mean and u; both NaN where u is unknown."""
        if self.kind == "sigma":
            return self.of.distribution(samples)
        if self.kind == "pairs":
            r = as_scores(self.of(samples), len(samples), self.name)
            u = disagreement(r, samples.group)
            return torch.stack([torch.where(u.isnan(), torch.nan, r), u], 1)
        if self.kind == "members":
            values = [as_scores(reward(samples), len(samples), reward.name) for reward in self.of]
        else:
            values = [as_scores(self.of(seen), len(samples), self.name) for seen in self._views(samples)]
        return torch.stack(spread(torch.stack(values, 1)), 1)

    def _views(self, samples: Samples) -> list[Samples]:
        images = samples.images
        assert images is not None
        others = [jittered(images, samples.seeds, view) for view in range(1, self.views)]
        return [samples, *(replace(samples, images=view) for view in others)]

    def __call__(self, samples: Samples) -> Tensor:
        mean, u = self.distribution(samples).unbind(1)
        return mean - self.kappa * u

    def confidence(self, samples: Samples) -> Tensor:
        """(N,) fp32, mean 1: what to multiply the samples' advantages by. Asks the reward anew."""
        with torch.no_grad():
            return confidence(self.distribution(samples)[:, 1].float(), self.tau)
