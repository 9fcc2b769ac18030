"""`flowrl sample`: every picture can be drawn again from what stands inside it, and nothing is half-written or drawn twice."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flowrl import record
from flowrl.batch import Prompt
from flowrl.cli import main
from flowrl.clips import read_clip, texts_of
from flowrl.config import ConfigError, load_recipe
from flowrl.evaluate import Protocol, evaluate
from flowrl.pictures import Cell, contact_sheet, file_stem, picture_bytes, read_facts, sheet_pages, slug
from flowrl.policy import Policy
from flowrl.sample import Settings, command_of, sample_to_folder
from flowrl.samplers.steering import BestOfN, steer
from flowrl.sources import Source
from tests.pipelines import CALL, tiny

FAST = Settings(num_inference_steps=2)
SHORT = ["--steps", "2"]


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def pictures(folder: Path) -> list[Path]:
    """What was drawn, without sheets and reports."""
    return sorted(path for path in folder.glob("*/*.*"))


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def table(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def refused(capsys, *argv: object) -> str:
    """The one line with which the command refuses."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    line = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and line.startswith("flowrl: "), line
    return line


@pytest.fixture(scope="module")
def run(tmp_path_factory, model) -> Path:
    """A run's folder with a LoRA that changes every picture, as training leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    folder.mkdir()
    policy = Policy.load(model)
    policy.add_lora(rank=2)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1)
    policy.snapshot("ema")
    recipe = load_recipe({"model": str(model), "rewards": {"brightness": 1.0}})
    record.write_facts(folder, recipe)
    record.save_result(policy, folder)
    return folder


# ------------------------------------------------------------------------------------------------ names


def test_names_are_readable_safe_and_different():
    """Of the text alone: equal on every machine, equal in every file; 255 bytes are what file systems take."""
    assert file_stem("a red circle", 3) == "a-red-circle-a1e4a280d2-s3"
    long = "a cat " * 200
    texts = ["a red circle", "A red circle", "a red, circle", "猫", "犬", "", "../../etc/passwd", "con", "a\nb", long, long + "!"]
    stems = [file_stem(text, 0) for text in texts]
    assert len({stem.lower() for stem in stems}) == len(texts), "also where upper and lower case are one"
    for stem in stems:
        assert stem.isascii() and len(stem) < 100 and not set(stem) & set('/\\:*?"<>| \n.') and not stem.startswith("-")
    assert file_stem("Ein grüner Kreis", 0).startswith("ein-gruner-kreis-")
    assert slug("stabilityai/stable-diffusion-3.5") == "stabilityai-stable-diffusion-3.5"


def test_prompts_that_repeat(tmp_path, model):
    """The same prompt twice is one picture; with other columns (another answer for a reward) it is two rows and two files."""
    prompts = [Prompt("a", {"n": 1}), Prompt("b"), Prompt("a", {"n": 2}), Prompt("b"), Prompt("a", {"n": 1})]
    result = sample_to_folder([model], prompts, tmp_path / "out", settings=FAST, rewards=[lambda images, prompts, n: n])
    assert (len(result.rows), result.repeated) == (3, 2)
    assert [row["rewards"]["<lambda>"] for row in result.rows] == [1, None, 2]
    assert [Path(row["file"]).name.split("-")[0] for row in result.rows] == ["a", "b", "a"]
    assert len({row["file"] for row in result.rows}) == 3


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("m", ("m", ())),
        ("m+a", ("m", (("a", 1.0),))),
        ("m+a@0.5+o/b@-1", ("m", (("a", 0.5), ("o/b", -1.0)))),
    ],
)
def test_models_with_loras(text, parsed):
    source = Source.parse(text)
    assert (source.model, source.loras) == parsed


def test_a_folder_may_have_a_plus_in_its_name(tmp_path):
    (tmp_path / "a+b").mkdir()
    assert Source.parse(f"{tmp_path}/a+b").loras == ()


# ------------------------------------------------------------------------------------------------ files


def test_text_comes_back_out_of_a_picture(tmp_path):
    """Prompts in any script, also with line ends."""
    facts = {"request": {"prompt": "猫 \n \u2028 é"}}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    path = tmp_path / "still.png"
    path.write_bytes(picture_bytes(picture, {"flowrl": json.dumps(facts, ensure_ascii=False)}))
    assert read_facts(path) == facts
    assert np.array_equal(pixels(path), np.array(picture))


@pytest.mark.parametrize("content", [b"", b"text", "plain", "cut"])
def test_pictures_of_others_are_refused(tmp_path, content):
    path = tmp_path / "a.png"
    if isinstance(content, str):
        Image.new("RGB", (64, 64)).save(path)
        content = path.read_bytes()[: 60 if content == "cut" else None]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a picture of `flowrl sample`"):
        read_facts(path)


def test_what_stands_inside_a_picture(tmp_path, model):
    """The text that other tools read, in the form they know; and the command, which draws the same picture."""
    settings = dataclasses.replace(FAST, guidance_scale=3.0, call={"negative_prompt": "blurry, dark"})
    out = tmp_path / "out"
    sample_to_folder([model], ["a cat:\na dog"], out, seeds=[5], settings=settings)
    [path] = pictures(out)
    with Image.open(path) as image:
        text = image.text["parameters"]
    digest = Source.parse(str(model)).digest()
    assert text == (
        "a cat:\na dog\nNegative prompt: blurry, dark\n"
        f"Steps: 2, Sampler: EULER, CFG scale: 3.0, Seed: 5, Size: 32x32, Model hash: {digest}, Model: {model}, "
        "Version: flowrl 0.1.0"
    )
    facts = read_facts(path)
    assert facts["resolved"]["pipeline"] == "StableDiffusion3Pipeline" and facts["resolved"]["max_sequence_length"] == 32
    words = shlex.split(facts["command"])
    assert words[0] == "flowrl" and main([*words[1:], "--out", str(tmp_path / "again")]) == 0
    [again] = pictures(tmp_path / "again")
    assert again.name == path.name and again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["plain", "noisy", "steered", "dpmpp2m"])
def test_a_picture_is_drawn_again_from_itself(tmp_path, model, prompts, kind):
    """`--from`: to one level of 255, alone though it was drawn in a batch of four (whose products round otherwise); other
    options may be changed on the way."""
    options = {
        "plain": [],
        "noisy": ["--transition", "cps", "noise_level=0.5"],
        "steered": ["--steer", "fk", "particles=3", "checkpoints=1", "t_from=1", "--rewards", "brightness"],
        "dpmpp2m": ["--solver", "dpmpp2m"],
    }[kind]
    argv = ["sample", model, "--prompts", prompts, "--limit", "2", "--seed", "3", "9", "--steps", "3", *options]
    assert main([*map(str, argv), "--out", str(tmp_path / "a")]) == 0
    drawn = pictures(tmp_path / "a")
    assert len(drawn) == 4
    assert main(["sample", "--from", str(drawn[-1]), "--out", str(tmp_path / "b")]) == 0
    [again] = pictures(tmp_path / "b")
    assert again.name == drawn[-1].name and np.abs(pixels(again).astype(int) - pixels(drawn[-1])).max() <= 1
    if kind == "steered":
        strength = read_facts(drawn[0])["resolved"]["tilt_strength"]
        assert strength > 0 and f"tilt_strength={strength}" in read_facts(again)["command"]
        return
    assert main(["sample", "--from", str(drawn[-1]), "--seed", "4", "--out", str(tmp_path / "b")]) == 0
    assert len(pictures(tmp_path / "b")) == 2 and read_facts(pictures(tmp_path / "b")[0])["request"]["seed"] in (4, 9)


def test_seeds_are_those_of_evaluations_and_galleries(tmp_path, model):
    """The noise seed that a gallery shows gives the gallery's picture, through the command that it shows."""
    result = evaluate(Policy.load(model), [Prompt("a cat")], {}, Protocol("p", 2, seeds=2, seed=1), keep_images=True)
    from flowrl.reward_models.base import to_pil
    from flowrl.sample import request_for

    command = command_of(request_for(str(model), Prompt("a cat"), result.seeds[0][1], FAST))
    assert main([*shlex.split(command)[1:], "--out", str(tmp_path / "out")]) == 0
    [path] = pictures(tmp_path / "out")
    expected = np.array(to_pil(result.samples.images)[1]).astype(int)
    assert np.abs(pixels(path) - expected).max() <= 1


