"""`flowrl eval`: saved scores and their protocol, pictures that stay, exports and imports, refusals in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import flowrl.sample
from flowrl.cli import main
from flowrl.pictures import read_facts
from flowrl.protocol import differences
from flowrl.scorefile import read_results
from tests.test_cli import refused
from tests.test_layouts import METADATA

FAST = ["--steps", "2", "--seeds", "2", "--rewards", "brightness", "jpeg_size"]


@pytest.fixture
def here(tmp_path, monkeypatch, model) -> Path:
    """A folder to work in, with two models: `base`, and `tuned`, whose decoder is darker."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "base")
    shutil.copytree(model, "tuned")
    from safetensors.torch import load_file, save_file

    weights = next(Path("tuned/vae").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"] -= 0.3
    save_file(tensors, weights, metadata={"format": "pt"})
    Path("four.txt").write_text("a red circle\nblue\ntwo green squares\na cat\n")
    return tmp_path


def evaluated(*argv: object) -> list:
    """The results that the command writes."""
    assert main(["eval", *map(str, argv), "--out", "scores.json"]) == 0
    return read_results("scores.json")


# ------------------------------------------------------------------------------------------------ saved scores


def test_a_saved_base_is_not_drawn_again(here, capsys):
    """Its folder is gone, and its prompts, seeds, steps and rewards hold for what is drawn beside it."""
    assert main(["eval", "base", "--prompts", "four.txt", "--limit", "3", "--guidance", "2", *FAST, "--out", "base.json"]) == 0
    shutil.rmtree("base")
    Path("four.txt").unlink()
    capsys.readouterr()
    tuned, base = evaluated("tuned", "--against", "base.json", "--markdown", "deep/report.md")
    out = capsys.readouterr().out
    assert "brightness" in out and "pair by pair" in out and "3 prompts: four.txt (" in out
    assert not differences(tuned.protocol, base.protocol, *base.rewards) and tuned.seeds == base.seeds and len(tuned.prompts) == 3
    assert (tuned.protocol.guidance_scale, tuned.protocol.num_inference_steps, tuned.protocol.size) == (2.0, 2, (32, 32))
    assert tuned.rewards == base.rewards == ["brightness", "jpeg_size"] and tuned.weights != base.weights
    comparison = json.loads(Path("scores.json").read_text())["comparisons"][0]
    assert (
        comparison["rewards"]["brightness"]["all"]["high"] < 0
        and comparison["rewards"]["brightness"]["all"]["win_rate"]["rate"] == 0
    )
    assert Path("deep/report.md").read_text().startswith("# tuned against base\n\n3 prompts: four.txt (")

    shutil.rmtree("tuned")  # both are saved now: nothing is sampled
    assert main(["eval", "scores.json:tuned", "--against", "scores.json:base"]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[2:12] == out.splitlines()[2:12]
    assert main(["eval", "scores.json:tuned", "--against", "scores.json:base", "--rewards", "jpeg_size"]) == 0
    assert "brightness" not in capsys.readouterr().out
    line = refused(capsys, "eval", "scores.json:tuned", "--rewards", "jpeg")
    assert "scores.json:tuned has scores of brightness, jpeg_size, not of jpeg" in line


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--steps", "3"], "num_inference_steps: 2 against 3"),
        (["--guidance", "3"], "guidance_scale: "),
        (["--seeds", "1"], "seeds: 2 against 1"),
        (["--seed", "7"], "seed: 0 against 7"),
        (["--solver", "dpmpp2m"], "solver: 'euler' against 'dpmpp2m'"),
        (["--dtype", "bfloat16"], "dtype: 'float32' against 'bfloat16'"),
        (["--height", "64"], "size: 32 x 32 against 64 x 32"),
        (["--prompts", "tiny-test"], "prompts: four.txt ("),
        (["--limit", "2"], "prompts: four.txt ("),
        (["--rewards", "tiny_clean"], "has scores of brightness, jpeg_size, not of tiny_clean"),
    ],
)
def test_another_protocol_is_refused_before_anything_is_drawn(here, capsys, monkeypatch, options, named):
    saved = here / "base.json"
    if not saved.is_file():
        assert main(["eval", "base", "--prompts", "four.txt", *FAST, "--out", "base.json"]) == 0
    monkeypatch.setattr("flowrl.sources.Source.open", None)
    line = refused(capsys, "eval", "tuned", "--against", "base.json", *options)
    assert named in line and line.startswith("flowrl: base.json ")


