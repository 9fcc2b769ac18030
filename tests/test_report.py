"""`flowrl report`: what it reads, draws and refuses; and what a real browser makes of the page."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from flowrl.cli import main
from flowrl.clips import clip_bytes, read_clip
from flowrl.config import ConfigError, Recipe
from flowrl.report import read_run, write_report
from flowrl.report.curves import Line, Mark, change, chart, padded, short, smoothed, ticks
from flowrl.report.page import embedded, render, spread
from tests.gallery import HOSTILE, shape_picture

pytest_plugins = ["tests.browser"]  # the browser

STEPS = 40


def a_run(folder: Path, prompts: list[str], **changes: Any) -> Path:
    """A run of 40 steps as training leaves it: a trained reward, one held out, two alarms with a sheet, three steps' pictures."""
    folder.mkdir(parents=True)
    recipe = dataclasses.asdict(Recipe(rewards={"preference": 1.0}, max_steps=STEPS, output_dir=str(folder))) | changes
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.15.0", "device": "a <fast> one"}))
    still = {"reward_std": 0.1, "frac_reward_zero_std": 0.0, "rewards/preference/std": 0.1, "rewards/critic/accuracy": 0.7}
    still |= {"kl/t0.8": 1e-4, "watch/diversity": 0.2, "watch/spread": 0.1, "watch/brightness": 0.9, "memory_gb": 1.25}
    still |= {"rollout_time": 1.0, "update_time": 2.5, "watch_time": 0.5, "step_time": 4.0}
    rows = []
    for step in range(1, STEPS + 1):
        wave = 0.02 * math.sin(step)
        row = {"step": step, "reward": 0.4 + 0.01 * step + wave, "rewards/preference/mean": 0.4 + 0.01 * step + wave, **still}
        row |= {"watch/edges": 0.06 - 0.001 * step + 0.1 * wave, "watch/held_out/tiny_strict": 0.6 - 0.004 * step}
        row |= {"images": 32.0 * step, "denoiser_calls": 320.0 * step, "kl": 1e-4 * step}
        rows.append(row | ({"eval/preference": 0.5} if step % 20 == 0 else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    signs = [
        {"series": "reward", "text": "train reward up 12 %", "up": True, "evidence": 9.0, "since": 3, "start": 0.4, "now": 0.5},
        {
            "series": "edges",
            "text": "edge density down 40 %",
            "up": False,
            "evidence": 9.0,
            "since": 5,
            "start": 0.1,
            "now": 0.06,
        },
    ]
    alarm = {"step": 24, "advice": "fewer steps", "pictures": "watch/step-000024.png"}
    alarms = [
        {**alarm, "alarm": "hacking", "text": f"train reward up 12 %: {HOSTILE[0]}", "signs": signs},
        {**alarm, "alarm": "collapse", "text": "alike", "signs": signs[1:]},
    ]
    (folder / "alarms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alarms))
    (folder / "watch").mkdir()
    shape_picture(1, size=400).save(folder / "watch" / "step-000024.png")
    for step in (1, 20, 40):
        place = folder / "samples" / f"step-{step:06d}"
        place.mkdir(parents=True)
        table = []
        for i, prompt in enumerate(prompts):
            shape_picture(step + i).save(place / f"{i:04d}.png")
            rewards = {"preference": 0.5 if i else None}
            table.append({"file": f"{i:04d}.png", "prompt": prompt, "seed": i, "group": i, "rewards": rewards, "advantage": 0.0})
        (place / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return folder


PROMPTS = ["a red circle", *HOSTILE]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return a_run(tmp_path_factory.mktemp("report") / "shapes", PROMPTS)


# ------------------------------------------------------------------------------------------------ curves


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.013, 0.047, [0.02, 0.03, 0.04]),
        (-3, 12, [0, 5, 10]),
        (1, 100, [20, 40, 60, 80, 100]),
        (7, 7, [7]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.05251, "0.0525"),
        (0.5, "0.5"),
        (12.34, "12.3"),
        (-3.0, "-3"),
        (45600, "45,600"),
        (3e-5, "3e-05"),
        (2.5e7, "2.5e+07"),
    ],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_smoothing_is_a_mean_over_neighbours():
    """Of 12 values up to two on each side; a straight line stays one inside, and short series stay as they are."""
    line = [(step, 2.0 * step) for step in range(12)]
    smooth = smoothed(line)
    assert smooth[2:-2] == line[2:-2]
    assert smooth[0] == (0, 2.0) and smooth[-1] == (11, 20.0)  # (0 + 2 + 4) / 3, (18 + 20 + 22) / 3
    assert smoothed(line[:5]) == line[:5]


def test_room_around_curves():
    """6 % of what is seen; 0 is the foot of shares and the like; what does not move gets some room too."""
    assert padded(10, 20) == pytest.approx((9.4, 20.6))
    assert padded(0.1, 1) == pytest.approx((0, 1.054))
    assert padded(-1, 1) == pytest.approx((-1.12, 1.12))
    assert padded(0, 0) == (0, 1)
    assert padded(2, 2) == pytest.approx((1.8, 2.2))


def test_a_chart_puts_points_where_they_belong():
    """Steps 0 to 10 over 318 pixels from 50, values 0 to 1 (and 6 % above) over 154 pixels from 16."""
    drawn = chart("T", [Line("a", [(0, 0.0), (5, 0.5), (10, 1.0)], "c0"), Line("none", [], "c1")])
    path = re.findall(r'<path class="curve c0" d="(M[^"]*L[^"]*)"', drawn)[0]
    assert path == f"M50.0 170.0L209.0 {16 + 154 * 0.56 / 1.06:.1f}L368.0 {16 + 154 * 0.06 / 1.06:.1f}"
    assert drawn.count("<circle") == 3 and "none" not in drawn
    assert 'aria-label="T: a 0 to 1"' in drawn
    assert chart("T", [Line("none", [], "c0")]) == ""
    assert change(Line("a", [(3, 0.5)], "c0")) == "0.5"


def test_an_alarm_is_drawn_where_it_is_about_the_chart():
    """Its own: a line with its number, and the drift before it; others': a faint line."""
    points = [(step, float(step)) for step in range(11)]
    drawn = chart("T", [Line("a", points, "c0")], [Mark(10, "1", True, 5), Mark(5, "2", False, 5)])
    assert drawn.count('class="mark own"') == 1 and drawn.count('class="mark"') == 1
    assert '<rect class="drift" x="209.0" y="16" width="159.0"' in drawn
    assert ">1</text>" in drawn and ">2</text>" not in drawn.replace('y="187">2</text>', "")


def test_spread_keeps_first_and_last():
    assert spread(list(range(100)), 4) == [0, 33, 66, 99] and spread([1, 2], 4) == [1, 2]


# ------------------------------------------------------------------------------------------------ what Python writes


def test_it_needs_no_torch(run, tmp_path):
    code = f"import sys, flowrl.cli; flowrl.cli.main(['report', {str(run)!r}, '--out', {str(tmp_path / 'r.html')!r}]); "
    done = subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], check=False)
    assert done.returncode == 0 and (tmp_path / "r.html").is_file()


