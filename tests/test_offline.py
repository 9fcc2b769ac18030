"""Training from data: what is read, in which rows, encoded once, refused with the row named; runs, and their resumption."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

import flowrl.train.offline as offline
from flowrl import Policy
from flowrl.cli import main
from flowrl.clips import clip_bytes
from flowrl.config import ConfigError, load_recipe
from flowrl.record import read_metrics
from flowrl.tiny import verify
from flowrl.train import Trainer
from flowrl.train.objectives import DGPO, DPO, GRPO, KTO, SFT, SOAR
from flowrl.train.offline import Data, parsed, resized
from tests.objectives import short_run
from tests.pipelines import CALL, tiny
from tests.test_resume import assert_same_run

PAIR, SINGLE = DPO().needs, KTO().needs


@pytest.fixture
def pictures(tmp_path):
    """red.png to white.png, 32 x 32 pixels, in a folder."""
    for name in ("red", "green", "blue", "white"):
        Image.new("RGB", (32, 32), name).save(tmp_path / f"{name}.png")
    return tmp_path


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs_file(pictures) -> str:
    return write(
        pictures / "pairs.jsonl",
        {"prompt": "a cat", "chosen": "red.png", "rejected": "green.png"},
        {"prompt": "blue", "jpg_0": "green.png", "jpg_1": "blue.png", "label_0": 0},
        {"prompt": "tie", "jpg_0": "green.png", "jpg_1": "blue.png", "label_0": 0.5},
        {"prompt": "soft", "jpg_0": "white.png", "jpg_1": "blue.png", "label_0": 0.75},
        {"prompt": "two green squares", "positive": "green.png", "negative": "red.png"},
    )


def policy(name: str = "sd3") -> Policy:
    return Policy(tiny(name), {**CALL[name], "num_inference_steps": 3})


# ------------------------------------------------------------------------------------------------ what is read


def test_pairs_become_rows(pictures, recipe):
    """The preferred picture first, with advantages 1 and -1 times |2 label - 1|; ties are left out and counted."""
    data, model = Data.load(pairs_file(pictures), PAIR), policy()
    assert [p.text for p in data.prompts] == ["a cat", "blue", "soft", "two green squares"] and data.skipped == 1
    samples, advantage = data.batch([(5, 1), (6, 2)], model, load_recipe(recipe), step=3)
    assert samples.texts == ["blue", "blue", "soft", "soft"] and advantage.tolist() == [1, -1, 0.5, -0.5]
    assert samples.group.tolist() == [3 * 2 + 5] * 2 + [3 * 2 + 6] * 2 and len(set(samples.seeds)) == 4
    expected = torch.stack([picture_of(name) for name in ("blue", "green", "white", "blue")])
    assert torch.equal(samples.latents, model.latents_of(expected))
    again, _ = data.batch([(5, 1), (6, 2)], model, load_recipe(recipe), step=3)
    assert again.seeds == samples.seeds and torch.equal(again.latents, samples.latents)


def picture_of(name: str) -> torch.Tensor:
    color = torch.tensor(Image.new("RGB", (1, 1), name).getpixel((0, 0))) / 255
    return color[:, None, None].expand(3, 32, 32)


def test_captioned_pictures(pictures):
    """A folder of NAME.png with NAME.txt; pictures without a text are no data."""
    (pictures / "red.txt").write_text("a red thing\n")
    (pictures / "blue.txt").write_text("sky")
    data = Data.load(str(pictures), SINGLE)
    assert [p.text for p in data.prompts] == ["sky", "a red thing"] and data.rows == 1 and data.weights == [1, 1]


def test_the_samples_of_a_run(pictures):
    """Compared by one of its rewards, which the source names; within gap they are ties."""
    place = pictures / "mine" / "samples" / "step-000001"
    place.mkdir(parents=True)
    rows = []
    for i, (name, value) in enumerate([("red", 0.1), ("green", 0.9), ("blue", 0.8)]):
        Image.open(pictures / f"{name}.png").save(place / f"{i}.png")
        rows.append({"file": f"{i}.png", "prompt": "a", "group": 0, "rewards": {"r": value, "s": -value}})
    write(place / "samples.jsonl", *rows)
    run_folder = pictures / "mine"
    by_r = Data.load(f"{run_folder} reward=r", PAIR)
    assert [tuple(p.stem for p in item) for item in by_r.items] == [("1", "0"), ("2", "0"), ("1", "2")]
    by_s = Data.load(f"{run_folder} reward=s gap=0.15", PAIR)
    assert [tuple(p.stem for p in item) for item in by_s.items] == [("0", "1"), ("0", "2")] and by_s.skipped == 1
    with pytest.raises(ConfigError, match=r"line 1: reward=None: say which of its rewards compares the pictures \(r, s\)"):
        Data.load(str(run_folder), PAIR)
    (place / "0.png").unlink()
    with pytest.raises(ConfigError, match=r"there is no picture .*0\.png, of the prompt 'a'"):
        Data.load(f"{run_folder} reward=r", PAIR)


def test_data_of_the_embedded_world():
    """Scenes that show their caption; pairs whose second scene does not, and differs in little; a function of their number."""
    scenes, pairs = Data.load("tiny-scenes", SINGLE), Data.load("tiny-pairs", PAIR)
    numbers = range(0, len(scenes.items), 97)
    assert len(scenes.items) == len(pairs.items) == 4 * 586 and (scenes.rows, pairs.rows) == (1, 2)
    specs = [{"prompt": p.text, **p.columns} for p in (scenes.prompts[i] for i in numbers)]
    right, (first, second) = (
        torch.stack([scenes.items[i][0] for i in numbers]),
        (torch.stack([pairs.items[i][row] for i in numbers]) for row in (0, 1)),
    )
    assert [float(verify(images, specs)[0].mean()) for images in (right, first, second)] == [1, 1, 0]
    changed = ((first - second).abs().amax(1) > 0.05).float().mean((1, 2))
    assert changed.min() > 0 and changed.mean() < 0.2
    assert torch.equal(scenes.items[5][0], Data.load("tiny-scenes", SINGLE).items[5][0])
    assert not torch.equal(scenes.items[0][0], scenes.items[586][0]) and scenes.prompts[0] == scenes.prompts[586]


def test_sources_with_options():
    assert parsed("a folder/b reward=tiny_strict gap=0.5") == ("a folder/b", {"reward": "tiny_strict", "gap": 0.5})
    assert parsed("odd=name/pairs.jsonl") == ("odd=name/pairs.jsonl", {})


def test_pictures_of_another_size():
    """Scaled to cover, the middle is kept: a wide picture loses its sides."""
    wide = torch.zeros(3, 8, 24)
    wide[:, :, 8:16] = 1
    assert resized(wide, (4, 4)).mean() > 0.95 and resized(wide, (8, 24)) is wide
    assert resized(torch.rand(3, 5, 7), (16, 8)).shape == (3, 16, 8)


def test_pictures_are_encoded_once_and_kept_up_to_a_limit(pictures, monkeypatch):
    data, model, calls = Data.load(pairs_file(pictures), PAIR), policy(), []
    inner = model.pipe.vae.encode
    monkeypatch.setattr(model.pipe.vae, "encode", lambda *a: calls.append(1) or inner(*a))
    first = data.encoded([0, 2, 0], model)
    assert len(calls) == 4 and torch.equal(first[:2], first[4:])
    assert torch.equal(data.encoded([2, 0], model), torch.cat([first[2:4], first[:2]])) and len(calls) == 4
    monkeypatch.setattr(offline, "KEPT_BYTES", 0)
    data.encoded([1], model)
    data.encoded([1], model)
    assert len(calls) == 8 and set(data.latents) == {0, 2}


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "red.png", "rejected": "gone.png"}], r"pairs.jsonl, line 1: there is no picture .*gone\.png"),
        ([{"prompt": "red.png", "chosen": "a cat", "rejected": "blue.png"}], r"line 1: there is no picture .*a cat"),  # swapped
        ([{"prompt": "a", "jpg_0": 1, "jpg_1": "red.png", "label_0": "blue.png"}], "line 1: a picture is a path, .*not int"),
        ([{"prompt": "a", "chosen": "red.png", "refused": "blue.png"}], "line 1: has no pair of pictures"),
        ([{"prompt": "a", "chosen": "red.png", "rejected": "blue.png"}, {"chosen": "red.png"}], 'line 2: wants a text "prompt"'),
        ([{"prompt": "a", "jpg_0": "red.png", "jpg_1": "blue.png", "label_0": 1, "label_1": 1}], "line 1: .* must sum to 1"),
        ([{"prompt": "a", "jpg_0": "red.png", "jpg_1": "blue.png"}], "line 1: has no label_0"),
        ([{"prompt": "a", "jpg_0": "red.png", "jpg_1": "blue.png", "label_0": 0.5}] * 3, "all 3 pairs of .* are ties"),
        ([{"prompt": "a", "images": ["red.png", "blue.png"], "ranks": [1]}], 'line 1: wants as many "ranks" as "images"'),
        ([], "has no pairs in it"),
    ],
)
def test_bad_rows_are_named(pictures, rows, message):
    with pytest.raises(ConfigError, match=message):
        Data.load(write(pictures / "pairs.jsonl", *rows), PAIR)


def test_sources_that_do_not_fit(pictures):
    """Nowhere; single pictures for a method of pairs or groups; a method that wants its own samples; options out of place."""
    (pictures / "red.txt").write_text("a red thing")
    for source, needs, message in [
        ("nowhere", PAIR, "data: there is no nowhere; data that comes with the library: tiny-scenes, tiny-pairs"),
        (str(pictures), PAIR, "this objective compares two pictures of a prompt, and these are single pictures"),
        ("tiny-scenes", DGPO().needs, "these are single pictures"),
        ("tiny-pairs", GRPO().needs, r"learns from its own samples; those that take data: .*dpo.*kto.*mapo.*sft.*soar"),
        ("tiny-pairs reward=r", PAIR, "reward compares the pictures of a run, and tiny-pairs is none"),
        (f"{pictures} gap=1", SINGLE, "gap compares the pictures of a run"),
        ("runs/x rewards=r", PAIR, "unknown option of data 'rewards'; did you mean reward"),
        ("runs/x gap=wide", PAIR, "gap must be a number"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Data.load(source, needs)


def test_pictures_that_cannot_be_encoded(pictures):
    """Not a picture, of a pipeline without encoder, or, without height and width in its call, of another size than it draws."""
    file = write(pictures / "pairs.jsonl", {"prompt": "a", "chosen": "red.png", "rejected": "broken.png"})
    (pictures / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"data: .*broken\.png is no picture"):
        Data.load(file, PAIR).encoded([0], policy())
    model = policy()
    model.call |= {"height": 64, "width": 64}
    data = Data.load(pairs_file(pictures), PAIR)
    assert data.encoded([0], model).shape == (2, 4, 32, 32)
    bare = policy()
    bare.call = {**bare.call, "height": 48}
    data = Data.load(pairs_file(pictures), PAIR)
    assert data.encoded([0], bare).shape == (2, 4, 24, 16)


# ------------------------------------------------------------------------------------------------ runs

OFFLINE = ["rewards={}", "times=uniform", "times.count=2", "learning_rate=1e-2", "prompts_per_step=2"]


@pytest.mark.parametrize(("objective", "name"), [("dpo", "sd15"), ("mapo", "flux"), ("kto", "sd3"), ("inpo", "qwenimage")])
def test_a_run_of_each_family(recipe, pictures, objective, name):
    """No rewards, no rollout: data_time and no reward; the pictures of a step are those of its pairs."""
    options = [f"objective={objective}", f"data={pairs_file(pictures)}", *OFFLINE, "seed=1"]
    _, rows = short_run(recipe, pictures, *options, name=name)
    assert "data_time" in rows[0] and "rollout_time" not in rows[0] and "reward" not in rows[0]
    assert rows[1]["images"] == 8 and ("rows" in rows[0]) == (objective != "kto")
    if objective == "dpo":
        assert rows[0]["policy_loss"] == pytest.approx(math.log(2)) and rows[0]["rows"] == 4


@pytest.mark.parametrize("objective", ["soar", "sft"])
def test_supervised_methods_keep_the_preferred_pictures(recipe, pictures, objective):
    """Of two pairs the two winners; of captioned pictures all. Video models take pictures as clips of one frame."""
    options = [f"objective={objective}", *OFFLINE]
    _, rows = short_run(recipe, pictures / "pairs", *options, f"data={pairs_file(pictures)}", steps=1)
    assert rows[0]["rows"] == 2
    assert (SOAR().needs, SFT().needs) == (SFT().needs, SOAR().needs)
    for name in ("red", "blue"):
        (pictures / f"{name}.txt").write_text(f"a {name} thing")
    data = Data.load(str(pictures), SOAR().needs)
    model = policy("wan")
    with pytest.raises(ConfigError, match=r"blue\.png is a picture, and WanPipeline draws clips of 5 frames: set num_frames=1"):
        data.encoded([0], model)
    model.call["num_frames"] = 1
    assert data.encoded([0, 1], model).shape == (2, 16, 1, 4, 4)


def clip_pairs(folder, frames: int = 5) -> str:
    """Two samples of a run for each of two prompts: a clip that brightens and one that darkens."""
    rows = []
    for p in range(2):
        for k in range(2):
            shown = [Image.new("RGB", (32, 32), (10 * i + p,) * 3) for i in (range(frames), range(frames, 0, -1))[k]]
            (folder / f"{p}{k}.webp").write_bytes(clip_bytes(shown, 16))
            rows.append({"file": f"{p}{k}.webp", "prompt": f"p{p}", "group": p, "rewards": {"r": float(k)}})
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_clips_of_a_run_are_learnt_from_whole(recipe, tmp_path):
    """Two pairs of five frames for a model of five frames; other lengths are refused, and clips for models of pictures."""
    source = clip_pairs(tmp_path)
    _, rows = short_run(recipe, tmp_path, "objective=dpo", f"data={source}", *OFFLINE, name="wan", steps=1)
    assert rows[0]["rows"] == 4 and rows[0]["policy_loss"] == pytest.approx(math.log(2))
    data = Data.load(source, PAIR)
    latents = data.encoded([0], policy("wan"))
    assert latents.shape == (2, 16, 2, 4, 4) and not torch.equal(latents[0], latents[1])
    with pytest.raises(ConfigError, match=r"01\.webp is a clip, and StableDiffusion3Pipeline draws pictures"):
        Data.load(source, PAIR).encoded([0], policy("sd3"))
    longer = Data.load(clip_pairs(tmp_path, frames=9), PAIR)
    with pytest.raises(
        ConfigError, match=r"01\.webp is a clip of 9 frames, and WanPipeline draws clips of 5 frames: set num_frames=9"
    ):
        longer.encoded([0], policy("wan"))


def test_learning_from_pairs(recipe, pictures):
    """Red over green, eight steps of DPO: the margin of the very pairs grows, and the policy orders all of them."""
    file = write(pictures / "pairs.jsonl", *[{"prompt": p, "chosen": "red.png", "rejected": "green.png"} for p in ("a", "b")])
    options = ["objective=dpo", "objective.beta=50", f"data={file}", *OFFLINE, "max_steps=8", "checks=false"]
    _, rows = short_run(recipe, pictures, *options, steps=8)
    assert rows[0]["implicit_accuracy"] == 0.5 and rows[-1]["implicit_accuracy"] > 0.9
    assert rows[-1]["policy_loss"] < math.log(2) / 2 and rows[-1]["margin"] > 0.01


def test_evaluations_of_a_run_without_rewards(recipe, pictures, prompts):
    """Held-out rewards are measured; no training reward is; nothing is sampled but for them."""
    trainer = Trainer(
        load_recipe(recipe, [
            "objective=dpo", f"data={pairs_file(pictures)}", *OFFLINE, f"eval_prompts={prompts}", "eval_steps=2",
            "eval_num_inference_steps=2", "eval_rewards.brightness=1", f"output_dir={pictures}/run", "samples_steps=1",
        ]),
        policy=Policy(tiny("sd3"), CALL["sd3"]),
    )  # fmt: skip
    folder = trainer.train()
    rows = read_metrics(folder)
    assert 0 < rows[1]["eval/brightness"] < 1 and "eval/tiny_dense" not in rows[1] and "eval/brightness" not in rows[0]
    assert not (folder / "samples").exists() and (folder / "README.md").is_file()


def test_resuming_is_bit_for_bit(tmp_path, recipe, pictures):
    """4 steps, against 1 + 3: pictures first met after the stop are encoded as they would have been."""
    options = ["objective=dpo", f"data={pairs_file(pictures)}", *OFFLINE, "reference_weights=ema", "checkpointing_steps=2"]
    for folder, stops in (("whole", (4,)), ("pieces", (1, 4))):
        for i, stop in enumerate(stops):
            resume = ["resume_from_checkpoint=latest"] if i else []
            Trainer(load_recipe(recipe, [f"output_dir={tmp_path}/{folder}", f"max_steps={stop}", *options, *resume])).train()
    assert_same_run(tmp_path / "whole", tmp_path / "pieces", 4)


def test_a_bad_row_ends_with_one_line(tmp_path, recipe, pictures, capsys):
    file = write(pictures / "pairs.jsonl", {"prompt": "a", "chosen": "red.png", "rejected": "gone.png"})
    assert main(["train", str(recipe), "objective=dpo", f"data={file}", f"output_dir={tmp_path}/run", *OFFLINE]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "line 1: there is no picture" in error and not (tmp_path / "run").exists()
