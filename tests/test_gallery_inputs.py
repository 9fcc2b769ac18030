"""What galleries and sheets take: folders of `flowrl sample`, a run's samples, any folder of pictures; and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowrl.cli import main
from flowrl.clips import clip_bytes, read_clip
from flowrl.config import ConfigError
from flowrl.gallery import Cell, write_gallery
from flowrl.gallery.inputs import (
    FILM_PICTURES,
    FILM_STEPS,
    Inputs,
    caption_of,
    checkpoint_of,
    in_order,
    joined,
    read_input,
    scored,
    trained_on,
)
from flowrl.gallery.sheet import write_sheet
from flowrl.pictures import picture_bytes
from flowrl.sample import Settings, sample_to_folder
from tests.gallery import page_data, shape_picture


def save(path: Path, seed: int = 0, **texts: str) -> Path:
    """A small picture, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_bytes(shape_picture(seed, size=32), texts))
    return path


def table(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def found(place: Path, name: str | None = None) -> Inputs:
    inputs = read_input(place, name)
    assert inputs is not None
    return inputs


def places(inputs: Inputs) -> list[tuple[str, str, int]]:
    return [(cell.model, cell.prompt, cell.seed) for cell in inputs.cells]


# ---------------------------------------------------------------- the folder of `flowrl sample`


@pytest.fixture(scope="module")
def samples(tmp_path_factory, model) -> Path:
    """One model, two prompts, two seeds, one reward."""
    out = tmp_path_factory.mktemp("drawn") / "samples"
    sample_to_folder([model], ["a red circle", "b"], out, seeds=[0, 7], settings=Settings(2), rewards=["brightness"])
    return out


def test_a_folder_of_samples_brings_prompts_seeds_rewards_and_commands(samples):
    inputs = found(samples)
    assert places(inputs) == [("sd3", prompt, seed) for prompt in ("a red circle", "b") for seed in (0, 7)]
    rows = [json.loads(line) for line in (samples / "samples.jsonl").read_text().splitlines()]
    assert [cell.rewards for cell in inputs.cells] == [row["rewards"] for row in rows]
    first = inputs.cells[1].details
    assert first["steps"] == "2" and first["sampler"] == "ode"
    assert first["command"].startswith("flowrl sample ") and first["command"].endswith(" 'a red circle' --seed 7 --steps 2")
    assert inputs.problems == []
    assert places(found(samples, "mine"))[0] == ("mine", "a red circle", 0)


def test_gallery_of_a_folder(samples, tmp_path, capsys):
    assert main(["gallery", str(samples), "--out", str(tmp_path / "g"), "--limit", "1"]) == 0
    data = page_data(tmp_path / "g" / "index.html")
    assert [prompt["prompt"] for prompt in data["prompts"]] == ["a red circle"]
    assert [place["seed"] for place in data["prompts"][0]["sets"]] == [0, 7]
    assert data["rewards"] == [{"name": "brightness", "heldOut": False}]
    assert data["title"] == "sd3"
    assert capsys.readouterr().out.strip() == str(tmp_path / "g" / "index.html")


def test_two_folders_with_one_column_name_are_told_apart(samples, tmp_path):
    table(tmp_path / "other" / "samples.jsonl", {"file": "x.png", "prompt": "b", "seed": 0, "column": "sd3"})
    save(tmp_path / "other" / "x.png")
    other = tmp_path / "other"
    whole = joined([(samples, found(samples)), (other, found(other))])
    assert {cell.model for cell in whole.cells} == {"sd3 (samples)", "sd3 (other)"}
    namesake = save(tmp_path / "deep" / "samples" / "sd3" / "b-s0.png").parents[1]
    whole = joined([(samples, found(samples)), (namesake, found(namesake))])
    assert {cell.model for cell in whole.cells} == {f"sd3 ({samples})", f"sd3 ({namesake})"}


def test_a_kind_that_one_folder_knows_holds_for_all(tmp_path):
    image = save(tmp_path / "a.png")
    parts = [
        (tmp_path / m, Inputs([Cell(m, "p", 0, image, {}, kind)])) for m, kind in (("x", None), ("y", "counting"), ("z", "other"))
    ]
    assert [cell.kind for cell in joined(parts).cells] == ["counting"] * 3


def test_what_a_table_says_wrongly_is_named_and_left_out(tmp_path):
    save(tmp_path / "t" / "a.png")
    table(
        tmp_path / "t" / "samples.jsonl",
        {"file": "a.png", "prompt": "p", "seed": 3, "rewards": {"x": float("inf"), "y": None, "z": "high", "w": True, "v": 1}},
        "{not json\n",
        "[1, 2]\n",
        {"file": "a.png"},
        {"file": "lost.png", "prompt": "p", "seed": 4},
    )
    inputs = found(tmp_path / "t")
    assert places(inputs) == [("t", "p", 3), ("t", "p", 4)], "the page has a place for the missing file, with its name"
    assert inputs.cells[0].rewards == {"x": None, "y": None, "z": None, "w": None, "v": 1.0}
    assert inputs.problems == [
        "t/samples.jsonl, line 2 is not valid JSON",
        "t/samples.jsonl, line 3 is not an object",
        "t/samples.jsonl: a row without file and prompt",
        "a.png: its x is inf, not a number",
        "a.png: its z is 'high', not a number",
        "a.png: its w is True, not a number",
    ]


def test_the_second_picture_of_one_place_is_left_out(tmp_path):
    save(tmp_path / "a.png")
    cells = [
        Cell("m", "p", 0, tmp_path / "a.png", {}),
        Cell("m", "p", 0, tmp_path / "b.png", {}),
        Cell("m", "p", 1, Image.new("RGB", (1, 1)), {}),
    ]
    whole = joined([(tmp_path, Inputs(cells))])
    assert len(whole.cells) == 2
    assert whole.problems == ["Left out, there is another of its prompt and seed: b.png (m)"]


# ---------------------------------------------------------------- any folder of pictures


def test_captions_come_from_tables_texts_pictures_and_names(tmp_path):
    """In this order; the seed from the same source, or the end of the name."""
    place = tmp_path / "pictures"
    for name in ("told.png", "beside-s4.png", "a_red_circle_0003.png", "plain.png", "0007.png"):
        save(place / name)
    save(place / "ours.png", flowrl=json.dumps({"request": {"prompt": "drawn by us", "seed": 11}}))
    save(place / "theirs.png", parameters="a cat, on a mat\nNegative prompt: dogs\nSteps: 20, Seed: 12, Size: 32x32")
    save(place / "bare.png", parameters="just words\nSteps: 20")
    (place / "beside-s4.txt").write_text("a caption\n")
    (place / "notes.md").write_text("no picture")
    told = {"file_name": "told.png", "text": "told", "seed": 9, "kind": "colours", "rewards": {"r": 0.5}}
    table(place / "metadata.jsonl", told, {"file_name": "gone.png", "text": "x"})
    inputs = found(place)
    assert {(cell.prompt, cell.seed) for cell in inputs.cells} == {
        ("told", 9),
        ("a caption", 4),
        ("a red circle", 3),
        ("plain", 0),
        ("0007", 0),
        ("drawn by us", 11),
        ("a cat, on a mat", 12),
        ("just words", 0),
    }
    [first] = [cell for cell in inputs.cells if cell.prompt == "told"]
    assert (first.model, first.kind, first.rewards) == ("pictures", "colours", {"r": 0.5})
    assert inputs.columns["told"] == {"text": "told", "seed": 9, "kind": "colours"}
    assert inputs.problems == ["Missing file: gone.png (metadata.jsonl)"]


def test_subfolders_are_columns_whose_names_line_up(tmp_path):
    for model in ("base", "tuned"):
        for name in ("10", "2"):
            save(tmp_path / "both" / model / f"{name}.png")
    (tmp_path / "both" / "base" / "10.txt").write_text("ten")
    (tmp_path / "both" / "tuned" / "10.txt").write_text("ten")
    assert places(found(tmp_path / "both")) == [("base", "2", 0), ("base", "ten", 0), ("tuned", "2", 0), ("tuned", "ten", 0)]


def test_equal_captions_are_numbered(tmp_path):
    for i in range(3):
        save(tmp_path / "p" / f"{i}.png")
        (tmp_path / "p" / f"{i}.txt").write_text("same")
    assert [cell.seed for cell in found(tmp_path / "p").cells] == [0, 1, 2]


def test_the_layout_of_geneval(tmp_path):
    for i, prompt in enumerate(("a photo of a bench", "two clocks")):
        table(tmp_path / "o" / f"{i:05d}" / "metadata.jsonl", {"tag": "counting", "prompt": prompt})
        for k in range(2):
            save(tmp_path / "o" / f"{i:05d}" / "samples" / f"{k:04d}.png")
    assert places(found(tmp_path / "o")) == [("o", p, k) for p in ("a photo of a bench", "two clocks") for k in (0, 1)]


@pytest.mark.parametrize(
    ("stem", "prompt", "seed"),
    [
        ("a-cat-s3", "a cat", 3),
        ("a_cat seed_4", "a cat", 4),
        ("cat_000012", "cat", 12),
        ("sd3", "sd3", None),
        ("0004", "0004", None),
        ("--", "--", None),
    ],
)
def test_prompts_and_seeds_in_names(tmp_path, stem, prompt, seed):
    assert caption_of(save(tmp_path / f"{stem}.png"), {}) == (prompt, seed)


def test_folders_that_hold_no_pictures_are_left_to_models(tmp_path, model):
    (tmp_path / "empty").mkdir()
    assert [read_input(place) for place in (tmp_path / "nowhere", tmp_path / "empty", model)] == [None] * 3


# ---------------------------------------------------------------- a run's own samples


def run_folder(place: Path, steps: int, groups: int = 2, each: int = 2, frames: int = 1) -> Path:
    """A run that saved samples: the reward r is step / 10 for each of them."""
    (place / "samples").mkdir(parents=True)
    (place / "recipe.yaml").write_text("model: tiny-sd3\nrewards: {r: 1.0}\n")
    for step in range(1, steps + 1):
        folder = place / "samples" / f"step-{step:06d}"
        rows = []
        for i in range(groups * each):
            rows.append(
                {
                    "file": f"{i:04d}.{'png' if frames == 1 else 'webp'}",
                    "prompt": f"p{i // each}",
                    "seed": 1 << 60,
                    "group": i // each,
                    "rewards": {"r": step / 10},
                }
            )
            folder.mkdir(exist_ok=True)
            shown = [Image.new("RGB", (8, 8), (10 * f, 0, 0)) for f in range(frames)]
            content = picture_bytes(shown[0], {}) if frames == 1 else clip_bytes(shown, 8)
            (folder / rows[-1]["file"]).write_bytes(content)
        table(folder / "samples.jsonl", *rows)
    return place


def test_a_runs_samples_are_a_film(tmp_path):
    """Pictures in turn from every group; the mean of all pictures, not of those shown."""
    inputs = found(run_folder(tmp_path / "mine", 3) / "samples")
    [film] = inputs.films
    frames = list(film.frames)
    assert [frame.step for frame in frames] == [1, 2, 3]
    assert [cell.prompt for cell in frames[0].cells] == ["p0", "p1", "p0", "p1"]
    assert [frame.means for frame in frames] == [{"r": pytest.approx(step / 10)} for step in (1, 2, 3)]
    assert (film.name, inputs.trained, inputs.cells) == ("mine", {"r"}, [])


def test_long_films_are_cut_evenly_and_say_so(tmp_path):
    run = run_folder(tmp_path / "long", FILM_STEPS + 20, groups=1, each=1)
    frames = list(found(run / "samples").films[0].frames)
    assert len(frames) == FILM_STEPS and (frames[0].step, frames[-1].step) == (1, FILM_STEPS + 20)
    assert f"{FILM_STEPS} of {FILM_STEPS + 20} saved steps" in found(run / "samples").films[0].note
    [film] = found(run_folder(tmp_path / "wide", 1, groups=7, each=2) / "samples").films
    assert len(next(iter(film.frames)).cells) == FILM_PICTURES
    assert f"{FILM_PICTURES} of 14 pictures" in film.note


def test_clips_of_a_run_are_clips_in_its_film(tmp_path):
    """Three frames at 8 a second: two columns, 125 ms each."""
    [film] = found(run_folder(tmp_path / "clips", 1, frames=3) / "samples").films
    page = page_data(write_gallery(tmp_path / "g", [], title="T", films=[film]))
    drawn = page["films"][0]["frames"][0]["cells"][0]
    assert drawn["image"].endswith(".webp") and drawn["frames"] | {"file": ""} == {
        "file": "",
        "count": 3,
        "columns": 2,
        "ms": 125,
    }


# ---------------------------------------------------------------- what is known about models


def test_checkpoints_and_runs_know_their_steps(tmp_path):
    run_folder(tmp_path / "a", 1)
    assert checkpoint_of("runs/x/checkpoint-50/") == ("x", 50)
    assert checkpoint_of("tiny-sd3") is None and checkpoint_of(str(tmp_path / "a")) is None
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 30}\n')
    assert checkpoint_of(str(tmp_path / "a")) == ("a", 30)