# ------------------------------------------------------------------------------------------------ what is there already


def test_the_same_command_again_does_nothing(tmp_path, model, capsys):
    out = tmp_path / "out"
    argv = ["sample", str(model), "a", "b", "--seeds", "2", *SHORT, "--out", str(out), "--rewards", "brightness", "--grid"]
    assert main(argv) == 0
    assert "4 pictures in" in capsys.readouterr().out
    before = {name: facts for name, facts in state(out).items() if "/" in name}
    sheet = (out / "grid.png").read_bytes()
    rows = table(out)
    assert main(argv) == 0
    assert "(4 of them there already)" in capsys.readouterr().out
    assert {name: facts for name, facts in state(out).items() if "/" in name} == before
    assert (table(out), (out / "grid.png").read_bytes()) == (rows, sheet), "scored from their files, to the same numbers"
    assert main([*argv, "--overwrite"]) == 0
    after = {name: facts for name, facts in state(out).items() if "/" in name}
    assert [content for _, content in after.values()] == [content for _, content in before.values()]
    assert all(after[name][0] > before[name][0] for name in before)


def test_an_interrupted_command_goes_on(tmp_path, model, monkeypatch):
    """Stopped while it scores the third of four pictures: three are there, two have a row; the next call draws the fourth."""
    out, calls = tmp_path / "out", []

    def impatient(images, prompts):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return images.flatten(1).mean(1)

    arguments = {"seeds": [0, 1], "settings": FAST, "rewards": [impatient], "batch_size": 1}
    with pytest.raises(KeyboardInterrupt):
        sample_to_folder([model], ["a", "b"], out, **arguments)
    before = state(out)
    assert len(pictures(out)) == 3 and len(table(out)) == 2 and not list(out.rglob(".writing-*"))
    result = sample_to_folder([model], ["a", "b"], out, **arguments)
    assert (result.drawn, len(table(out))) == (1, 4) and None not in [row["rewards"]["impatient"] for row in result.rows]
    assert all(state(out)[name] == before[name] for name in before if name.endswith(".png"))


