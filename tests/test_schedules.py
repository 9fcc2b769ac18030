"""Which steps are trained, and the time grid."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flowrl.samplers import SCHEDULES, AllButLast, Backward, Fraction, Late, Spread, Window, t_max_of, time_grid
from flowrl.samplers.schedules import DECAYS, cosine

ALL = [
    AllButLast(),
    Backward(2),
    Fraction(0.3),
    Fraction(1.0),
    Window(2),
    Window(3, low=2, high=9),
    Window(3, kind="fixed", low=6, high=9),
    Window(2, kind="progressive", every=1, high=9),
]


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_steps_are_sorted_distinct_and_never_the_last(schedule):
    for update in range(50):
        steps = schedule.steps(10, seed=3, update=update)
        assert steps == sorted(set(steps))
        assert len(steps) >= 1
        assert steps[0] >= 0
        assert steps[-1] <= 8
        assert all(type(step) is int for step in steps)


def test_all_but_last():
    assert AllButLast().steps(4, seed=0, update=7) == [0, 1, 2]


@pytest.mark.parametrize(("fraction", "num_steps", "count"), [(0.6, 11, 6), (0.29, 101, 29), (0.99, 10, 9), (0.01, 10, 1)])
def test_fraction_counts_whole_steps(fraction, num_steps, count):
    """0.29 * 100 is 28.999999999999996 in floating point and still means 29 steps; 0.01 * 9 still trains one."""
    assert len(Fraction(fraction).steps(num_steps, seed=0, update=0)) == count


def test_fraction_reaches_every_step_equally_often():
    """3 of 9 steps over 3000 updates: each 1000 times, standard deviation sqrt(3000 * 1/3 * 2/3) = 26."""
    counts = Counter(i for update in range(3000) for i in Fraction(1 / 3).steps(10, seed=5, update=update))
    assert set(counts) == set(range(9))
    assert all(abs(count - 1000) < 4 * 26 for count in counts.values())


def test_random_window_reaches_every_start_equally_often():
    """Size 2 in [1, 6): starts 1, 2, 3, 4, each 750 times of 3000, standard deviation 24. It never leaves [1, 6)."""
    starts: Counter[int] = Counter()
    for update in range(3000):
        first, second = Window(2, low=1, high=6).steps(10, seed=0, update=update)
        assert second == first + 1
        starts[first] += 1
    assert set(starts) == {1, 2, 3, 4}
    assert all(abs(count - 750) < 4 * 24 for count in starts.values())


def test_window_covers_the_noisy_half_by_default():
    seen = {i for update in range(200) for i in Window(2).steps(10, seed=0, update=update)}
    assert seen == {0, 1, 2, 3, 4}


def test_fixed_window_starts_at_low():
    assert {tuple(Window(3, low=2, high=9, kind="fixed").steps(10, seed=s, update=s)) for s in range(20)} == {(2, 3, 4)}


def test_progressive_window_advances_and_wraps():
    """Size 2 in [0, 4) has starts 0, 1, 2; with every=2 the updates 0..7 see 0 0 1 1 2 2 0 0."""
    window = Window(2, low=0, high=4, kind="progressive", every=2)
    assert [window.steps(10, seed=9, update=u)[0] for u in range(8)] == [0, 0, 1, 1, 2, 2, 0, 0]


@pytest.mark.parametrize("schedule", [Fraction(0.5), Window(2, high=19)], ids=str)
def test_random_schedules_change_with_update_and_seed(schedule):
    by_update = [tuple(schedule.steps(20, seed=0, update=u)) for u in range(40)]
    by_seed = [tuple(schedule.steps(20, seed=s, update=0)) for s in range(40)]
    shifted = [tuple(schedule.steps(20, seed=1, update=u)) for u in range(40)]
    assert len(set(by_update)) > 10
    assert len(set(by_seed)) > 10
    assert by_update != shifted
    assert by_update[1:] != shifted[:-1]  # seed and update are not merely added up


def test_answer_is_pinned():
    """Ranks, platforms and resumed runs must agree, so the values may never change. Python's hash() would not do.

    sha256("42 3") starts with c274ecd042d12253 in hex; modulo the 8 starts of a window of 2 in [0, 9) that is 3.
    """
    assert Window(2, high=9).steps(10, seed=42, update=3) == [3, 4]
    assert Fraction(0.5).steps(10, seed=42, update=3) == [1, 2, 4, 7]
    assert Window(2, high=9).steps(10, np.int64(42), np.int64(3)) == [3, 4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fraction(0.0), r"fraction=0.0 must lie in \(0, 1\]"),
        (lambda: Fraction(1.5), r"fraction=1.5 must lie in \(0, 1\]"),
        (lambda: Window(0), "size=0"),
        (lambda: Window(2, low=-1), "low=-1"),
        (lambda: Window(2, every=0), "every=0"),
        (lambda: Window(2, kind="sliding"), "kind='sliding' is unknown: use 'fixed', 'random' or 'progressive'"),
        (
            lambda: Window(6).steps(10, 0, 0),
            "size=6 does not fit between low=0 and high=5 of 10 steps: set high to at least 6",
        ),
        (lambda: Window(2, low=4, high=5).steps(10, 0, 0), "size=2 does not fit between low=4 and high=5 of 10 steps"),
        (lambda: Window(2, high=10).steps(10, 0, 0), "high=10 covers the last of 10 steps.*at most 9"),
        (lambda: AllButLast().steps(1, 0, 0), "num_steps=1 leaves no step to train.*at least 2"),
        (lambda: Late(0), "size=0.*at least 1"),
        (lambda: Late(kind="early"), "kind='early' is unknown: use 'fixed', 'random' or 'normal'"),
        (lambda: Late(9).steps(8, 0, 0), "Late size=9 exceeds the 8 steps"),
        (lambda: Spread(0), "size=0.*at least 1"),
        (lambda: Spread(kind="even"), "kind='even' is unknown: use 'fixed' or 'random'"),
        (lambda: Spread(4, low=5).steps(8, 0, 0), "Spread size=4 exceeds the 3 steps from low=5"),
        (lambda: time_grid(0), "num_steps=0 must be at least 1"),
        (lambda: time_grid(10, shift=0.0), "shift=0.0 must be positive"),
    ],
)
def test_errors_name_the_numbers_and_the_fix(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_schedules_are_found_by_name():
    assert SCHEDULES["window"](size=3, high=9).steps(10, 0, 0) == Window(3, high=9).steps(10, 0, 0)
    assert set(SCHEDULES) == {"all_but_last", "fraction", "window", "backward", "late", "spread"}


# -- noise levels ------------------------------------------------------------------------------------------------------


def test_cosine_decay_as_in_the_paper():
    """eta(t) = eta_min + (eta_max - eta_min) / 2 (1 + cos(pi (T - t) / T)) with T = 1: high at noise, low at the picture."""
    t = torch.linspace(0, 1, 11)
    expected = [0.2 + 0.8 / 2 * (1 + np.cos(np.pi * (1 - u))) for u in np.linspace(0, 1, 11)]
    level = cosine(t, 1.0, 0.2)
    torch.testing.assert_close(level, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6)
    assert (level.diff() > 0).all()
    assert level[-1] == 1
    assert level[0] == pytest.approx(0.2)


def test_decays_are_found_by_name():
    """No decay is a plain number, so that the bits of a transition do not depend on a schedule that it does not have."""
    assert DECAYS["none"](torch.tensor(0.3), 0.8, 0.0) == 0.8
    assert set(DECAYS) == {"none", "cosine"}


# -- the grid ----------------------------------------------------------------------------------------------------------


def test_grid_by_hand():
    """4 steps, shift 3: 0.75 -> 2.25 / 2.5 = 0.9, 0.5 -> 1.5 / 2 = 0.75, 0.25 -> 0.75 / 1.5 = 0.5."""
    torch.testing.assert_close(time_grid(4, shift=3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    torch.testing.assert_close(time_grid(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


@pytest.mark.parametrize("shift", [0.3, 1.0, 1.15, 3.0, 12.0])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 50, 1000])
def test_grid_falls_from_exactly_one_to_exactly_zero(num_steps, shift):
    grid = time_grid(num_steps, shift)
    assert grid.shape == (num_steps + 1,)
    assert grid.dtype == torch.float32
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()
    assert t_max_of(grid) == grid[1]


def test_t_max_skips_values_that_are_one_up_to_rounding():
    assert t_max_of(torch.tensor([1 - 1e-7, 0.9, 0.0])) == torch.tensor(0.9)
    assert t_max_of(torch.tensor([0.93, 0.5, 0.0])) == torch.tensor(0.93)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_grid_is_diffusers_grid_for_even_sigmas(shift):
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 10, 10))
    torch.testing.assert_close(time_grid(10, shift), scheduler.sigmas, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusers_own_grid_differs_by_its_sigma_min(shift):
    """Without sigmas, diffusers puts 10 values from 1 to sigma_min = shift / (1000 + shift - 1), shifts, appends 0.

    So it is our grid of 9 steps, stretched to end at sigma_min, and one tiny step more.
    """
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    sigma_min = shift / (1000 + shift - 1)
    even = 1 - (1 - sigma_min) * (1 - time_grid(9))
    torch.testing.assert_close(shift * even / (1 + (shift - 1) * even), scheduler.sigmas[:-1], rtol=0, atol=1e-6)
    assert (time_grid(10, shift) - scheduler.sigmas).abs().max() > 0.05


def test_backward_reaches_back_and_stops_at_the_first_step():
    """size 2, one more every 10 updates: of 6 steps (the last never trains) 3-4, then 2-4, ..., at last 0-4."""
    schedule = Backward(size=2, every=10)
    assert [schedule.steps(6, 0, update) for update in (0, 9, 10, 29, 1000)] == [
        [3, 4], [3, 4], [2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="at least 1"):
        Backward(size=0)


# -- nodes from which a reward's gradient goes back ---------------------------------------------------------------------


def test_late_nodes():
    """Fixed: `size` before the end. Random: each of the last 5 of 10, 600 times of 3000 (deviation 22), the very last too."""
    assert [Late(k, "fixed").steps(8, 0, 3) for k in (1, 3, 8)] == [[7], [5], [0]]
    counts = Counter(Late(5).steps(10, seed=1, update=update)[0] for update in range(3000))
    assert set(counts) == {5, 6, 7, 8, 9} and all(abs(count - 600) < 4 * 22 for count in counts.values())


def test_late_nodes_of_align_prop():
    """round(N(42, 5)) of 50: mean 42 with error 5 / sqrt(3000) = 0.09, less what is cut off at 49; deviation below 5."""
    nodes = np.array([Late(8, "normal", 5.0).steps(50, seed=0, update=u)[0] for u in range(3000)])
    assert abs(nodes.mean() - 42) < 0.5 and 4 < nodes.std() < 5 and nodes.max() == 49
    assert Late(8, "normal", 100.0).steps(8, 0, 2)[0] in range(8)


def test_spread_nodes():
    """Of 8 steps, 4: every second; 3: 8/3 apart, rounded down. Random: all move alike, and each part keeps one."""
    assert Spread(4).steps(8, 0, 0) == [0, 2, 4, 6] and Spread(3).steps(8, 0, 0) == [0, 2, 5] and Spread(1).steps(8, 0, 0) == [0]
    assert Spread(2, low=4).steps(8, 0, 0) == [4, 6] and Spread(8).steps(8, 0, 0) == list(range(8))
    moved = {tuple(Spread(4, kind="random").steps(8, 0, update)) for update in range(50)}
    assert moved == {(0, 2, 4, 6), (1, 3, 5, 7)}