def test_checkpoints_are_ordered_by_step():
    given = ["tiny-sd3", "r/checkpoint-100", "r/checkpoint-20", "q/checkpoint-9", "r/checkpoint-3", "r"]
    assert in_order(given) == ["tiny-sd3", "r/checkpoint-3", "r/checkpoint-20", "q/checkpoint-9", "r/checkpoint-100", "r"]


def test_rewards_that_a_model_was_trained_on(tmp_path):
    run = run_folder(tmp_path / "run", 1)
    assert trained_on(str(run)) == trained_on(f"tiny-sd3+{run}@0.5") == trained_on(str(run / "checkpoint-5")) == {"r"}
    assert trained_on("tiny-sd3") == set()


# ---------------------------------------------------------------- scoring


def test_pictures_of_any_size_are_scored_and_unreadable_ones_are_not(tmp_path):
    """brightness is the mean of all values: 51 / 255 = 0.2 and 0.4."""
    Image.new("RGB", (8, 8), (51, 51, 51)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 4), (102, 102, 102)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    cells = scored(found(tmp_path), ["brightness"]).cells
    assert [cell.rewards for cell in cells] == [{"brightness": pytest.approx(0.2)}, {"brightness": pytest.approx(0.4)}, {}]


def test_rewards_that_compare_are_refused(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="compares pictures with others"):
        scored(found(tmp_path), ["mmd"])


