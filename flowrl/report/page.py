"""The page of a run: one file of HTML with everything in it. Text is escaped, and the page's policy lets nothing run or load."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, UnidentifiedImageError

from flowrl.clips import RATE, clip_bytes, is_clip, read_clip
from flowrl.config import Recipe
from flowrl.report.curves import Line, Mark, chart, short
from flowrl.report.read import Run, Sample

MOST_STEPS, MOST_PICTURES = 8, 8  #: Of the pictures over time: steps, and pictures of each.
EDGE, SHEET = 192, 1400  #: Pixels: longer side of those pictures, width of an alarm's sheet; larger ones are reduced.
#: Parts of a step's time, in their order.
PARTS = ("data", "rollout", "decode", "score", "learn", "update", "watch")
#: Metrics that other places of the page show, or that are parts of others.
ELSEWHERE = (
    "reward",
    "ratio",
    "images",
    "memory_gb",
    "denoiser_calls",
    "reward_std",
    "watch/alarms",
    "watch/velocity_norm",
    "learning_rate",
)

#: Charts: a title, a note, and metrics with their names.
Charts = Sequence[tuple[str, str, Sequence[tuple[str, str]]]]
LOOKS: Charts = [
    ("Brightness", "mean luma, and share of pixels below 0.1", [("mean", "watch/brightness"), ("dark", "watch/dark")]),
    ("Edge density", "share of pixels at an edge", [("edges", "watch/edges")]),
    ("Colour entropy", "bits, of 64 colours", [("entropy", "watch/colours")]),
    ("Saturation", "largest less smallest channel", [("saturation", "watch/saturation")]),
    ("High-frequency energy", "what is finer than 3 pixels", [("energy", "watch/high_frequency")]),
    (
        "Diversity",
        "root mean square difference of small pictures",
        [("within a prompt", "watch/diversity"), ("between prompts", "watch/spread")],
    ),
]
DISTANCES: Charts = [
    ("KL to the base", "as the objective measures it", [("KL", "kl")]),
    ("Distance to the base", "mean (v - v_base)^2 of a few samples", [("distance", "watch/distance")]),
    ("Velocity norm", "over that of the first steps, at the same times", [("norm", "watch/velocity")]),
    ("Distance to the slow copy", "mean (v - v_old)^2", [("distance", "old_deviation")]),
]
UPDATES: Charts = [
    ("Groups without variance", "share of prompts that teach nothing", [("share", "frac_reward_zero_std")]),
    ("Beyond the trust region", "share of samples", [("share", "clip_ratio")]),
    ("Ratio", "mean |ratio - 1|", [("deviation", "ratio_deviation")]),
    ("Gradient norm", "before clipping", [("norm", "grad_norm")]),
    ("Loss", "", [("loss", "policy_loss")]),
    ("Learning rate", "", [("rate", "learning_rate")]),
]
#: Which metric a sign of an alarm is about, where the two have different names.
SIGNS = {"reward": "reward", "zero_variance": "frac_reward_zero_std", "clipped": "clip_ratio"}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="flowrl report">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>{css}</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_report(run: Run, out: Path) -> Path:
    """Write the page of a run to a file, whole or not at all; returns its path."""
    page = render(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=out.parent) as aside:
        whole = Path(aside, out.name)
        whole.write_text(page, encoding="utf-8")
        os.replace(whole, out)
    return out


def render(run: Run) -> str:
    css = resources.files("flowrl.report").joinpath("page.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    sections = {
        "Alarms": alarms(run),
        "Rewards" if trained(run) else "Evaluations": charts(run, reward_charts(run)),
        "What the pictures look like": charts(run, LOOKS),
        "How far from the base": charts(run, DISTANCES),
        "Updates": charts(run, UPDATES),
        "Further metrics": charts(run, further(run)),
        "Pictures over time": pictures(run),
        "Cost": cost(run),
        "Settings": settings(run),
        "Environment": table(run.environment.items()),
    }
    there = {title: content for title, content in sections.items() if content}
    links = "".join(f'<a href="#{anchor(title)}">{title}</a>' for title in there)
    parts = [f'<section id="{anchor(title)}"><h2>{title}</h2>{content}</section>' for title, content in there.items()]
    body = "\n".join([head(run), f"<nav>{links}</nav>", *parts])
    page = PAGE.format(title=html.escape(run.name), policy=policy, css=css, body=body)
    return page.encode("utf-8", "xmlcharrefreplace").decode()


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def text(value: Any) -> str:
    return html.escape(str(value))


def table(rows: Iterable[tuple[Any, Any]], look: str = "") -> str:
    """Names and values; '' of none."""
    drawn = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in rows)
    return f'<table class="{look}">{drawn}</table>' if drawn else ""


# ------------------------------------------------------------------------------------------------ what it was


def head(run: Run) -> str:
    recipe = run.recipe
    method = name_of(recipe.get("objective")) or name_of(recipe.get("task")) or "training"
    subject = recipe.get("model") or recipe.get("backbone") or ""
    learnt = trained(run) or ([recipe["data"]] if isinstance(recipe.get("data"), str) else [])
    wanted = recipe.get("max_steps")
    steps = f"{run.steps:,} of {wanted:,} steps" if isinstance(wanted, int) and wanted != run.steps else f"{run.steps:,} steps"
    images = run.points("images")
    facts = [steps, f"{images[-1][1]:,.0f} pictures" if images else "", minutes(run.total("step_time"))]
    notes = "".join(f'<p class="note">{text(note[:1].upper() + note[1:])}.</p>' for note in run.notes)
    subtitle = " ".join(f"{method} {subject} {'on' if learnt else ''} {', '.join(map(str, learnt))}".split())
    return (
        f'<header><h1>{text(run.name)}</h1><p class="subtitle">{text(subtitle)}</p>'
        f'<p class="facts">{text(" · ".join(fact for fact in facts if fact))}</p>{notes}</header>'
    )


def name_of(value: Any) -> str:
    """Of a section of a recipe, {name: ...}."""
    return str(value.get("name", "")) if isinstance(value, dict) else ""


def minutes(seconds: float) -> str:
    if not seconds:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


# ------------------------------------------------------------------------------------------------ alarms


def alarms(run: Run) -> str:
    """Every alarm with its pictures; or that there was none, or that nothing was watched."""
    if not run.alarms:
        if not any(name.startswith("watch/") for name in run.metrics()):
            return '<p class="quiet">This run was not watched.</p>' if "objective" in run.recipe else ""
        return f'<p class="quiet">None in {run.steps:,} steps.</p>'
    parts = []
    for label, row in zip(labels(run), run.alarms, strict=True):
        advice = f"<p>To try: {text(row['advice'])}.</p>" if row.get("advice") else ""
        parts.append(
            f'<article class="alarm"><h3><span class="number">{label}</span>Step {row["step"]}: '
            f"{text(row.get('text', row.get('alarm', 'alarm')))}</h3>{advice}{sheet(run, row)}</article>"
        )
    return "".join(parts)


def labels(run: Run) -> list[str]:
    """What each alarm is called in the curves."""
    return [str(number) for number in range(1, len(run.alarms) + 1)]


def sheet(run: Run, row: dict[str, Any]) -> str:
    """The pictures that an alarm saved, once for all alarms of a step."""
    name = row.get("pictures")
    first = next(other for other in run.alarms if other.get("pictures") == name)
    if not isinstance(name, str) or first is not row:
        return ""
    place = (run.folder / name).resolve()
    if not place.is_relative_to(run.folder.resolve()):
        return ""
    picture = embedded(place, SHEET, "The same prompts and noise in the first step and in this one")
    return f'<div class="sheet">{picture}</div>'


def marks(run: Run, metrics: Iterable[str]) -> list[Mark]:
    """The alarms in a chart of some metrics."""
    shown = set(metrics)
    found: dict[int, Mark] = {}  # alarms of one step stand together
    for label, row in zip(labels(run), run.alarms, strict=True):
        step, signs = row["step"], [sign for sign in row.get("signs") or [] if isinstance(sign, dict)]
        own = [sign for sign in signs if metric_of(str(sign.get("series"))) in shown]
        since = min((sign["since"] for sign in own if isinstance(sign.get("since"), int)), default=step)
        last = found.get(step, Mark(step, "", False, step))
        said = ", ".join(filter(None, [last.label, label if own else ""]))
        found[step] = Mark(step, said, last.own or bool(own), min(last.since, since))
    return list(found.values())


def metric_of(series: str) -> str:
    """The metric that a sign's series is, by its own name."""
    if series.startswith("evaluated/"):
        return f"eval/{series.removeprefix('evaluated/')}"
    return SIGNS.get(series, f"watch/{series}")