def test_other_commands_into_the_same_folder(tmp_path, model):
    """Their rows stay, in the order of writing; rewards that were measured stay with pictures that do."""
    out = tmp_path / "out"
    sample_to_folder([model], ["a"], out, settings=FAST, rewards=["brightness"])
    sample_to_folder([model], ["b", "a"], out, settings=FAST, rewards=["jpeg_size"])
    rows = table(out)
    assert [(row["prompt"], sorted(row["rewards"])) for row in rows] == [("b", ["jpeg_size"]), ("a", ["brightness", "jpeg_size"])]
    sample_to_folder([model], ["c"], out, settings=FAST)
    assert [row["prompt"] for row in table(out)] == ["b", "a", "c"]
    (out / rows[0]["file"]).unlink()
    sample_to_folder([model], ["c"], out, settings=FAST)
    assert [row["prompt"] for row in table(out)] == ["a", "c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--steps", "3"],
            "was drawn with num_inference_steps=2, now num_inference_steps=3: choose another --out, or --overwrite",
        ),
        ([*SHORT, "--transition", "cps"], 'was drawn with transition={"name": "ode"}, now transition={"name": "cps"}'),
        ([*SHORT, "--guidance", "2"], "was drawn with guidance_scale=null, now guidance_scale=2.0"),
    ],
)
def test_other_settings_do_not_mix(tmp_path, model, capsys, options, message):
    argv = ["sample", str(model), "a", "--out", str(tmp_path / "out")]
    assert main([*argv, *SHORT]) == 0
    before = state(tmp_path)
    assert message in refused(capsys, *argv, "b", *options)
    assert state(tmp_path) == before


def test_other_weights_do_not_mix(tmp_path, run, capsys):
    """A run that went on under the same name, and a picture of somebody else in the way."""
    moving, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, moving)
    argv = ["sample", str(moving), "a", *SHORT, "--out", str(out)]
    assert main(argv) == 0
    [path] = pictures(out)
    policy = record.load_trained(moving)
    policy.train_lora()
    with torch.no_grad():
        next(iter(policy.trainable().values())).add_(0.01)
    policy.save(moving)
    assert f"was drawn by other weights of {moving}: choose another --out, or --overwrite" in refused(capsys, *argv)
    assert main([*argv, "--overwrite"]) == 0
    Image.new("RGB", (8, 8)).save(path)
    assert "is not a picture of `flowrl sample`" in refused(capsys, *argv)
    assert Image.open(path).size == (8, 8)