def test_the_page_says_what_the_run_was(run):
    page = render(read_run(run))
    assert "<title>shapes</title>" in page and "grpo tiny-sd3 on preference" in page
    assert "40 steps · 1,280 pictures · 2.7 minutes" in page
    for title in ("preference", "tiny_strict", "Edge density", "Diversity", "KL to the base", "rewards/critic/accuracy"):
        assert f"<h3>{title}</h3>" in page
    assert "12,800 pictures x steps" in page and "1.2 GB" in page and "8 a second" in page
    assert "62.5 %" in page  # update: 2.5 s of 4
    assert "a &lt;fast&gt; one" in page
    assert "<th>rewards</th><td>{preference: 1.0}</td>" in page and "options at their defaults" in page


def test_alarms_stand_in_the_curves_of_their_signs(run):
    """Both in the edge density, the first one in the reward, whose sign is the sum's; the sheet of their step once."""
    page = render(read_run(run))
    figures = {re.search(r"<h3>(.*?)</h3>", part)[1]: part for part in page.split("<figure>")[1:] if "<h3>" in part}  # type: ignore[index]
    assert 'class="label middle"' in figures["preference"] and ">1</text>" in figures["preference"]
    assert ">1, 2</text>" in figures["Edge density"]
    assert 'class="mark own"' not in figures["Diversity"] and 'class="mark"' in figures["Diversity"]
    assert page.count("Step 24:") == 2 and page.count('<div class="sheet">') == 1
    assert "To try: fewer steps." in page


def test_prompts_that_come_back_get_a_strip_each(run, tmp_path):
    """Else a step is a row, of some of its prompts."""
    assert render(read_run(run)).count('<div class="strip">') == len(PROMPTS)
    other = a_run(tmp_path / "other", PROMPTS[:1])
    for step in (1, 20, 40):
        table = other / "samples" / f"step-{step:06d}" / "samples.jsonl"
        table.write_text(table.read_text().replace("a red circle", f"prompt {step}"))
    page = render(read_run(other))
    assert page.count('<div class="strip">') == 3 and "<h3>Step 20</h3>" in page and "prompt 20" in page


