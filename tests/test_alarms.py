"""From drifts to signs to alarms: what counts as large, what it says, and what goes together."""

from __future__ import annotations

import pytest

from flowrl.train.alarms import ALARMS, KINDS, LOOKS, Sign, alarms_of, kind_of
from flowrl.train.trends import Drift


def drift(start: float, now: float, since: int = 1) -> Drift:
    return Drift(now > start, 20.0, since, start, now)


def raised(**series: tuple[float, float]) -> dict[str, str]:
    """The alarms of signs given as series=(start, now), `__` for a slash, and what they say."""
    names = {name.replace("__", "/"): drift(*levels) for name, levels in series.items()}
    signs = {(name, d.up): Sign(name, d, kind_of(name, 1.5).say(d)) for name, d in names.items()}
    return {alarm.name: alarm.text for alarm in alarms_of(signs)}


UP, EDGES, TRUE = (1.0, 1.12), (0.05, 0.03), (0.5, 0.46)


def test_the_alarm_that_it_is_all_about():
    said = raised(reward=UP, held_out__tiny_strict=TRUE, edges=EDGES)
    assert said == {"hacking": "train reward up 12 %, held-out tiny_strict down 8 %, edge density down 40 %: likely hacking"}


@pytest.mark.parametrize(
    ("signs", "names"),
    [
        ({"reward": UP}, []),
        ({"edges": EDGES}, []),
        ({"held_out__a": TRUE}, []),
        ({"held_out__a": TRUE, "edges": EDGES}, []),
        ({"reward": UP, "edges": EDGES}, ["possible_hacking"]),
        ({"reward": UP, "edges": EDGES, "held_out__a": (0.4, 0.5)}, []),  # what is not trained on says that it is for the better
        ({"reward": UP, "held_out__a": (0.4, 0.5), "held_out__b": TRUE}, ["hacking"]),
        ({"reward": UP, "evaluated__a": TRUE}, ["hacking"]),
        ({"reward": (1.0, 0.8), "edges": EDGES}, ["falling"]),
        ({"diversity": (0.2, 0.05)}, ["collapse"]),
        ({"diversity": (0.2, 0.5)}, []),
        ({"spread": (0.2, 0.05)}, ["sameness"]),
        ({"velocity": (1.0, 1.3)}, ["over_optimisation"]),
        ({"zero_variance": (0.1, 0.6)}, []),
        ({"zero_variance": (0.1, 0.8)}, ["no_signal"]),
        ({"clipped": (0.1, 0.95)}, ["clipping"]),
    ],
)
def test_what_goes_together(signs, names):
    assert list(raised(**signs)) == names


def test_other_words():
    assert raised(velocity=(1.0, 1.3))["over_optimisation"].startswith("velocity norm up 30 %: over-optimisation")
    assert raised(diversity=(0.2, 0.05))["collapse"].startswith("difference within a prompt down 75 %: mode collapse")
    assert raised(reward=UP, dark=(0.45, 0.93))["possible_hacking"] == (
        "train reward up 12 %, dark pixels up from 45 to 93 %: hacking?"
    )


@pytest.mark.parametrize(
    ("levels", "text"),
    [
        ((0.5, 0.46), "train reward down 8 %"),
        ((0.1, 0.9), "train reward up from 0.1 to 0.9"),  # 800 % would say little
        ((-2.0, -1.5), "train reward up from -2 to -1.5"),  # and percents of a negative number nothing
        ((0.5, -0.1), "train reward down from 0.5 to -0.1"),
        ((0.0, 0.3), "train reward up from 0 to 0.3"),
    ],
)
def test_percent_where_it_says_something(levels, text):
    assert KINDS["reward"].say(drift(*levels)) == text


@pytest.mark.parametrize(
    ("series", "levels", "large"),
    [
        ("edges", (0.06, 0.041), False),
        ("edges", (0.06, 0.039), True),
        ("edges", (0.06, 0.089), False),
        ("edges", (0.06, 0.091), True),
        ("edges", (0.0, 0.0), False),
        ("dark", (0.02, 0.19), False),
        ("dark", (0.02, 0.23), True),
        ("reward", (1.0, 1.04), False),
        ("reward", (1.0, 1.06), True),
        ("held_out/a", (1.0, 0.94), True),
    ],
)
def test_what_is_large(series, levels, large):
    """Looks by a factor of 1.5, shares by 20 points, rewards by a tenth of a deviation of 0.5."""
    assert kind_of(series, 1.5).matters(drift(*levels), deviation=0.5) is large


def test_a_drift_that_came_back_is_none():
    """Certainly upwards at some time, but lower now than before it began."""
    assert not KINDS["reward"].matters(Drift(True, 20.0, 1, 1.0, 0.5), deviation=0.1)


def test_the_factor_is_an_option_of_the_looks_alone():
    assert {series for series in KINDS if kind_of(series, 9.0).least == 9} == set(LOOKS) - {"dark", "brightness"}


def test_an_alarm_began_with_its_first_sign():
    signs = [Sign("reward", drift(*UP, since=7), ""), Sign("held_out/a", drift(*TRUE, since=30), "")]
    (alarm,) = alarms_of({(sign.series, sign.drift.up): sign for sign in signs})
    assert alarm.since == 7 and alarm.advice == ALARMS["hacking"][1]
