"""The test for drifts: its bets by hand, fair to the last digit, its false alarms by simulation, and what it finds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import pytest
from scipy.stats import ttest_rel

from flowrl.train.trends import SLOPES, Repeated, Trend


def trend_of(values: Iterable[float]) -> Trend:
    trend = Trend()
    for step, value in enumerate(values, 1):
        trend.add(step, value)
    return trend


def found_at(values: Iterable[float], alpha: float) -> tuple[int, bool, int] | None:
    """The step at which a drift is certain, whether it goes up, and since when; None if it never is."""
    trend = Trend()
    for step, value in enumerate(values, 1):
        trend.add(step, value)
        for up in (True, False):
            drift = trend.drift(up)
            if drift is not None and drift.evidence >= math.log(1 / alpha):
                return step, up, drift.since
    return None


# ------------------------------------------------------------------------------------------------ the bets


def test_slope_by_hand():
    """1, 2, 4: of the values since step 1 the ranks are 2 of 2 and 3 of 3, z = (2 - 1.5) / sqrt(3 / 12) = 1 and
    (3 - 2) / sqrt(8 / 12) = 1.2247; since step 2 there is one rank, 2 of 2.

    Evidence since step 1: S = 2.2247, m = 3: 2.2247^2 / 6 - log(3) / 2 - log(2 x 1 x 2) = 0.8249 - 0.5493 - 1.3863 = -1.1107."""
    trend = trend_of([1, 2, 4])
    assert trend.sums == pytest.approx([2.22474, 1, 0], abs=1e-5)
    drift = trend.drift(True)
    assert drift is not None and drift.evidence == pytest.approx(-1.1107, abs=1e-4)
    assert (drift.since, drift.start, drift.now) == (1, 2, 2)
    down = trend.drift(False)  # no slope goes down, and a shift downwards has lost most of its stake
    assert down is not None and down.evidence < -3


def test_shift_by_hand():
    """5, 7, 6: behind the first value every gap below 5 has s = -1/2, above it 1/2. Two gaps are open to 7, three to 6, of which
    two lie above 5. With a = 2: e / ((e + 1/e) / 2) x e / ((2 e + 1/e) / 3) = 1.7616 x 1.4049 = 2.4749.

    Behind 5 and 7, s of the three gaps is -1/2, 0, 1/2, and 6 falls into the middle one: 1 / ((e + 1 + 1/e) / 3) = 0.7342."""
    capital = np.exp(trend_of([5, 7, 6]).capital)
    assert capital.shape == (2, len(SLOPES))
    assert capital[:, 0] == pytest.approx([2.4749, 0.7342], abs=1e-4)
    assert capital[1, :3] == pytest.approx(capital[1, 3:])  # up and down alike, from the middle


def test_no_bet_gains_by_chance():
    """Over all 120 orders of five values the mean capital of every bet on a shift is 1 to the last digit, and that of no bet on a
    slope exceeds 1: this is the whole proof of the false alarms."""
    trends = [trend_of(order) for order in itertools.permutations([0.1, 3, 4, 40, 1000])]
    shifts = np.mean([np.exp(trend.capital) for trend in trends], 0)
    assert shifts == pytest.approx(np.ones((4, len(SLOPES))), abs=1e-12)
    m = np.arange(5, 0, -1)
    slopes = np.mean([np.exp(trend.sums**2 / (2 * m)) / np.sqrt(m) for trend in trends], 0)
    assert (slopes <= 1).all() and slopes[0] > 0.7


def test_only_the_order_counts():
    """An outlier weighs as much as any largest value, and a monotone function changes nothing."""
    values = np.random.default_rng(0).standard_normal(20)
    plain, bent = trend_of(values), trend_of(np.exp(5 * values))
    assert np.array_equal(plain.sums, bent.sums) and np.array_equal(plain.capital, bent.capital)


# ------------------------------------------------------------------------------------------------ false alarms


def test_false_alarms_stay_below_their_bound():
    """80 runs of 40 steps in which nothing drifts, for each of three distributions, at alpha = 0.2: bounded by 16 runs, expected
    to be fewer, since the bound adds up what overlaps. Ties in four fifths of the values are no signs either."""
    rng = np.random.default_rng(0)
    draws = {
        "normal": rng.standard_normal,
        "heavy tails": rng.standard_cauchy,
        "mostly zero": lambda n: (rng.random(n) < 0.2) * rng.random(n),
    }
    for name, draw in draws.items():
        alarms = sum(found_at(draw(40), 0.2) is not None for _ in range(80))
        assert alarms <= 16, name
        assert name != "normal" or alarms >= 2  # the bound is not so loose that it never errs


def test_a_constant_series_does_not_drift():
    assert found_at([0.0] * 200, 0.05) is None


# ------------------------------------------------------------------------------------------------ what it finds

NOISE = np.random.default_rng(1).standard_normal(100)
STEPS = np.arange(100)


@pytest.mark.parametrize(
    ("series", "up", "within", "since"),
    [
        (STEPS[:20] * 1.0, True, (10, 13), (1, 2)),
        (-STEPS[:20] * 1.0, False, (10, 13), (1, 2)),
        (NOISE - 0.05 * STEPS, False, (30, 70), (1, 40)),
        (NOISE + 4 * (STEPS >= 50), True, (54, 66), (47, 53)),
        (NOISE - 8 * (STEPS >= 90), False, (94, 99), (88, 92)),
    ],
    ids=["monotone", "monotone down", "five deviations in a hundred steps", "a jump of four", "a late jump of eight"],
)
def test_a_drift_is_found(series, up, within, since):
    """At alpha = 0.01 / 14, the share of one of 14 series."""
    found = found_at(series, 0.01 / 14)
    assert found is not None and found[1] == up
    assert within[0] <= found[0] <= within[1]
    assert since[0] <= found[2] <= since[1]


def test_a_fall_from_a_peak_is_found_above_the_start():
    """Up by 8 in 40 steps and down by 5 in the next 50: still higher than it began, and yet a fall that begins at the peak."""
    values = np.minimum(0.2 * STEPS, 8 - 0.1 * (STEPS - 40))[:90] + 0.5 * NOISE[:90]
    trend = trend_of(values)
    drift = trend.drift(False)
    assert drift is not None and drift.evidence > math.log(1400)
    assert 35 <= drift.since <= 48 and drift.start > drift.now > np.median(values[:5])


def test_levels_before_and_now():
    """Ten values around 1, then six of 3: medians of all before, and of the last five."""
    trend = trend_of([0.9, 1.1, 1, 1.05, 0.95, 1, 1.02, 0.98, 1, 1, *[3 + 0.01 * i for i in range(6)]])
    drift = trend.drift(True)
    assert drift is not None and drift.since == 11
    assert (drift.start, drift.now) == pytest.approx((1, 3.03))


# ------------------------------------------------------------------------------------------------ series


def test_what_is_not_finite_is_left_out():
    trend = Trend()
    for step, value in [(1, 1.0), (2, math.nan), (3, 2.0), (4, math.inf)]:
        trend.add(step, value)
    assert trend.steps == [1, 3] and trend.values.tolist() == [1, 2]
    assert Trend().drift(True) is None


def test_a_series_goes_on_from_its_state():
    """To the bit, with ties."""
    values = np.round(np.random.default_rng(2).standard_normal(30), 1)
    whole, first = trend_of(values), trend_of(values[:13])
    rest = Trend()
    rest.load_state_dict(first.state_dict())
    for step, value in enumerate(values[13:], 14):
        rest.add(step, value)
    assert rest.steps == whole.steps
    for name in ("values", "sums", "capital", "gaps"):
        assert np.array_equal(getattr(rest, name), getattr(whole, name))


# ------------------------------------------------------------------------------------------------ evaluations


def test_evaluations_are_compared_by_pairs():
    """20 items that each lose about 0.1 while they differ among each other by far more. Of the third evaluation each of 2 earlier
    ones is compared at 1 / (3 x 4) of the error: evidence is -log(12 p)."""
    rng = np.random.default_rng(0)
    items = rng.random(20) * 5
    first, second, third = items, items + 0.02 * rng.standard_normal(20), items - 0.1 + 0.05 * rng.standard_normal(20)
    repeated = Repeated()
    repeated.add(10, first)
    assert repeated.fall() is None
    repeated.add(20, second)
    repeated.add(30, third)
    drift = repeated.fall()
    assert drift is not None and drift.since in (10, 20) and not drift.up
    p = min(ttest_rel(third, before, alternative="less").pvalue for before in (first, second))
    assert drift.evidence == pytest.approx(-math.log(12 * p)) and drift.evidence > 5
    again = Repeated()
    again.load_state_dict(repeated.state_dict())
    assert again.fall() == drift


def test_equal_or_better_evaluations_have_not_fallen():
    """Where the weights did not move, differences are 0 and no t-test is possible; items that abstain are left out."""
    for after in ([1.0, 2.0, 3.0], [1.5, 2.2, 3.1], [math.nan, 1.0, math.nan]):
        repeated = Repeated()
        repeated.add(1, [1.0, 2.0, 3.0])
        repeated.add(2, after)
        assert repeated.fall() is None