# ---------------------------------------------------------------- the sheet and the commands


def test_sheet_groups_by_model_or_seed_and_names_what_it_could_not_read(tmp_path):
    """Columns: 2 models x 2 seeds of 128 pixels, with gaps, margins and the prompts: 16 + 200 + 4 x 134 + 16 = 768 pixels."""
    cells = [
        Cell(m, "a red circle", s, shape_picture(s), {"x.verify": 0.5, "y": None}) for m in ("base", "tuned") for s in (0, 1)
    ]
    cells[3] = Cell("tuned", "a red circle", 1, tmp_path / "lost.png", {})
    files, problems = write_sheet(tmp_path / "sheet.png", cells)
    assert files == [tmp_path / "sheet.png"] and problems == ["Missing file: lost.png"]
    one = Image.open(files[0])
    assert one.width == 768
    other = Image.open(write_sheet(tmp_path / "by.png", cells, by_seed=True, rewards=False)[0][0])
    assert other.width == 768 and other.height < one.height, "no line for rewards"


def test_sheet_shows_clips_as_strips(tmp_path):
    """From memory and from files, of video too; what is no video is named."""
    frames = [shape_picture(i) for i in range(9)]
    (tmp_path / "film.mp4").write_bytes(clip_bytes(frames, 8, "mp4"))
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    images = {"p": frames, "q": tmp_path / "film.mp4", "r": tmp_path / "broken.mp4"}
    [file], problems = write_sheet(tmp_path / "s.png", [Cell("m", prompt, 0, image, {}) for prompt, image in images.items()])
    sheet = Image.open(file)
    assert sheet.width == 16 + 200 + 4 * 128 + 6 + 16
    assert problems == ["Unreadable file: broken.mp4"]


