"""Which drifts are signs, and what signs mean together: named alarms. Plain functions; `flowrl.train.watch` feeds them.

A sign is a drift that is certain (`flowrl.train.trends`, at the run's share of false alarms) and large enough to matter (its
`Kind`). One sign alone seldom means much: a reward that rises is what training is for, and pictures may change for good reasons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from flowrl.train.trends import Drift

#: What series begin with: rewards, or prompts, that are not trained on.
HELD_OUT, EVALUATED = "held_out/", "evaluated/"


@dataclass(frozen=True)
class Kind:
    """How a series is spoken of, and how large a drift of it has to be.

    scale: what `least` is measured in: `factor` between the levels, `points` between them, or `deviations` of a reward.
    """

    text: str
    scale: Literal["factor", "points", "deviations"]
    least: float

    def matters(self, drift: Drift, deviation: float) -> bool:
        """Whether a drift goes where it is said to, and far enough. deviation: of the values, where they are a reward's."""
        if drift.up != (drift.now > drift.start):
            return False
        if self.scale == "factor":
            low, high = sorted((abs(drift.start), abs(drift.now)))
            return high >= self.least * low and high > 0
        return abs(drift.now - drift.start) >= self.least * (deviation if self.scale == "deviations" else 1)

    def say(self, drift: Drift) -> str:
        """'edge density down 40 %'; from-to where a percentage would say little."""
        direction, start, now = "up" if drift.up else "down", drift.start, drift.now
        if self.scale == "points":
            return f"{self.text} {direction} from {100 * start:.0f} to {100 * now:.0f} %"
        change = (now - start) / start if start > 0 else math.inf
        if abs(change) > 3 or now < 0:
            return f"{self.text} {direction} from {start:.3g} to {now:.3g}"
        return f"{self.text} {direction} {100 * abs(change):.0f} %"


#: The series that are watched in every run. Of LOOKS the option `change` is in the place of `least`.
KINDS: dict[str, Kind] = {
    "reward": Kind("train reward", "deviations", 0.1),
    "brightness": Kind("brightness", "points", 0.2),
    "dark": Kind("dark pixels", "points", 0.2),
    "edges": Kind("edge density", "factor", 1.5),
    "colours": Kind("colour entropy", "factor", 1.5),
    "saturation": Kind("saturation", "factor", 1.5),
    "high_frequency": Kind("high-frequency energy", "factor", 1.5),
    "diversity": Kind("difference within a prompt", "factor", 2.0),
    "spread": Kind("difference between prompts", "factor", 2.0),
    "velocity": Kind("velocity norm", "factor", 1.2),
    "zero_variance": Kind("groups without variance", "points", 0.2),
    "clipped": Kind("updates beyond the trust region", "points", 0.2),
}
LOOKS = ("brightness", "dark", "edges", "colours", "saturation", "high_frequency")
#: Shares of groups, or of updates, from which on these signs are an alarm.
MANY_FLAT, MANY_CLIPPED = 0.7, 0.9


def kind_of(series: str, change: float) -> Kind:
    """change: the factor from which on a change of the pictures' looks matters."""
    for prefix, text in ((HELD_OUT, "held-out {}"), (EVALUATED, "{} in evaluations")):
        if series.startswith(prefix):
            return Kind(text.format(series.removeprefix(prefix)), "deviations", 0.1)
    kind = KINDS[series]
    return replace(kind, least=change) if series in LOOKS and kind.scale == "factor" else kind


@dataclass(frozen=True)
class Sign:
    """A drift that is certain and large."""

    series: str
    drift: Drift
    text: str


@dataclass(frozen=True)
class Alarm:
    """Signs that mean something together. name: as in `ALARMS`."""

    name: str
    signs: tuple[Sign, ...]

    @property
    def since(self) -> int:
        """The step at which the first of the signs began."""
        return min(sign.drift.since for sign in self.signs)

    @property
    def text(self) -> str:
        return f"{', '.join(sign.text for sign in self.signs)}: {ALARMS[self.name][0]}"

    @property
    def advice(self) -> str:
        return ALARMS[self.name][1]


#: What each alarm says after its signs, and what to try.
ALARMS = {
    "hacking": ("likely hacking", "another reward beside this one, a pull to the base model (objective.beta, kl), fewer steps"),
    "possible_hacking": ("hacking?", "look at the pictures, and at rewards that are not trained on (eval_rewards)"),
    "collapse": ("mode collapse, the pictures of one prompt become alike", "a pull to the base model, a lower learning_rate"),
    "sameness": ("mode collapse, all prompts draw the same", "a reward that reads the prompt, a pull to the base model"),
    "over_optimisation": ("over-optimisation, beyond the scale of the model", "a lower learning_rate, a pull to the base model"),
    "falling": ("training makes it worse", "a lower learning_rate, larger groups, more prompts_per_step"),
    "no_signal": ("most groups teach nothing any more", "harder prompts, a finer reward"),
    "clipping": ("most updates do nothing", "a lower learning_rate, fewer updates_per_step"),
}

Signs = Mapping[tuple[str, bool], Sign]


def alarms_of(signs: Signs) -> list[Alarm]:
    """What signs, by series and whether it is up, mean together."""

    def found(*series: str, up: bool) -> list[Sign]:
        return [sign for (name, direction), sign in signs.items() if direction == up and name in series]

    held = [name for name, _ in signs if name.startswith((HELD_OUT, EVALUATED))]
    better, worse = found("reward", up=True), found(*held, up=False)
    looks = found(*LOOKS, up=True) + found(*LOOKS, up=False)
    alike, same, norm = found("diversity", up=False), found("spread", up=False), found("velocity", up=True)
    flat = [sign for sign in found("zero_variance", up=True) if sign.drift.now >= MANY_FLAT]
    clipped = [sign for sign in found("clipped", up=True) if sign.drift.now >= MANY_CLIPPED]
    further = looks + alike + norm
    meant: dict[str, list[Sign]] = {
        "hacking": better + worse + further if better and worse else [],
        "possible_hacking": better + further if better and looks and not worse and not found(*held, up=True) else [],
        "collapse": alike,
        "sameness": same,
        "over_optimisation": norm,
        "falling": found("reward", up=False) if not better else [],
        "no_signal": flat,
        "clipping": clipped,
    }
    return [Alarm(name, tuple(of)) for name, of in meant.items() if of]
