"""Rewards of whole sets (DRAGON, arXiv 2504.15217): of each pair of samples, the one whose presence makes the better set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.batch import Samples
from flowrl.reward_models.distribution import Frechet
from flowrl.reward_models.gaussians import frechet_distance, moments, shrunk
from flowrl.reward_models.set_functions import better_half, median_distance, mmd, rbf, vendi_score

#: Of a set of features (n, d), lower is better.
Distance = Callable[[Tensor], Tensor]


def frechet_to(seen: Frechet, samples: Samples) -> Distance:
    """The Frechet distance to the exemplars, both covariances shrunk."""
    target = shrunk(seen.target(samples), seen.shrinkage)
    return lambda x: frechet_distance(shrunk(moments(x), seen.shrinkage), target)


def mmd_to(seen: Frechet, samples: Samples) -> Distance:
    """The kernel distance to the exemplars, by a Gaussian kernel as wide as their median distance."""
    r = seen.compared(samples)
    scale = median_distance(r)
    within = rbf(r, r, scale)
    return lambda x: mmd(rbf(x, x, scale), rbf(x, r, scale), within)


def sameness(seen: Frechet, samples: Samples) -> Distance:
    """Minus the number of different samples (Vendi score)."""

    def distance(x: Tensor) -> Tensor:
        x = F.normalize(x, dim=1)
        return -vendi_score(x @ x.T)

    return distance


SWEEPS = 10  #: How often exchanges are tried, at most; it ends where none helps, mostly after two or three.

#: Set rewards by name: from what sees pictures, and the samples, to the distance of a set.
DISTANCES: dict[str, Callable[[Frechet, Samples], Distance]] = {"frechet": frechet_to, "mmd": mmd_to, "vendi": sameness}


class SetReward:
    """Which member of each pair belongs to the better set.

    kind: a key of DISTANCES. features: what sees the pictures, see `flowrl.reward_models.features.load_features`. exemplars: what
    frechet and mmd compare with: "samples" for the references that come with samples, a folder of pictures, or a file of texts.
    Raises ValueError for an encoder that does not exist, or does not read texts.
    """

    def __init__(self, kind: str, features: str, exemplars: str):
        self.kind, self.exemplars = kind, "none" if kind == "vendi" else exemplars
        self.seen = Frechet(features, "samples" if kind == "vendi" else exemplars)

    def ordered(self, pairs: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
        """The pairs (n, 2) of rows of samples, the better one first, and which of them can be told, (n,) bool.

        At first the better set holds the first member of every pair; wherever it gains by the other one, the two change places. A
        pair with a feature that is not finite cannot be told. Raises ValueError for samples without pictures or exemplars.
        """
        if samples.images is None:
            raise ValueError(f"{self.kind} looks at the policy's own pictures, and data has none: use objective.better=instance")
        if self.exemplars == "samples" and samples.references is None:
            raise ValueError(
                f"{self.kind} compares with exemplars: set objective.exemplars to a folder of pictures or a file of texts, or "
                "provide them as references={name: base, count: 2}"
            )
        x, _ = self.seen.embedded(samples)
        pair_of = torch.arange(len(pairs)).repeat_interleave(2)
        first = torch.tensor([1.0, 0.0]).repeat(len(pairs))
        distance = DISTANCES[self.kind](self.seen, samples)
        better = better_half(x[pairs.flatten()], pair_of, distance, first, SWEEPS).reshape(-1, 2)
        return torch.where(better[:, :1], pairs, pairs.flip(1)), better.any(1)
