"""Statistics of evaluations, against hand arithmetic, closed forms and simulated data with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, t

from flowrl.statistics import (
    distances,
    distances_to,
    frechet,
    interval,
    mean_of,
    mmd_squared,
    pairwise_distance,
    vendi,
    win_rate,
)

NAN = math.nan

# ------------------------------------------------------------------------------------------------ intervals


@pytest.mark.parametrize(("prompts", "seeds", "low", "high"), [(8, 4, 0.91, 0.97), (40, 2, 0.93, 0.97)])
def test_an_interval_covers_the_truth_as_often_as_it_says(prompts, seeds, low, high):
    """Scores = prompt (deviation 1) + seed (deviation 2), mean 0, in 600 simulated evaluations: 95 % intervals hold 0 in 95 %.

    Of 600, the share is 0.95 +- 0.018 (two deviations). Resampling only the seeds within prompts would cover far less.
    """
    rng = np.random.default_rng(3)
    held = nested = 0
    for _ in range(600):
        scores = rng.normal(0, 1, (prompts, 1)) + rng.normal(0, 2, (prompts, seeds))
        a, b = interval(scores.mean(1), resamples=1000)
        held += a <= 0 <= b
        within = scores[:, rng.integers(0, seeds, (200, seeds))].mean((0, 2))
        nested += np.quantile(within, 0.025) <= 0 <= np.quantile(within, 0.975)
    assert low <= held / 600 <= high
    assert nested / 600 < 0.9


def test_few_prompts_get_the_width_of_students_t():
    """Ten values of mean 0 and deviation 1: plain percentiles reach +-1.96 sqrt(9 / 10) / sqrt(10) = +-0.588, Student's interval
    +-t(0.975, 9) / sqrt(10) = +-0.715. The widened one is near the latter."""
    values = norm.ppf((np.arange(10) + 0.5) / 10)
    values /= values.std(ddof=1)
    low, high = interval(values)
    assert t.ppf(0.975, 9) / math.sqrt(10) == pytest.approx(0.715, abs=0.001)
    assert high == pytest.approx(0.715, abs=0.04) and low == pytest.approx(-0.715, abs=0.04)


def test_strata_are_resampled_by_themselves():
    """Two kinds, one always 0 (8 prompts), one always 1 (2 prompts): the mean of kinds is 1/2 whatever is drawn."""
    values, kinds = np.array([0.0] * 8 + [1.0] * 2), ["a"] * 8 + ["b"] * 2
    assert mean_of(values, kinds) == 0.5 and mean_of(values) == 0.2
    assert interval(values, kinds) == (0.5, 0.5)
    low, high = interval(values)
    assert low < 0.1 and high > 0.4


def test_nothing_to_resample():
    assert all(math.isnan(bound) for bound in interval(np.array([1.0])))
    assert all(math.isnan(bound) for bound in interval(np.array([])))
    assert all(math.isnan(bound) for bound in interval(np.array([1.0, 2.0]), ["a", "b"]))  # one prompt of each kind
    assert math.isnan(mean_of(np.array([])))


# ------------------------------------------------------------------------------------------------ wins


def test_win_rate_by_hand():
    """Prompt 1: win, loss. Prompt 2: tie, tie. Prompt 3: win, and a pair without a score. Prompt 4: no pair, left out.

    Shares of wins 1/2, 0, 1: mean 1/2. Ties 0, 1, 0: 1/3. Losses 1/2, 0, 0: 1/6. Rate = 1/2 + 1/6 = 2/3.
    """
    base = np.array([[0.0, 1.0], [5.0, 5.0], [0.0, NAN], [NAN, 1.0]])
    tuned = np.array([[1.0, 0.0], [5.0, 5.0 + 1e-7], [2.0, 1.0], [0.0, NAN]])
    w = win_rate(base, tuned)
    assert (w.wins, w.ties, w.losses, w.rate) == pytest.approx((1 / 2, 1 / 3, 1 / 6, 2 / 3))
    assert w.wins + w.ties + w.losses == pytest.approx(1.0)
    assert 0 <= w.low <= w.rate <= w.high <= 1
    reverse = win_rate(tuned, base)
    assert (reverse.rate, reverse.low, reverse.high) == pytest.approx((1 - w.rate, 1 - w.high, 1 - w.low))
    assert math.isnan(win_rate(base * NAN, tuned).rate)


def test_a_tie_may_be_wider():
    base, tuned = np.array([[0.0], [0.0]]), np.array([[0.05], [0.2]])
    assert win_rate(base, tuned).wins == 1.0 and win_rate(base, tuned, tie=0.1).wins == 0.5


# ------------------------------------------------------------------------------------------------ diversity


def test_diversity_of_equal_and_of_orthogonal_samples():
    """Four equal samples: distance 0, one of a kind. Four orthogonal ones: distance 1, four different ones. Two pairs of equals:
    of 6 pairs 4 are orthogonal, so 4/6; exp(entropy of (1/2, 1/2)) = 2. Lengths do not matter."""
    equal = torch.ones(4, 8)
    orthogonal = torch.eye(8)[:4] * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]
    pairs = torch.eye(8)[[0, 0, 1, 1]]
    x = torch.stack([equal, orthogonal, pairs])
    assert pairwise_distance(x).tolist() == pytest.approx([0.0, 1.0, 4 / 6], abs=1e-12)
    assert vendi(x).tolist() == pytest.approx([1.0, 4.0, 2.0], abs=1e-9)
    assert pairwise_distance(x[:, :1]).isnan().all() and vendi(x[:, :1]).isnan().all()


# ------------------------------------------------------------------------------------------------ distances


def test_frechet_of_shifted_and_scaled_gaussians():
    """N(0, I) and N(m, s^2 I) in 4 dimensions: |m|^2 + 4 (s - 1)^2; a shift of (1, 1, 0, 0) and s = 2 give 2 + 4 = 6."""
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = 2 * y + torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert frechet(x, y, shrinkage=0.0) == pytest.approx(6.0, abs=0.15)
    assert frechet(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet(x, y) == pytest.approx(frechet(y, x))


def test_mmd_of_gaussians_has_a_closed_form():
    """Kernel of width 1, N(0, 1) and N(m, 1): E k = sqrt(1/3) exp(-d^2/6) for means d apart,
    so MMD^2 = 2/sqrt(3) (1 - exp(-m^2/6))."""
    x = torch.randn(1500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.randn(1500, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 2
    assert mmd_squared(x, y, 1.0) == pytest.approx(2 / math.sqrt(3) * (1 - math.exp(-4 / 6)), abs=0.04)
    assert abs(mmd_squared(x, y - 2, 1.0)) < 0.005


def clouds(shift: float, prompts: int = 60, seeds: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Two models' features of the same prompts: a prompt's own place, noise of each sample, and a shift of the second model."""
    generator = torch.Generator().manual_seed(4)
    place = 3 * torch.randn(prompts, 1, 6, generator=generator)
    x, y = (place + torch.randn(prompts, seeds, 6, generator=generator) for _ in range(2))
    return x.flatten(0, 1), y.flatten(0, 1) + shift