# ------------------------------------------------------------------------------------------------ curves


def charts(run: Run, of: Charts) -> str:
    drawn = []
    for title, note, members in of:
        metrics = [metric for _, metric in members]
        shown = [*metrics, "reward"] if [f"rewards/{name}/mean" for name in trained(run)] == metrics[:1] else metrics
        lines = [Line(name, run.points(metric), f"c{i}") for i, (name, metric) in enumerate(members)]
        drawn.append(chart(title, lines, marks(run, shown), note))
        if len(metrics) == 1:
            drawn.append(over_times(run, title, metrics[0]))
    found = "".join(drawn)
    return f'<div class="charts">{found}</div>' if found else ""


def trained(run: Run) -> list[str]:
    """The rewards that were trained on."""
    found = [name for name in run.metrics() if name.startswith("rewards/") and name.endswith("/mean")]
    return [name.removeprefix("rewards/").removesuffix("/mean") for name in found]


def over_times(run: Run, title: str, metric: str) -> str:
    """The same metric per tenth of the time axis, where a run measured it there; '' where it did not."""
    metric = "watch/velocity_norm" if metric == "watch/velocity" else metric
    bins = sorted(name for name in run.metrics() if name.startswith(f"{metric}/t") and name.rpartition("/t")[2][:1].isdigit())
    if len(bins) < 2 or metric not in ("clip_ratio", "kl", "watch/velocity_norm", "ratio_deviation"):
        return ""
    if all(len({value for _, value in run.points(name)}) == 1 for name in bins):
        return ""
    lines = [Line(f"t = {t}", run.points(name), f"t{tenth(t)}") for name in bins for t in [name.rpartition("/t")[2]]]
    return chart(f"{title}, by time", lines, [], "1 is noise, 0 the picture")


