"""What scores and sets of pictures say, and how surely: bootstrap intervals, win rates, diversity, distances of distributions.

Prompts are what an evaluation draws from a population; the seeds of a prompt are nested in it. A prompt's mean carries the noise
of its seeds, so resampling prompts carries both, and resampling seeds within them would count that noise twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.stats import norm, t
from torch import Tensor
from torch.nn import functional as F

from flowrl.reward_models.gaussians import frechet_distance, moments, shrunk
from flowrl.reward_models.set_functions import median_distance, mmd, rbf, vendi_score

TIE = 1.5e-6  #: Scores are saved with six decimals: what lies closer together is a tie.
MOST = 2000  #: Samples whose kernels are compared, of each set; beyond, evenly chosen ones.

# ------------------------------------------------------------------------------------------------ intervals


def interval(
    values: np.ndarray, strata: Sequence[object] | None = None, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of the mean of `values` (P,), without NaN, over prompts; NaN from fewer than two.

    strata: (P,) the mean is that of the means of the strata, each resampled by itself. The percentiles are widened as Student's t
    widens a normal interval (Hesterberg, The American Statistician 69(4), 2015): plain ones are too narrow by sqrt((P - 1) / P)
    and by the tails of t, which shows below 30 prompts.
    """
    groups = _groups(strata, len(values))
    freedom = len(values) - len(groups)
    if freedom < 1:
        return float("nan"), float("nan")
    rng = np.random.default_rng(0)
    means = np.zeros(resamples)
    for start in range(0, resamples, 1000):
        part = means[start : start + 1000]
        for rows in groups:
            part += values[rows[rng.integers(0, len(rows), (len(part), len(rows)))]].mean(1) / len(groups)
    tail = norm.cdf(t.ppf((1 - level) / 2, freedom) * np.sqrt(len(values) / freedom))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def mean_of(values: np.ndarray, strata: Sequence[object] | None = None) -> float:
    """The mean of `values` (P,), or of the means of their strata; NaN of nothing."""
    means = [values[rows].mean() for rows in _groups(strata, len(values)) if len(rows)]
    return float(np.mean(means)) if means else float("nan")


def _groups(strata: Sequence[object] | None, count: int) -> list[np.ndarray]:
    """Indices of each stratum, or of everything."""
    if strata is None:
        return [np.arange(count)]
    return [np.array([i for i, other in enumerate(strata) if other == name]) for name in dict.fromkeys(strata)]


# ------------------------------------------------------------------------------------------------ wins


@dataclass(frozen=True)
class Wins:
    """Shares of pairs (same prompt, same seed) that tuned wins, ties, loses; rate = wins + ties / 2, with a 95 % interval."""

    wins: float
    ties: float
    losses: float
    low: float
    high: float

    @property
    def rate(self) -> float:
        return self.wins + self.ties / 2


def win_rate(base: np.ndarray, tuned: np.ndarray, tie: float = TIE) -> Wins:
    """Pair by pair. base, tuned: (P, S) scores of the same prompts and seeds; pairs with a NaN are left out.

    Each prompt counts as one, however many of its pairs are there. tie: differences up to it are ties.
    """
    gap = tuned - base
    played = ~np.isnan(gap)
    some = played.any(1)
    if not some.any():
        return Wins(*[float("nan")] * 5)
    gap, played = gap[some], played[some]
    won, lost = (((sign * gap > tie) & played).sum(1) / played.sum(1) for sign in (1, -1))
    low, high = interval((1 + won - lost) / 2)
    return Wins(float(won.mean()), float((1 - won - lost).mean()), float(lost.mean()), low, high)


# ------------------------------------------------------------------------------------------------ diversity


def pairwise_distance(x: Tensor) -> Tensor:
    """Mean of 1 - cosine over the pairs of each prompt's samples, in [0, 2]. x: (P, S, d) features; (P,), NaN for S = 1."""
    x = F.normalize(x.double(), dim=-1)
    count = x.shape[1]
    similar = (x @ x.mT).sum((1, 2)) - count  # without the diagonal
    return 1 - similar / (count * (count - 1)) if count > 1 else torch.full((len(x),), torch.nan, dtype=torch.float64)