# ------------------------------------------------------------------------------------------------ models and LoRAs


def test_models_runs_and_loras_side_by_side(tmp_path, model, run):
    """A run is its base with its LoRA; at scale 0 the base is left; at 0.5 something else. Names of files line up."""
    out = tmp_path / "out"
    models = [f"{model}", f"{run}", f"{model}+{run}", f"{model}+{run}@0", f"{model}+{run}@0.5+{run}/{record.LORA_FILE}@0.5"]
    result = sample_to_folder(models, ["a", "b"], out, settings=FAST, grid=True)
    folders = [Path(row["file"]).parent.name for row in result.rows[::2]]
    assert folders == ["sd3", "tuned", "sd3-tuned", "sd3-tuned-0", "sd3-tuned-0.5-pytorch-lora-weights-0.5"]
    base, tuned, added, nothing, halves = ([pixels(p) for p in sorted((out / f).glob("*.png"))] for f in folders)

    def far(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> int:
        return max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(one, other, strict=True))

    assert far(base, tuned) > 5
    assert far(tuned, added) <= 1 and far(base, nothing) <= 1 and far(tuned, halves) <= 1
    names = [{p.name for p in (out / folder).glob("*.png")} for folder in folders]
    assert all(some == names[0] for some in names) and len(names[0]) == 2
    assert len({read_facts(p)["weights"] for p in pictures(out)}) == 5
    assert Image.open(result.sheets[0]).size[0] > 5 * 128


def test_two_runs_of_one_name(tmp_path, run):
    for parent in ("one", "two"):
        shutil.copytree(run, tmp_path / parent / "run")
    result = sample_to_folder([tmp_path / "one/run", tmp_path / "two/run"], ["a"], tmp_path / "out", settings=FAST)
    assert len({row["file"] for row in result.rows}) == len({row["column"] for row in result.rows}) == 2