def tenth(t: str) -> int:
    """0 to 10, of a time as a metric's name has it."""
    try:
        return min(10, max(0, round(10 * float(t))))
    except ValueError:
        return 0


def reward_charts(run: Run) -> Charts:
    """The weighted sum where there are several, then each reward: on the step's samples, and in evaluations."""
    kinds = {"rewards/": "/mean", "watch/held_out/": "", "eval/": ""}
    names = dict.fromkeys(
        metric.removeprefix(start).removesuffix(end)
        for start, end in kinds.items()
        for metric in run.metrics()
        if metric.startswith(start) and metric.endswith(end)
    )
    learnt = trained(run)
    found: list[tuple[str, str, Sequence[tuple[str, str]]]] = []
    if len(learnt) > 1:
        found.append(("Reward", "weighted sum, of the step's samples", [("reward", "reward")]))
    for name in names:
        held = "held out" if learnt and name not in learnt else ""
        members = [
            ("samples", f"rewards/{name}/mean"),
            ("held-out samples", f"watch/held_out/{name}"),
            ("evaluations", f"eval/{name}"),
        ]
        found.append((name, held, members))
    return found


def further(run: Run) -> Charts:
    """Metrics that no other chart shows, each its own: those of methods, of rewards that learn, of balancing."""
    known = {metric for part in (LOOKS, DISTANCES, UPDATES) for _, _, members in part for _, metric in members}
    skipped = ("rewards/", "eval/", "watch/held_out/")
    found = []
    for name in run.metrics():
        summed = name.startswith(skipped) and (not name.startswith("rewards/") or name.endswith(("/mean", "/std")))
        if name in known or name in ELSEWHERE or summed or name.endswith("_time") or re.search(r"/t\d", name):
            continue
        found.append((name, "", [(name.rpartition("/")[2], name)]))
    return found


# ------------------------------------------------------------------------------------------------ pictures