@pytest.mark.parametrize("form", ["webp", "mp4"])
def test_clips_move_in_a_film_of_the_sheet(tmp_path, form):
    """Of five frames, of three, which stays at its third, and of a still picture; ten a second, as the first clip."""
    shades = [Image.new("RGB", (128, 128), (v, v, v)) for v in (0, 60, 120, 180, 240)]
    (tmp_path / "five.webp").write_bytes(clip_bytes(shades, 10))
    images = {"p": tmp_path / "five.webp", "q": shades[:3], "r": shades[4]}
    cells = [Cell("m", prompt, 0, image, {}) for prompt, image in images.items()]
    [file], problems = write_sheet(tmp_path / f"film.{form}", cells)
    pixels, fps = read_clip(file)
    still = write_sheet(tmp_path / "s.png", cells[2:])[0][0]
    assert (len(pixels), fps, problems) == (5, 10.0, [])
    top = Image.open(still).height  # heading, one row and margin
    pitch = (pixels.shape[1] - top) // 2
    middle = [top - 16 - pitch // 2 + i * pitch for i in range(3)]
    found = pixels[:, middle, 16 + 200 + 64].astype(int)
    expected = [[0, 0, 240], [60, 60, 240], [120, 120, 240], [180, 120, 240], [240, 120, 240]]
    assert np.abs(found - np.array(expected)[..., None]).max() < 9


def test_clips_are_scored_whole(tmp_path):
    """Frames of 0, 51 and 102 are 0.2 on average, in files of both kinds; the first alone would be 0. 8 and 16 a second apart."""
    shown = [Image.new("RGB", (16, 16), (v, v, v)) for v in (0, 51, 102)]
    for name, fps, form in (("a", 8, "webp"), ("b", 16, "webp"), ("c", 8, "mp4")):
        (tmp_path / f"{name}.{form}").write_bytes(clip_bytes(shown, fps, form))
    cells = scored(found(tmp_path), ["brightness"]).cells
    assert [cell.rewards["brightness"] for cell in cells] == [pytest.approx(0.2, abs=0.01)] * 3


def test_grid_command(samples, tmp_path, capsys):
    out = tmp_path / "figures" / "grid.png"
    assert main(["grid", f"drawn={samples}", "--out", str(out), "--by", "seed", "--note", "two steps"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert Image.open(out).width == 16 + 200 + 2 * 134 + 16


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["gallery", "{model}", "{samples}"],
            "is to be drawn and {samples} holds pictures: draw it with the same prompts and seeds",
        ),
        (["gallery", "nowhere", "--out", "{tmp}/g"], "no model at nowhere"),
        (["grid", "{samples}", "--out", "{tmp}/sheet.jpg"], "a sheet is a .png, or where clips are to move a .webp or .mp4"),
        (["grid", "{run}", "--out", "{tmp}/s.png"], "holds no pictures of models"),
        (["gallery", "{samples}", "--rewards", "nothing", "--out", "{tmp}/g"], "unknown reward 'nothing'"),
    ],
)
def test_commands_refuse_in_one_line(samples, model, tmp_path, capsys, argv, message):
    run = run_folder(tmp_path / "runs" / "r", 1) / "samples"
    names = {"model": model, "samples": samples, "tmp": tmp_path, "run": run}
    assert main([word.format(**names) for word in argv]) == 2
    line = capsys.readouterr().err
    assert message.format(**names) in line and line.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_gallery_draws_models_and_adds_what_a_run_saved(model, prompts, tmp_path):
    """The run's result is the model itself, so both draw the same; its samples are a film, its reward is the trained one."""
    run = run_folder(tmp_path / "run", 2)
    (run / "recipe.yaml").write_text(f"model: {model}\nrewards: {{r: 1.0}}\n")
    (run / "model").symlink_to(model)
    argv = ["gallery", f"before={model}", str(run), "--prompts", str(prompts), "--limit", "2", "--steps", "2", "--seeds", "1"]
    assert main([*argv, "--rewards", "brightness", "--out", str(tmp_path / "g")]) == 0
    data = page_data(tmp_path / "g" / "index.html")
    assert [entry["name"] for entry in data["models"]] == ["before", "run"] and data["title"] == "run against before"
    cells = data["prompts"][0]["sets"][0]["cells"]
    assert cells[0]["rewards"] == cells[1]["rewards"]
    assert cells[0]["details"]["command"].startswith(f"flowrl sample {model} ")
    assert [film["name"] for film in data["films"]] == ["run"] and len(data["films"][0]["frames"]) == 2
    assert data["rewards"] == [{"name": "brightness", "heldOut": True}]