def test_one_bad_model_among_good_ones_is_found_first(tmp_path, model, capsys):
    assert "no model at nowhere" in refused(
        capsys, "sample", model, "a", "--against", "nowhere", *SHORT, "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_a_lora_of_another_model(tmp_path, model, run, capsys):
    """Of another architecture, and of other widths: refused in one line, nothing is drawn."""
    policy = Policy(tiny("sd15"), CALL["sd15"])
    policy.add_lora(rank=2, targets=["to_q"])
    policy.save(tmp_path / "sd15")
    (tmp_path / "wide").mkdir()
    wider = {
        name: tensor.repeat(1, 2) if "lora_A" in name else tensor for name, tensor in load_file(run / record.LORA_FILE).items()
    }
    save_file(wider, tmp_path / "wide" / record.LORA_FILE)
    for name in ("sd15", "wide"):
        line = refused(capsys, "sample", f"{model}+{tmp_path / name}", "a", *SHORT, "--out", tmp_path / "out")
        assert f"LoRA {tmp_path / name} does not fit {model}" in line
        assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ rewards


def test_rewards_are_those_of_the_stored_picture(tmp_path, model):
    """By hand from the 8 bits of the file; None where a reward abstains."""

    def red(images, prompts):
        return [None if prompt == "b" else float(image[0].mean()) for image, prompt in zip(images, prompts, strict=True)]

    out = tmp_path / "out"
    result = sample_to_folder([model], ["a", "b"], out, settings=FAST, rewards=[red])
    row, abstained = result.rows
    assert row["rewards"]["red"] == pytest.approx(pixels(out / row["file"])[:, :, 0].mean() / 255, abs=1e-6)
    assert abstained["rewards"] == {"red": None}
    assert table(out) == result.rows


# ------------------------------------------------------------------------------------------------ steering


def test_steering_beside_the_plain_sampler(tmp_path, model, capsys):
    """Counts by hand. Best of 3 in 2 steps: 3 x 2 denoiser calls and 3 rewards a picture, the best of three scores returned."""
    out = tmp_path / "out"
    argv = ["sample", model, "a", "b", *SHORT, "--seeds", "2", "--rewards", "brightness", "--grid", "--out", out]
    argv += ["--steer", "none", "--steer", "best_of_n", "particles=3", "--steer", "fk", "particles=2", "tilt_strength=5"]
    assert main([str(a) for a in argv]) == 0
    printed = capsys.readouterr().out
    assert "denoiser calls  24 (6.0 per picture, 3.0 x the plain sampler's)" in printed
    assert "reward calls    12 (3.0 per picture)" in printed
    for word in ("ESS of 2", "surviving ancestors", "log Z", "decodes"):
        assert word in printed
    folders = ["sd3", "sd3-best-of-n-particles-3", "sd3-fk-particles-2-tilt-strength-5"]
    assert sorted({p.parent.name for p in pictures(out)}) == folders
    rows = {(row["column"], row["prompt"], row["seed"]): row for row in table(out)}
    plain = {key[1:]: row["rewards"]["brightness"] for key, row in rows.items() if key[0] == "sd3"}
    for (column, *place), row in rows.items():
        if row["sampler"] == "ode":
            continue
        stem = Path(row["file"]).stem
        report = json.loads((out / Path(row["file"]).parent / "steering" / f"{stem}.json").read_text())
        assert report["prompt"] == row["prompt"] and report["picture"] == f"{stem}.png"
        assert Image.open(out / Path(row["file"]).parent / "steering" / f"{stem}.png").size[0] > 100
        assert report["rewards"][report["chosen"]] == pytest.approx(row["rewards"]["brightness"], abs=0.01)
        if row["sampler"] == "best_of_n":
            assert report["counts"]["denoiser_calls"] == 6 and len(report["rewards"]) == 3, column
            assert row["rewards"]["brightness"] >= plain[tuple(place)] - 1e-4, "the plain sample is among the three"
        else:
            assert [len(event["ancestors"]) for event in report["history"]] and 1 <= report["surviving_ancestors"] <= 2
    assert Image.open(out / "grid.png").size[0] > 6 * 128


def test_one_particle_is_the_plain_sampler(tmp_path, model):
    out = tmp_path / "out"
    steering = {"name": "best_of_n", "particles": 1, "reward": "brightness"}
    sample_to_folder([model], ["a"], out, settings=FAST, steers=[None, steering])
    first, second = pictures(out)
    assert np.abs(pixels(first).astype(int) - pixels(second)).max() <= 1
    policy = Policy.load(model)
    alone = steer(policy, [Prompt("a")], lambda samples: torch.zeros(len(samples)), BestOfN(1), [0], num_inference_steps=2)
    assert np.abs(pixels(first) - (alone.samples.images[0].permute(1, 2, 0) * 255).numpy()).max() <= 1


# ------------------------------------------------------------------------------------------------ clips


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    """A video pipeline's folder: clips of 5 frames, 8 a second."""
    folder = tmp_path_factory.mktemp("models") / "wan"
    tiny("wan").save_pretrained(folder)
    (folder / "flowrl.json").write_text(json.dumps({"call": CALL["wan"], "fps": 8}))
    return folder


@pytest.mark.parametrize("form", ["webp", "mp4"])
def test_clips(tmp_path, wan, form):
    """All frames, their rate, all text; drawn again from themselves, scored from their files, also where those lost something."""
    out = tmp_path / "out"
    argv = ["sample", str(wan), "a cat", *SHORT, "--out", str(out), "--rewards", "brightness", "--grid", "--clip-format", form]
    assert main(argv) == 0
    [path] = pictures(out)
    frames, rate = read_clip(path)
    facts = read_facts(path)
    assert (frames.shape, rate, path.suffix) == ((5, 32, 32, 3), 8, f".{form}")
    assert (facts["resolved"]["num_frames"], facts["resolved"]["fps"]) == (5, 8)
    assert table(out)[0]["rewards"]["brightness"] == pytest.approx(frames.mean() / 255, abs=1e-6)
    assert "Frames: 5, FPS: 8" in texts_of(path)["parameters"]
    rows = table(out)
    assert main(argv) == 0
    assert table(out) == rows
    assert main(["sample", "--from", str(path), "--out", str(tmp_path / "again")]) == 0
    assert pictures(tmp_path / "again")[0].read_bytes() == path.read_bytes()
    assert ("--clip-format mp4" in facts["command"]) == (form == "mp4")


def test_the_rate_of_clips_can_be_said(tmp_path, wan):
    assert main(["sample", str(wan), "a cat", *SHORT, "--out", str(tmp_path), "--fps", "12.5"]) == 0
    [path] = pictures(tmp_path)
    assert read_clip(path)[1] == 12.5 and "--fps 12.5" in read_facts(path)["command"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--call", "num_frames=6"], "num_frames=6: AutoencoderKLWan takes 4 k + 1 frames; the nearest are 5 and 9"),
        (["--call", "num_frames=0"], "num_frames=0: a whole number, 1 at least"),
        (["--fps", "0"], "fps=0.0: frames per second, more than 0 and at most 1000"),
    ],
)
def test_clips_that_cannot_be_are_refused_before_anything_is_loaded(tmp_path, wan, capsys, monkeypatch, argv, message):
    monkeypatch.setattr(Policy, "load", None)
    assert message in refused(capsys, "sample", wan, "a cat", *argv, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ sheet


def test_the_sheet_takes_any_text_and_any_size():
    """Scripts that the font lacks, words without end, no text at all; pictures of several sizes, and missing ones."""
    rows = ["", "x" * 3000, "猫 אבג \u0000\n\t😀 " * 50, "a red circle"]
    wide, tall = Image.new("RGB", (200, 20), "red"), Image.new("RGB", (3, 500), "blue")
    cells = [[Cell(wide, "r 1"), Cell(tall)], [Cell(None), Cell(None)], [Cell([wide] * 9), Cell(wide)], [Cell(tall), Cell(None)]]
    sheet = contact_sheet(rows, [("m" * 500, "seed 0"), ("other", "")], cells, "note " * 200)
    assert sheet.width < 4000 and sheet.height < 4000
    colours = {colour for _, colour in sheet.getcolors(1 << 24)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours


def test_pictures_stand_where_their_labels_say():
    """Two rows, two columns, four colours: each is found in its place, uncut, and rows of a page are not lost."""
    colours = [["red", "lime"], ["blue", "black"]]
    cells = [[Cell(Image.new("RGB", (128, 128), colour)) for colour in row] for row in colours]
    sheet = np.array(contact_sheet(["one", "two"], [("m", "seed 0"), ("m", "seed 1")], cells))
    boxes = []
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        y, x = np.nonzero((sheet == colour).all(2))
        assert len(y) == 128 * 128
        boxes.append((y.min(), x.min()))
    (y0, x0), (y1, x1), (y2, x2) = boxes
    assert y0 == y1 < y2 and x0 == x2 < x1
    pages = sheet_pages(100, 1024)
    assert [i for page in pages for i in range(100)[page]] == list(range(100)) and len(pages) > 1


def test_the_sheet_is_cut_into_pages(tmp_path, model):
    out = tmp_path / "out"
    result = sample_to_folder([model], [f"prompt {i}" for i in range(70)], out, settings=Settings(1), grid=True)
    assert [sheet.name for sheet in result.sheets] == ["grid-1.png", "grid-2.png"]
    assert all(Image.open(sheet).height < 13_000 for sheet in result.sheets)
    result = sample_to_folder([model], ["prompt 0"], out, settings=Settings(1), grid=True)
    assert sorted(path.name for path in out.glob("grid*")) == ["grid.png"]


# ------------------------------------------------------------------------------------------------ the command


def test_prompts_and_seeds_from_the_command_line(tmp_path, model, prompts, capsys):
    """Arguments, then the file's, limited evenly; prompts may follow options; seeds by number, by name, and counted on."""

    def drawn(*argv: object) -> list[tuple[str, int]]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        assert main(["sample", str(model), *map(str, argv), *SHORT, "--out", str(folder)]) == 0
        return [(row["prompt"], row["seed"]) for row in table(folder)]

    assert drawn("x", "y") == [("x", 0), ("y", 0)]
    assert drawn("x", "--prompts", prompts, "--limit", 2) == [("x", 0), ("a red circle", 0), ("two green squares", 0)]
    assert drawn("x", "--seeds", 3) == [("x", 0), ("x", 1), ("x", 2)]
    assert drawn("x", "--seed", 7, 3) == [("x", 7), ("x", 3)]
    assert drawn("x", "--seed", 7, "--seeds", 2) == [("x", 7), ("x", 8)]
    assert drawn("--height", 32, "x", "--width", 32, "y") == [("x", 0), ("y", 0)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{model}"], "no prompts: give them as arguments"),
        ([], "no model: give one (tiny-sd3), or --from PICTURE"),
        (["{model}", "a", "--seed", "1", "1"], "seeds: name each once"),
        (["{model}", "a", "--seed", "1", "2", "--seeds", "3"], "--seeds 3 counts on from one --seed, but 2 are given"),
        (["{model}", "a", "--seed", "-1"], "argument --seed: -1 is not a whole number"),
        (["{model}", "a", "--transition", "csp"], "unknown transition 'csp'; did you mean cps?"),
        (["{model}", "a", "--transition", "cps", "noise=1"], "unknown transition option 'noise'"),
        (["{model}", "a", "--transition", "cps", "a red circle"], "'a red circle' is not key=value; prompts stand right after"),
        (["{model}", "a", "--steer", "kf", "--rewards", "brightness"], "unknown steer 'kf'"),
        (["{model}", "a", "--steer", "fk", "lam=1", "--rewards", "brightness"], "unknown steer option 'lam'"),
        (["{model}", "a", "--steer", "fk", "particles=0", "--rewards", "brightness"], "particles=0 must be positive"),
        (["{model}", "a", "--steer", "fk"], "steer fk: name the reward that it climbs, with --reward NAME"),
        (["{model}", "a", "--steer", "fk", "reward=brightnes"], "unknown reward 'brightnes'; did you mean brightness"),
        (["{model}", "a", "--rewards", "brightnes"], "unknown reward 'brightnes'; did you mean brightness"),
        (["{model}", "a", "--call", "negative_promt=x"], "unknown argument of StableDiffusion3Pipeline 'negative_promt'"),
        (["{model}", "a", "--height", "30"], "`height` and `width` have to be divisible by"),
        (["{model}", "a", "--device", "cuda:99"], "--device cuda:99: "),
        (["{model}", "a", "--prompts", "nowhere.txt"], "no prompt file at nowhere.txt"),
        (["{model}", "a", "--out", "{tmp}/file"], "--out {tmp}/file cannot be made: File exists"),
        (["{model}", "a", "--out", "{tmp}/file/deep"], "--out {tmp}/file/deep cannot be made: Not a directory"),
        (["{model}+{tmp}", "a"], "there is no pytorch_lora_weights.safetensors in {tmp}"),
        (["{model}+{tmp}/none", "a"], "no LoRA at {tmp}/none"),
        (["{model}+{tmp}@much", "a"], "'much' is not a LoRA's scale; write MODEL+LORA@0.5"),
        (["{model}+", "a"], "write MODEL+LORA"),
        (["--from", "{tmp}/file"], "{tmp}/file is not a picture of `flowrl sample`"),
        (["--from", "{tmp}/nowhere.png"], "no picture at {tmp}/nowhere.png"),
        (["{model}", "a", "--overwite"], "unrecognized arguments: --overwite"),
    ],
)
def test_refusals_leave_nothing(capsys, tmp_path, monkeypatch, model, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    line = refused(capsys, "sample", *[a.format(model=model, tmp=tmp_path) for a in argv], *SHORT)
    assert message.format(tmp=tmp_path) in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_a_reward_that_fails_is_named_and_its_pictures_stay(tmp_path, model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "sample_rewards.py").write_text("def broken(images, prompts):\n    raise ValueError('no scorer here')\n")
    argv = ["sample", model, "a", *SHORT]
    line = refused(capsys, *argv, "--rewards", "sample_rewards.broken")
    assert "reward 'sample_rewards.broken' raised ValueError: no scorer here" in line
    assert len(pictures(tmp_path / "samples")) == 1
    steering = ["--steer", "best_of_n", "reward=sample_rewards.broken"]
    assert "reward 'sample_rewards.broken' raised ValueError" in refused(capsys, *argv, *steering, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    helped = capsys.readouterr().out
    assert all(word in helped for word in ("--from", "MODEL+LORA", "--steer fk particles=8", "--grid", "--overwrite"))
    assert main(["sample", "--steer", "help"]) == 0
    printed = capsys.readouterr().out
    assert "fk: " in printed and "particles=8" in printed and "best_of_n" in printed


def test_bad_settings_from_python(tmp_path, model):
    with pytest.raises(ConfigError, match="dtype='int8': choose one of"):
        sample_to_folder([model], ["a"], tmp_path / "out", settings=Settings(dtype="int8"))
    with pytest.raises(ConfigError, match="seeds"):
        sample_to_folder([model], ["a"], tmp_path / "out", seeds=[])
    assert not (tmp_path / "out").exists()