def pictures(run: Run) -> str:
    """Strips over time: of prompts that came back, one each; of the others, a row for each step."""
    steps = spread(sorted(step for step, samples in run.samples.items() if samples), MOST_STEPS)
    if not steps:
        return ""
    firsts = {step: first_of_each(run.samples[step]) for step in steps}
    often = [
        prompt
        for prompt in dict.fromkeys(sample.prompt for step in steps for sample in firsts[step])
        if sum(any(sample.prompt == prompt for sample in firsts[step]) for step in steps) >= max(2, (len(steps) + 1) // 2)
    ][:MOST_PICTURES]
    same = "".join(
        f'<div class="strip"><h3>{text(prompt)}</h3><div class="row">'
        + "".join(cell(sample, f"step {step}") for step in steps for sample in firsts[step] if sample.prompt == prompt)
        + "</div></div>"
        for prompt in often
    )
    if same:
        return same
    rows = "".join(
        f'<div class="strip"><h3>Step {step}</h3><div class="row">'
        + "".join(cell(sample, sample.prompt) for sample in spread(firsts[step], MOST_PICTURES))
        + "</div></div>"
        for step in steps
    )
    return f'<p class="quiet">The first picture of some prompts of a step; every step draws others.</p>{rows}'


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def first_of_each(samples: Sequence[Sample]) -> list[Sample]:
    """The first picture of each prompt."""
    found: dict[str, Sample] = {}
    for sample in samples:
        found.setdefault(sample.prompt, sample)
    return list(found.values())


def cell(sample: Sample, caption: str) -> str:
    said = " · ".join(f"{name} {short(value)}" for name, value in sample.rewards.items())
    return (
        f"<figure>{embedded(sample.file, EDGE, sample.prompt)}<figcaption>{text(caption)}"
        f"{f'<small>{text(said)}</small>' if said else ''}</figcaption></figure>"
    )


def embedded(place: Path, most: int, alt: str) -> str:
    """A picture or clip inside the page, at most `most` pixels wide or high; a word in its place where it cannot be read."""
    try:
        if is_clip(place):
            return moving(place, most, alt)
        with Image.open(place) as image:
            image.thumbnail((most, most))  # reads a picture only as far as it needs
            kept = image.convert("RGB")
    except FileNotFoundError:
        return f'<span class="missing">{text(place.name)} is missing</span>'
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return f'<span class="missing">{text(place.name)} cannot be read</span>'
    buffer = io.BytesIO()
    kept.save(buffer, "PNG", optimize=True)
    return inline(buffer.getvalue(), "png", kept.size, alt)


def moving(place: Path, most: int, alt: str) -> str:
    """A clip inside the page, its frames reduced, as an animated WebP."""
    pixels, rate = read_clip(place)
    frames = [Image.fromarray(frame) for frame in pixels]
    for frame in frames:
        frame.thumbnail((most, most))
    return inline(clip_bytes(frames, rate or RATE, quality=85), "webp", frames[0].size, alt)


def inline(content: bytes, kind: str, size: tuple[int, int], alt: str) -> str:
    """The element of a picture that stands in the page itself."""
    data, words = base64.b64encode(content).decode(), html.escape(alt, quote=True)
    return f'<img width="{size[0]}" height="{size[1]}" alt="{words}" src="data:image/{kind};base64,{data}">'


# ------------------------------------------------------------------------------------------------ cost, settings


def cost(run: Run) -> str:
    """Where the time of a step goes, and what the run took."""
    total, count = run.total("step_time"), len(run.points("step_time"))
    if not total:
        return ""
    spent = [(part, run.total(f"{part}_time")) for part in PARTS]
    spent = [(part, seconds) for part, seconds in spent if seconds]
    bars, at = [], 0.0
    for i, (_, seconds) in enumerate(spent):
        width = 100 * seconds / total
        bars.append(f'<rect class="c{i}" x="{at:.2f}" y="0" width="{width:.2f}" height="6"/>')
        at += width
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 14 10"><rect class="c{i}" width="14" height="10"/></svg>{part}'
        f"<b>{short(seconds / count)} s</b> {100 * seconds / total:.1f} %</li>"
        for i, (part, seconds) in enumerate(spent)
    )
    drawn = run.points("images")
    calls, memory = run.points("denoiser_calls"), run.points("memory_gb")
    images = drawn[-1][1] if drawn else 0.0
    rate = (images - drawn[0][1]) / max(len(drawn) - 1, 1) / (total / count) if drawn else 0.0
    rows = [
        ("time in steps", f"{minutes(total)}, {short(total / count)} s a step"),
        ("pictures", f"{images:,.0f}, {short(rate)} a second" if images else ""),
        ("denoiser calls", f"{calls[-1][1]:,.0f} pictures x steps in rollouts and updates" if calls else ""),
        ("peak memory", f"{max(value for _, value in memory):.1f} GB" if memory else ""),
    ]
    bar = '<svg class="bar" role="img" aria-label="Time by part" viewBox="0 0 100 6" preserveAspectRatio="none">'
    return f'{bar}{"".join(bars)}</svg><ul class="parts">{legend}</ul>{table([row for row in rows if row[1]])}'


def settings(run: Run) -> str:
    """What the recipe says, first what differs from the defaults; all of it where it is not a recipe of `flowrl train`."""
    defaults = dataclasses.asdict(Recipe())
    if not run.recipe.keys() <= defaults.keys():
        return table((name, shown(value)) for name, value in run.recipe.items())
    own = {name: value for name, value in run.recipe.items() if value != defaults[name]}
    rest = {name: value for name, value in run.recipe.items() if name not in own}
    first = table((name, shown(value)) for name, value in own.items())
    more = table((name, shown(value)) for name, value in rest.items())
    folded = f"<details><summary>{len(rest)} options at their defaults</summary>{more}</details>" if more else ""
    again = f"flowrl train {run.folder / 'recipe.yaml'} output_dir=..."
    return f'{first}{folded}<p class="quiet">Again: <code>{text(again)}</code></p>'


def shown(value: Any) -> str:
    """A value as a recipe has it, on one line."""
    if isinstance(value, dict | list):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6).strip()
    return "none" if value is None else str(value)