def test_what_is_missing_is_said(tmp_path):
    """A lost picture, one that is none, a table that is none, a sheet outside the run, and no environment."""
    folder = a_run(tmp_path / "run", PROMPTS[:3])
    (folder / "environment.json").unlink()
    (folder / "samples" / "step-000001" / "0000.png").unlink()
    (folder / "samples" / "step-000001" / "0001.png").write_bytes(b"none")
    (folder / "samples" / "step-000040" / "samples.jsonl").write_text("{")
    alarms = folder / "alarms.jsonl"
    alarms.write_text(alarms.read_text().replace("watch/step-000024.png", "../../etc/secret.png"))
    page = render(read_run(folder))
    assert "0000.png is missing" in page and "0001.png cannot be read" in page
    assert "Samples/step-000040/samples.jsonl cannot be read, and its pictures are left out." in page
    assert "secret" not in page and "<h2>Environment</h2>" not in page


def test_runs_that_were_not_watched_or_have_no_alarm(tmp_path):
    folder = a_run(tmp_path / "run", PROMPTS[:1])
    (folder / "alarms.jsonl").unlink()
    assert "None in 40 steps." in render(read_run(folder))
    metrics = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if not name.startswith("watch/")} for row in rows]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "This run was not watched." in render(read_run(folder))


def test_a_run_of_train_reward_has_a_report_too(tmp_path):
    """Its recipe is another one: all of it is shown; its evaluations are what there is."""
    folder = tmp_path / "reward"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("task: {name: preference, head: linear}\nmax_steps: 3\nseed: 0\n")
    rows = [{"step": step, "loss": 1 / step, "eval/accuracy": 0.5 + 0.1 * step, "step_time": 0.1} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = render(read_run(folder))
    assert '<p class="subtitle">preference</p>' in page and "<h2>Evaluations</h2>" in page and "<h3>loss</h3>" in page
    assert "<h2>Alarms</h2>" not in page and "{name: preference, head: linear}" in page


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    folder = a_run(tmp_path / "run", PROMPTS[:1])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "reward": null, "kl": NaN, "grad_norm": "high", "new": Infinity}\n')
    found = read_run(folder)
    assert found.steps == 41 and len(found.points("kl")) == 40 and not found.points("grad_norm")
    assert "<h3>new</h3>" not in render(found)


# ------------------------------------------------------------------------------------------------ bad input