def test_equal_models_are_as_far_apart_as_relabelled_ones():
    """Nothing but noise: the distance is like those of relabellings. A shift of one deviation: beyond all 49, so p = 1/50."""
    same, apart = distances(*clouds(0.0), seeds=2), distances(*clouds(1.0), seeds=2)
    for name in ("frechet", "mmd"):
        assert same[name].p > 0.1 and same[name].value < 2 * abs(same[name].equal) + 0.05
        assert apart[name].p == pytest.approx(1 / 50) and apart[name].value > 2 * apart[name].equal
    assert apart["frechet"].value == pytest.approx(6.0, rel=0.3)  # the shift: 6 dimensions x 1


def test_the_permutation_test_keeps_its_level():
    """Equal models, 40 times over: p is at most 0.1 in 4 of them on average (deviation 2), and above 1/2 in 20."""
    found: dict[str, list[float]] = {"frechet": [], "mmd": []}
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(30, 3, generator=generator) for _ in range(2))
        for name, distance in distances(x, y).items():
            found[name].append(distance.p)
    for values in found.values():
        assert sum(p <= 0.1 for p in values) <= 10 and 10 <= sum(p > 0.5 for p in values) <= 30


def test_what_is_not_finite_or_too_little_is_left_out():
    x, y = clouds(1.0)
    x[3] = torch.nan  # with it go both samples of its prompt, of both models
    keep = torch.tensor([i for i in range(len(x)) if i not in (2, 3)])
    assert distances(x, y, seeds=2) == distances(x[keep], y[keep], seeds=2)
    assert distances(x[4:8], y[4:8], seeds=2) == {} and distances_to(x[:2], y) == {}
    assert distances_to(x, y)["frechet"] == pytest.approx(frechet(x[[*keep.tolist(), 2]], y), rel=1e-6)


def test_large_sets_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr("flowrl.statistics.MOST", 20)
    x, y = clouds(1.0)
    few = torch.arange(0, 120).view(60, 2)[torch.arange(10) * 60 // 10].flatten()
    assert distances(x, y, seeds=2) == distances(x[few], y[few], seeds=2)