def test_the_same_options_are_welcome(here):
    base = ["eval", "base", "--prompts", "four.txt", *FAST, "--out", "base.json"]
    assert main(base) == 0
    tuned, _ = evaluated("tuned", "--against", "base.json", "--prompts", "four.txt", "--height", "32", "--solver", "euler", *FAST)
    assert tuned.model == "tuned"


def test_scores_of_different_protocols_do_not_compare(here, capsys):
    for name, seed in (("a", 0), ("b", 1)):
        assert main(["eval", "base", "--prompts", "four.txt", "--seed", str(seed), *FAST, "--out", f"{name}.json"]) == 0
    line = refused(capsys, "eval", "a.json", "--against", "b.json")
    assert "do not compare" in line and "seed: 0 against 1" in line
    assert main(["eval", "a.json", "b.json"]) == 0  # beside each other, with their names
    assert "a.json" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ pictures that stay


def test_scores_of_files_are_those_of_memory(here):
    """Without --pictures the same 8 bits are scored."""
    (direct,) = evaluated("tuned", "--prompts", "four.txt", *FAST, "--features", "pixels")
    (stored,) = evaluated("tuned", "--prompts", "four.txt", *FAST, "--features", "pixels", "--pictures", "kept")
    assert torch.equal(direct.scores, stored.scores) and direct.protocol == stored.protocol and direct.seeds == stored.seeds
    assert direct.weights == stored.weights is not None and torch.equal(direct.features, stored.features)
    rows = [json.loads(line) for line in Path("kept/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and rows[3]["rewards"]["brightness"] == pytest.approx(float(stored.scores[1, 1, 0]), abs=1e-6)
    assert read_facts(Path("kept") / rows[0]["file"])["request"]["seed"] == stored.seeds[0][0]


def test_an_interrupted_evaluation_goes_on(here, capsys, monkeypatch):
    """Stopped in its second batch of two: two pictures stay, six are drawn by the same command."""
    argv = ["eval", "tuned", "--prompts", "four.txt", *FAST, "--pictures", "kept", "--batch-size", "2", "--out", "scores.json"]
    store, calls = flowrl.sample.store, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return store(*arguments)

    monkeypatch.setattr("flowrl.sample.store", stopped)
    assert main(argv) == 130 and not Path("scores.json").exists()
    there = {file: file.stat().st_mtime_ns for file in Path("kept").rglob("*.png")}
    assert len(there) == 2
    monkeypatch.setattr("flowrl.sample.store", store)
    capsys.readouterr()
    assert main(argv) == 0
    assert "tuned: 2 pictures are in kept already" in capsys.readouterr().out
    assert len(list(Path("kept").rglob("*.png"))) == 8 and all(file.stat().st_mtime_ns == when for file, when in there.items())
    monkeypatch.setattr("flowrl.sources.Source.open", None)  # the third time no model is loaded
    assert main(argv) == 0


def test_pictures_of_others_are_not_taken(here, capsys):
    argv = ["eval", "base", "--prompts", "four.txt", *FAST, "--pictures", "kept"]
    assert main(argv) == 0
    assert "drawn with num_inference_steps=2, now num_inference_steps=3: choose another --pictures folder" in refused(
        capsys, *argv[:4], "--steps", "3", "--seeds", "2", "--rewards", "brightness", "--pictures", "kept"
    )
    shutil.rmtree("base")
    shutil.copytree("tuned", "base")
    assert "drawn by other weights of base: choose another --pictures folder" in refused(capsys, *argv)


def test_models_of_one_name_get_folders_of_their_own(here):
    shutil.copytree("tuned", "other/base")
    first, second, _ = evaluated("base", "other/base", "--against", "tuned", "--prompts", "four.txt", *FAST, "--pictures", "kept")
    assert first.model != second.model and not torch.equal(first.scores, second.scores)
    assert len([place for place in Path("kept").iterdir() if place.is_dir()]) == 3


# ------------------------------------------------------------------------------------------------ diversity, distances


def test_diversity_and_distances(here, capsys):
    for name, level in (("0.png", 0), ("1.png", 128), ("2.png", 255)):
        Path("real").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (level, 0, 0)).save(f"real/{name}")
    argv = ["tuned", "--against", "base", "--prompts", "four.txt", *FAST, "--features", "pixels", "--reference", "real"]
    tuned, base = evaluated(*argv)
    out = capsys.readouterr().out
    assert all(word in out for word in ("pairwise_distance", "vendi_score", "frechet", "mmd", "distance to the reference"))
    assert tuned.features.shape == (8, 192) and float(tuned.measures["vendi_score"].min()) >= 1
    facts = json.loads(Path("scores.json").read_text())["comparisons"][0]
    assert facts["distances"]["frechet"]["value"] > 0 and set(facts["reference"]["mmd"]) == {"base", "tuned"}
    assert base.protocol.rewards["vendi_score"] == tuned.protocol.rewards["vendi_score"]
    other = read_results("scores.json")  # the features come back with the scores
    assert main(["eval", "scores.json:tuned", "--against", "scores.json:base", "--reference", "real"]) == 0
    assert "frechet" in capsys.readouterr().out and other[0].features is not None


# ------------------------------------------------------------------------------------------------ benchmarks of others


@pytest.fixture
def geneval(here) -> Path:
    file = here / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in METADATA))
    return file