def no_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_metrics, "run {run} has no metrics.jsonl yet: it has not finished a step"),
        (lambda f: (f / "metrics.jsonl").write_text(""), "{run}/metrics.jsonl is empty: the run has not finished a step"),
        (
            lambda f: (f / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n'),
            "{run}/metrics.jsonl, line 2: not JSON",
        ),
        (lambda f: (f / "metrics.jsonl").write_text('{"step": 1}\n[2]\n'), "{run}/metrics.jsonl, line 2: not a row of a step"),
        (lambda f: (f / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n'), "{run}/metrics.jsonl, line 2: not JSON"),
        (lambda f: (f / "alarms.jsonl").write_text('{"text": "no step"}\n'), "{run}/alarms.jsonl, line 1: not a row of a step"),
        (lambda f: (f / "recipe.yaml").write_text("a: [1\n"), "{run}/recipe.yaml cannot be read: not valid YAML"),
        (lambda f: (f / "recipe.yaml").write_text("- 1\n"), "{run}/recipe.yaml is not a recipe"),
        (lambda f: (f / "recipe.yaml").unlink(), "{run} is not the folder of a run (no recipe.yaml)"),
    ],
)
def test_a_damaged_run_is_one_line(tmp_path, capsys, spoil: Callable[[Path], Any], message):
    """On stderr, with the file and the line; nothing is written."""
    folder = a_run(tmp_path / "run", PROMPTS[:1])
    spoil(folder)
    assert main(["report", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"flowrl: {message.format(run=folder)}") and said.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_a_folder_that_is_no_run(tmp_path, capsys):
    folder = a_run(tmp_path / "run", PROMPTS[:1])
    for place, message in (
        (tmp_path / "nowhere", "there is no folder"),
        (tmp_path, "is not the folder of a run (no recipe.yaml)"),
        (folder / "samples", f"is not the folder of a run: give the run, {folder}"),
        (folder / "metrics.jsonl", f"is not the folder of a run: give the run, {folder}"),
    ):
        assert main(["report", str(place)]) == 2
        assert message in capsys.readouterr().err
    assert main(["report", str(folder), "--out", str(tmp_path)]) == 2
    assert "is a folder: name a file" in capsys.readouterr().err


def test_a_line_that_a_killed_run_cut_short_is_left_out(tmp_path, capsys):
    """The last one, without its end: the rest is reported, and the page says so."""
    folder = a_run(tmp_path / "run", PROMPTS[:1])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "rew')
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}/report.html\n"
    page = (folder / "report.html").read_text()
    assert "The last line of metrics.jsonl was cut short, and is left out." in page and "40 steps" in page
    assert not list(folder.glob(".writing-*"))


def test_reading_raises_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        read_run(tmp_path / "none")


# ------------------------------------------------------------------------------------------------ in a browser


def test_the_page_opens_without_network_script_or_error(run, tmp_path, show):
    """Every picture is there, the links lead somewhere, and nothing is wider than the window, also on a phone."""
    page = write_report(read_run(run), tmp_path / "report.html")
    assert "<script" not in page.read_text() and "http" not in page.read_text().replace("http-equiv", "")
    for options in ({}, {"viewport": {"width": 390, "height": 844}}):
        tab = show(page, **options)
        sizes = tab.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
        assert len(sizes) == 1 + 3 * len(PROMPTS) and all(size > 0 for size in sizes)
        links = tab.locator("nav a").evaluate_all("links => links.map(link => link.getAttribute('href').slice(1))")
        ids = tab.locator("section").evaluate_all("parts => parts.map(part => part.id)")
        assert links == ids and {"alarms", "rewards", "cost", "settings"} <= set(ids)
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert tab.locator("svg.plot").count() >= 8


def test_hostile_text_is_only_text(run, tmp_path, show):
    """Prompts, an alarm's text and a device's name stand there as they were written, and none of them ran."""
    tab = show(write_report(read_run(run), tmp_path / "report.html"))
    heads = tab.locator(".strip h3").all_text_contents()
    for prompt in PROMPTS:
        assert prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace") in heads
    assert HOSTILE[0] in tab.locator(".alarm h3").first.text_content()
    assert tab.evaluate("window.hacked === undefined && document.scripts.length === 0")


def test_colours_follow_the_system(run, tmp_path, show):
    """Dark paper where the system is dark, in the curves too; and paper in print."""
    page = write_report(read_run(run), tmp_path / "report.html")
    papers, strokes = [], []
    for scheme in ("light", "dark"):
        tab = show(page, color_scheme=scheme)
        papers.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        strokes.append(tab.evaluate("getComputedStyle(document.querySelector('.plot .curve')).stroke"))
    assert papers == ["rgb(250, 249, 246)", "rgb(22, 22, 20)"] and strokes[0] != strokes[1]
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.parametrize("form", ["webp", "mp4"])
def test_clips_move_in_the_page(tmp_path, form):
    """Five frames of 400 x 200 at 8 a second become five of 192 x 96, animated, in the page itself."""
    frames = [shape_picture(i, size=400).crop((0, 0, 400, 200)) for i in range(5)]
    (tmp_path / f"a.{form}").write_bytes(clip_bytes(frames, 8, form))
    element = embedded(tmp_path / f"a.{form}", 192, "a <clip>")
    found = re.fullmatch(r'<img width="192" height="96" alt="a &lt;clip&gt;" src="data:image/webp;base64,([^"]+)">', element)
    assert found
    (tmp_path / "back.webp").write_bytes(base64.b64decode(found[1]))
    pixels, rate = read_clip(tmp_path / "back.webp")
    assert pixels.shape == (5, 96, 192, 3) and rate == 8
    (tmp_path / f"cut.{form}").write_bytes(clip_bytes(frames, 8, form)[:200])
    assert embedded(tmp_path / f"cut.{form}", 192, "") == f'<span class="missing">cut.{form} cannot be read</span>'


def test_large_pictures_become_small_ones(tmp_path):
    """A page is for looking: 192 pixels for a picture, 1,400 for a sheet, whatever they were."""
    folder = a_run(tmp_path / "run", PROMPTS[:1])
    Image.effect_noise((1024, 512), 80).convert("RGB").save(folder / "samples" / "step-000001" / "0000.png")
    Image.new("RGB", (3000, 1500)).save(folder / "watch" / "step-000024.png")
    page = render(read_run(folder))
    assert 'width="192" height="96"' in page and 'width="1400" height="700"' in page