def vendi(x: Tensor) -> Tensor:
    """How many different samples each prompt has, in [1, S]: Vendi score, arXiv 2210.02410, cosine kernel. x: (P, S, d); (P,)."""
    x = F.normalize(x.double(), dim=-1)
    return vendi_score(x @ x.mT) if x.shape[1] > 1 else torch.full((len(x),), torch.nan, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ distances of distributions


def frechet(x: Tensor, y: Tensor, shrinkage: float = 0.1) -> float:
    """Frechet distance of Gaussians with the moments of x (n, d) and y (m, d), both covariances shrunk."""
    return float(frechet_distance(shrunk(moments(x), shrinkage), shrunk(moments(y), shrinkage)))


def mmd_squared(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Unbiased squared maximum mean discrepancy with a Gaussian kernel; around 0, and below it too, for equal distributions."""
    k = partial(rbf, scale=bandwidth)
    return float(mmd(k(x, x), k(x, y), k(y, y)))


@dataclass(frozen=True)
class Distance:
    """A distance, what equal distributions would give (the mean over relabellings), and the share of those at least as far."""

    value: float
    equal: float
    p: float


def distance(measure: Callable[[Tensor, Tensor], float], count: int, seeds: int = 1, relabellings: int = 49) -> Distance:
    """Between two models' samples of the same prompts: a permutation test that keeps the pairs.

    measure: of two sets of rows, where rows 0 ... count - 1 are one model's samples and the next `count` the other's. Were the
    models equal, who drew which would not matter: the samples of a prompt change places, all `seeds` of them together, for half
    of the prompts. p is at least 1 / (1 + relabellings).
    """
    rng, rows = np.random.default_rng(0), torch.arange(count)
    found, others = measure(rows, rows + count), []
    for _ in range(relabellings):
        moved = count * torch.from_numpy(rng.random(count // seeds) < 0.5).repeat_interleave(seeds)
        others.append(measure(rows + moved, rows + count - moved))
    return Distance(found, float(np.mean(others)), (1 + sum(other >= found for other in others)) / (1 + relabellings))


def distances(x: Tensor, y: Tensor, seeds: int = 1) -> dict[str, Distance]:
    """Frechet and MMD between two models' samples of the same prompts, features (P * seeds, d).

    Prompts with features that are not finite are left out; nothing where fewer than three are left.
    """
    x, y = (rows.double().unflatten(0, (-1, seeds)) for rows in (x, y))
    x, y = (rows[(x.isfinite() & y.isfinite()).all(2).all(1)] for rows in (x, y))
    x, y = (rows[_evenly(len(rows), MOST // seeds)].flatten(0, 1) for rows in (x, y))
    if len(x) < 3 * seeds:
        return {}
    z = torch.cat([x, y])
    kernel = rbf(z, z, median_distance(x))
    return {
        "frechet": distance(lambda a, b: frechet(z[a], z[b]), len(x), seeds),
        "mmd": distance(lambda a, b: float(mmd(kernel[a][:, a], kernel[a][:, b], kernel[b][:, b])), len(x), seeds),
    }


def distances_to(x: Tensor, reference: Tensor) -> dict[str, float]:
    """Frechet and MMD between samples (n, d) and reference pictures (m, d), which share no prompts with them."""
    x, reference = (rows[rows.isfinite().all(1)].double() for rows in (x, reference))
    if min(len(x), len(reference)) < 3:
        return {}
    x, reference = (rows[_evenly(len(rows), MOST)] for rows in (x, reference))
    return {"frechet": frechet(x, reference), "mmd": mmd_squared(x, reference, median_distance(reference))}


def _evenly(count: int, most: int) -> Tensor:
    """At most `most` of 0 ... count - 1, evenly."""
    most = max(1, most)
    return torch.arange(count) if count <= most else torch.arange(most) * count // most
