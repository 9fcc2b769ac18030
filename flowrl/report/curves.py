"""Curves as SVG, drawn here: static, sharp in print, coloured by the page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from flowrl.report.read import Points

WIDTH, HEIGHT = 380, 196
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 16, 26  #: Margins around the plot, for ticks and marks.
DOTS = 12  #: Series of fewer points than this are drawn with a dot for each, and are not smoothed.


@dataclass(frozen=True)
class Line:
    """A series of a chart. look: its colour, a class of the page: c0, c1, ... for kinds, t0 .. t10 for tenths of the time."""

    name: str
    points: Points
    look: str


@dataclass(frozen=True)
class Mark:
    """An alarm in a chart. own: whether it is about the chart's series; since: where its drift began."""

    step: int
    label: str
    own: bool
    since: int


def smoothed(points: Points) -> Points:
    """The mean over the nearest steps, a tenth of all, and half as many at the ends. Short series stay as they are."""
    if len(points) < DOTS:
        return points
    reach = max(2, len(points) // 20)
    values = [value for _, value in points]
    return [(step, fmean(values[max(0, i - reach) : i + reach + 1])) for i, (step, _) in enumerate(points)]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between low and high: multiples of 1, 2 or 5 times a power of ten, at most `most`."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * power for unit in (1, 2, 5, 10) if unit * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [(first + i) * step for i in range(max(count, 0))]


def short(value: float) -> str:
    """A number in as few characters as do: 0.053, 12.3, 45,600, 3e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        return f"{value:.2g}"
    if size >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def chart(title: str, lines: Sequence[Line], marks: Sequence[Mark] = (), note: str = "") -> str:
    """A figure: title, legend with first and last value, curves, alarms. Lines without points are left out; '' if all are."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    left, right = min(steps), max(steps)
    low, high = padded(min(values), max(values))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - left) / (right - left) if right > left else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    foot = HEIGHT - BOTTOM
    parts = []
    if own := [mark for mark in marks if mark.own]:
        start, end = x(max(min(mark.since for mark in own), left)), x(max(mark.step for mark in own))
        parts.append(f'<rect class="drift" x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" height="{foot - TOP}"/>')
    for value in ticks(low, high, 4):
        parts.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y(value) + 4:.1f}">{short(value)}</text>')
    for value in ticks(left, right, 5):
        if value == int(value):
            anchor = "middle" if x(value) < WIDTH - 2 * RIGHT else "end"
            place = x(value) if anchor == "middle" else WIDTH - 2
            parts.append(f'<text class="tick {anchor}" x="{place:.1f}" y="{foot + 17}">{short(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {foot}H{WIDTH - RIGHT}"/>')
    for mark in marks:
        look = "mark own" if mark.own else "mark"
        parts.append(f'<path class="{look}" d="M{x(mark.step):.1f} {TOP}V{foot}"/>')
        if mark.own:
            parts.append(f'<text class="label middle" x="{x(mark.step):.1f}" y="{TOP - 4}">{html.escape(mark.label)}</text>')
    for line in lines:
        drawn = [(x(step), y(value)) for step, value in line.points]
        if len(drawn) >= DOTS:
            parts.append(f'<path class="raw {line.look}" d="{path(drawn)}"/>')
            drawn = [(x(step), y(value)) for step, value in smoothed(line.points)]
        parts.append(f'<path class="curve {line.look}" d="{path(drawn)}"/>')
        if len(drawn) < DOTS:
            parts += [f'<circle class="dot {line.look}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in drawn]
    said = html.escape(f"{title}: {'; '.join(f'{line.name} {change(line)}' for line in lines)}", quote=True)
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 14 4"><path class="curve {line.look}" d="M0 2H14"/></svg>'
        f"{html.escape(line.name)}<b>{change(line)}</b></li>"
        for line in lines
    )
    told = f"<p>{html.escape(note)}</p>" if note else ""
    plot = f'<svg class="plot" role="img" aria-label="{said}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'
    return f"<figure><figcaption><h3>{html.escape(title)}</h3>{told}<ul>{legend}</ul></figcaption>{plot}</figure>"


def padded(low: float, high: float) -> tuple[float, float]:
    """A little room below and above; 0 is the foot of what is never below it and reaches near it."""
    if low == high == 0:
        return 0.0, 1.0
    room = 0.06 * (high - low) or abs(high) * 0.1
    bottom = 0.0 if low >= 0 and low < 0.35 * high else low - room
    return bottom, high + room


def path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)


def change(line: Line) -> str:
    """Where a line began and where it ends: '0.47 to 0.61', smoothed."""
    smooth = smoothed(line.points)
    first, last = short(smooth[0][1]), short(smooth[-1][1])
    return last if len(smooth) == 1 or first == last else f"{first} to {last}"