def results_of(root: str, correct: int) -> None:
    """What GenEval's scorer might say of an export: the first `correct` of four pictures are right."""
    rows = [
        {"filename": f"{root}/0000{i}/samples/000{j}.png", "tag": METADATA[i]["tag"], "prompt": METADATA[i]["prompt"],
         "correct": 2 * i + j < correct}
        for i in range(2) for j in range(2)
    ]  # fmt: skip
    Path(f"{root}.results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_export_score_elsewhere_import_compare(geneval, capsys):
    sampling = ["--prompts", "geneval:evaluation_metadata.jsonl", "--steps", "2", "--seeds", "2"]
    for name in ("base", "tuned"):
        assert main(["eval", name, *sampling, "--export", f"geneval:out/{name}"]) == 0
    out = capsys.readouterr().out
    assert "tuned: 2 prompts in out/tuned (2 new)\n  python evaluation/evaluate_images.py out/tuned --outfile" in out
    picture, kept = Path("out/tuned/00001/samples/0001.png"), list(Path("out/tuned-pictures/tuned").glob("*red-cow*"))
    assert picture.read_bytes() in [file.read_bytes() for file in kept]
    assert main(["eval", "tuned", *sampling, "--export", "geneval:out/tuned"]) == 0
    assert "tuned: 4 pictures are in out/tuned-pictures already\ntuned: 2 prompts in out/tuned (0 new)" in capsys.readouterr().out

    results_of("out/base", 1)
    results_of("out/tuned", 3)
    tuned, base = evaluated("geneval:out/tuned.results.jsonl", "--against", "geneval:out/base.results.jsonl")
    assert (tuned.model, base.model) == ("tuned", "base") and tuned.protocol == base.protocol and tuned.weights != base.weights
    assert tuned.protocol.num_inference_steps == 2 and tuned.per_prompt("geneval").tolist() == [1.0, 0.5]
    assert [line.split()[:4] for line in capsys.readouterr().out.splitlines() if line.startswith("all")] == [
        ["all", "0.250", "0.750", "+0.500"]
    ]
    Path("out/tuned.results.jsonl").write_text(Path("out/tuned.results.jsonl").read_text().split("\n", 1)[1])
    assert "has no row for 1 of 4 pictures: 0 of 00000 is the first" in refused(capsys, "eval", "geneval:out/tuned.results.jsonl")


def test_pictures_in_a_layout_are_scored_here(geneval, capsys):
    """Those of an export, with its manifest; those of anybody else, with the prompts; not where one is missing."""
    sampling = ["--prompts", "geneval:evaluation_metadata.jsonl", "--steps", "2", "--seeds", "2"]
    (drawn,) = evaluated("tuned", *sampling, "--export", "geneval:out", "--rewards", "brightness")
    (scored,) = evaluated("geneval:out", "--rewards", "brightness")
    assert torch.equal(scored.scores, drawn.scores) and scored.seeds == drawn.seeds and scored.protocol == drawn.protocol
    Path("out.flowrl.json").unlink()
    assert "give them with --prompts geneval:PATH" in refused(capsys, "eval", "geneval:out", "--rewards", "brightness")
    theirs = ["geneval:out", "--prompts", "geneval:evaluation_metadata.jsonl", "--seeds", "2", "--rewards", "brightness"]
    (unknown,) = evaluated(*theirs)
    assert torch.equal(unknown.scores, drawn.scores) and unknown.protocol.num_inference_steps is None
    line = refused(capsys, "eval", "tuned", "--against", "geneval:out", *theirs[1:], "--export", "geneval:elsewhere/x")
    assert "do not compare" in line and "num_inference_steps: None against 2" in line
    Path("out/00001/samples/0000.png").unlink()
    assert "out lacks 1 of 4 files: out/00001/samples/0000.png is the first" in refused(capsys, "eval", *theirs)


def test_an_export_is_refused_before_anything_is_drawn(geneval, capsys, monkeypatch):
    monkeypatch.setattr("flowrl.sources.Source.open", None)
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    sampling = ["--prompts", "geneval:evaluation_metadata.jsonl", "--steps", "2"]
    for argv, message in (
        ([*sampling, "--export", "geneval:full"], "full holds other files already (no full.flowrl.json beside it)"),
        ([*sampling, "--export", "genevl:out"], "--export genevl:out: write LAYOUT:DIR, with a layout of geneval, dpg"),
        (
            ["--prompts", "four.txt", "--export", "geneval:out"],
            "geneval: prompt 1, 'a red circle', lacks the columns tag and include",
        ),
        (["--prompts", "geneval:nowhere.jsonl", "--export", "geneval:out"], "no prompts of geneval at nowhere.jsonl"),
        ([*sampling, "--seeds", "5", "--export", "dpg:out"], "lacks an item_id: take --prompts dpg:"),
    ):
        assert message in refused(capsys, "eval", "base", *argv)
    assert "--export arranges pictures that are drawn: name a model" in refused(
        capsys, "eval", "geneval:full", "--export", "geneval:x"
    )
    assert sorted(path.name for path in Path().iterdir()) == ["base", "evaluation_metadata.jsonl", "four.txt", "full", "tuned"]


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.json"], "no score file at nowhere.json; `flowrl eval MODEL --out nowhere.json` writes one"),
        (["base", "--against", "nowhere.json"], "no score file at nowhere.json"),
        (["broken.json"], "broken.json is not JSON"),
        (["geneval:nowhere.jsonl"], "no results of geneval at nowhere.jsonl"),
        (["geneval:four.txt"], "four.txt, line 1: wants filename"),
        (["base", "--rewards", "brigtness"], "unknown reward 'brigtness'; did you mean brightness"),
        (["base", "--rewards", "reference_judge url=http://localhost:1"], "compares with pictures of its own for each prompt"),
        (["base", "--features", "./nosuch"], "features='./nosuch': no encoder there"),
        (["base", "--reference", "nosuch", "--features", "pixels", "--against", "tuned"], "there are no pictures"),
        (["base", "--reference", "real"], "--reference measures distances of two models: give --against MODEL and --features"),
        (["base", "--prompts", "empty.txt"], "empty.txt has no prompts in it"),
        (["base", "--prompts", "dpg:four.txt"], "dpg: no prompts in four.txt: give the folder dpg_bench/prompts"),
        (["base", "--out", "four.txt/x.json"], "four.txt cannot be made: File exists"),
        (["base", "--pictures", "four.txt"], "--pictures four.txt is a file: name a folder"),
        (
            ["base", "--rewards", "tiny_latent", "--pictures", "kept"],
            "reward tiny_latent scores latents, and files of pictures hold none",
        ),
    ],
)
def test_bad_input_is_one_line(here, capsys, argv, message):
    Path("broken.json").write_text("{")
    Path("empty.txt").write_text("\n")
    Path("real").mkdir()
    Image.new("RGB", (8, 8)).save("real/a.png")
    before = sorted(Path().rglob("*"))
    prompts = [] if "--prompts" in argv else ["--prompts", "four.txt", "--steps", "2", "--seeds", "1"]
    line = refused(capsys, "eval", *argv, *(prompts if argv[0] == "base" else []))
    assert message in line
    assert sorted(Path().rglob("*")) == before


def test_help_shows_how(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    out = capsys.readouterr().out
    for words in (
        "--against base.json",
        "--pictures",
        "geneval:out.results.jsonl",
        "--export LAYOUT:DIR",
        "(default 4)",
        "tiny-test",
    ):
        assert words in out
    assert max(map(len, out.splitlines())) <= 132
