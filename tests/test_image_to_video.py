"""Image-to-video: each prompt brings its picture; rollout, replay and decoding see one encoding of it; a step of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowrl import Policy, Trainer, load_recipe
from flowrl.batch import Prompt
from flowrl.cli import main
from flowrl.clips import read_clip
from flowrl.conditions import BLANK
from flowrl.config import ConfigError
from flowrl.data import load_prompts
from flowrl.pictures import read_facts
from flowrl.samplers import CPS, FlowSDE
from flowrl.samplers.branching import branched_rollout
from tests.pipelines import CALL, start_picture, tiny

CALL_ONLY = {key: value for key, value in CALL["wan_i2v"].items() if key != "image"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four prompts that start from three pictures, two of them sharing one."""
    folder = tmp_path_factory.mktemp("i2v")
    rows = []
    for text, colour in (("it moves", "teal"), ("it stays", "red"), ("it turns", "teal"), ("it moves", "gold")):
        start_picture(colour).save(folder / f"{colour}.png")
        rows.append(json.dumps({"prompt": text, "image": f"{colour}.png"}) + "\n")
    (folder / "prompts.jsonl").write_text("".join(rows))
    return folder


def policy(**call) -> Policy:
    return Policy(tiny("wan_i2v"), {**CALL_ONLY, "num_inference_steps": 4, **call})


def test_replay_and_decode_are_bit_equal(folder):
    """Four prompts, three pictures: three calls, one batch. Each sample is, to rounding, what it would be alone."""
    prompts, one = load_prompts(folder / "prompts.jsonl"), policy(guidance_scale=3.0)
    samples = one.rollout(prompts, [1, 2, 3, 4], transition=FlowSDE(0.7), stochastic=[0, 2], keep_velocity=True)
    assert samples.texts == [prompt.text for prompt in prompts] and samples.seeds == [1, 2, 3, 4]
    assert [step.index for step in samples.steps] == [0, 2]
    for step in samples.steps:
        v = one.velocity(samples.prompts, step)
        assert torch.equal(v, step.v)
        assert torch.equal(step.gaussian(v).log_prob(step.x_next), step.log_prob)
    clips = one.decode(samples)
    assert clips.shape == (4, 5, 3, 32, 32) and torch.equal(clips, one.decode(samples))
    for i in range(4):
        alone = one.rollout([prompts[i]], [i + 1], transition=FlowSDE(0.7), stochastic=[0, 2])
        assert (alone.latents - samples.latents[i]).abs().max() < 1e-4


def test_it_is_what_the_pipeline_itself_draws(folder):
    """The untouched pipeline, called with one picture and the same generators, by the same rule."""
    prompts, pipe = load_prompts(folder / "prompts.jsonl"), tiny("wan_i2v")
    ours = policy()
    pipe.scheduler = ours.pipe.scheduler
    for i in (0, 1):
        rng = [torch.Generator().manual_seed(2 * 7)]
        picture = Image.open(folder / prompts[i].columns["image"])
        call = {**CALL_ONLY, "num_inference_steps": 4, "output_type": "pt"}
        theirs = pipe(prompt=[prompts[i].text], image=picture, generator=rng, **call).frames
        assert (ours.decode(ours.rollout([prompts[i]], [7])) - theirs).abs().max() < 1e-4


def test_the_picture_matters_and_is_that_of_the_row(folder):
    prompts, one = load_prompts(folder / "prompts.jsonl"), policy()
    teal, red, _, gold = one.decode(one.rollout(prompts, [5] * 4))
    assert (teal - gold).abs().mean() > 0.01, "the same words and noise from another picture"
    again = one.decode(one.rollout([prompts[3], prompts[1]], [5, 5]))
    torch.testing.assert_close(again, torch.stack([gold, red]), rtol=0, atol=1e-5)


def test_each_picture_is_encoded_once(folder):
    """Rollout, velocities and decoding of two batches of one size: an encoding by each encoder for each of three pictures."""
    prompts, one = load_prompts(folder / "prompts.jsonl"), policy()
    counts = {"vae": 0, "image_encoder": 0}
    one.pipe.vae.encoder.register_forward_pre_hook(lambda *_: counts.update(vae=counts["vae"] + 1))
    one.pipe.image_encoder.register_forward_pre_hook(lambda *_: counts.update(image_encoder=counts["image_encoder"] + 1))
    for _ in range(2):
        samples = one.rollout(prompts, [1, 2, 3, 4], transition=CPS(0.8), stochastic=[0, 1])
        for step in samples.steps:
            one.velocity(prompts, step)
        one.decode(samples)
    assert counts == {"vae": 3 * 2, "image_encoder": 3}, "5 frames are two slices of the autoencoder's encoder"
    start_picture("navy").save(folder / "navy.png")
    one.rollout([Prompt("it moves", {"image": str(folder / "navy.png")})], [1])
    assert counts == {"vae": 8, "image_encoder": 4}


def test_steps_share_their_states_after_batches_are_put_together(folder):
    """Steps 0 and 1 follow each other: what one ends in the other starts from, one tensor, as in a batch of one picture."""
    prompts, one = load_prompts(folder / "prompts.jsonl"), policy()
    mixed, same = (one.rollout(p, [1, 2, 3, 4], transition=CPS(0.8), stochastic=[0, 1]) for p in (prompts, [prompts[0]] * 4))
    assert mixed.steps[1].native.data_ptr() == mixed.steps[0].native_next.data_ptr()
    assert mixed.trajectory_bytes == same.trajectory_bytes


def test_branches_part_from_the_same_picture(folder):
    """Equal words and start, other pictures: two states, not one; their samples are the plain rollout's."""
    prompts = load_prompts(folder / "prompts.jsonl")
    items, one = [prompts[0], prompts[0], prompts[3], prompts[3]], policy()
    tree = branched_rollout(one, items, [1, 2, 1, 2], init_seeds=[9] * 4, transition=CPS(0.8), stochastic=[1])
    assert tree.steps[0].owner.tolist() == [0, 0, 1, 1]
    plain = one.rollout(items, [1, 2, 1, 2], init_seeds=[9] * 4, transition=CPS(0.8), stochastic=[1])
    torch.testing.assert_close(tree.latents, plain.latents, rtol=0, atol=1e-5)
    v = one.velocity(tree.prompts, tree.steps[0])
    assert v.shape == tree.latents.shape and torch.equal(v[0], v[1]) and not torch.equal(v[0], v[2])


def test_a_picture_in_memory_and_one_for_all(folder):
    """A column may hold the picture itself; a picture of the call serves the rows that bring none."""
    one, teal = policy(), start_picture("teal")
    from_memory = one.rollout([Prompt("it moves", {"image": teal})], [1]).latents
    from_file = one.rollout(load_prompts(folder / "prompts.jsonl")[:1], [1]).latents
    for_all = policy(image=teal).rollout(["it moves"], [1]).latents
    assert torch.equal(from_memory, from_file) and torch.equal(from_memory, for_all)
    other = policy(image=teal).rollout([Prompt("it moves", {"image": start_picture("red")})], [1]).latents
    assert not torch.equal(from_memory, other)


def test_a_video_model_without_pictures_ignores_the_column(folder):
    """Text-to-video: prompts with other pictures share a batch, and nothing is looked for."""
    one = Policy(tiny("wan"), {**CALL["wan"], "num_inference_steps": 2})
    asked = [Prompt("a", {"image": "nowhere.png"}), Prompt("a", {"image": 3})]
    samples = one.rollout(asked, [1, 1])
    torch.testing.assert_close(samples.latents[0], samples.latents[1], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ training


OPTIONS = ["num_inference_steps=3", "steps=all_but_last", "prompts_per_step=2", "num_generations=2", "batch_size=4"]


def trainer(folder: Path, out: Path, *options: str, **given) -> Trainer:
    recipe = {"model": str(folder), "prompts": str(folder / "prompts.jsonl"), "rewards": {"brightness": 1.0}, "report_to": "none"}
    return Trainer(load_recipe(recipe, [f"output_dir={out}", *OPTIONS, "lora_rank=2", *options]), **given)


@pytest.mark.parametrize("objective", ["grpo", "nft"])
def test_a_step_of_training(folder, tmp_path, objective):
    """The first step's checks (replay to the bit, gradients, weights that matter) pass, and LoRA weights alone change."""
    one = policy()
    run = trainer(folder, tmp_path / "run", f"objective={objective}", "seed=1", policy=one)
    before = {key: p.detach().clone() for key, p in one.trainable().items()}
    rows = [run.step() for _ in range(2)]
    assert any(not torch.equal(before[key], p) for key, p in one.trainable().items())
    assert all(row["grad_norm"] > 0 for row in rows)
    if objective == "grpo":
        assert rows[0]["ratio_deviation"] == 0
    for part in ("vae", "image_encoder", "text_encoder"):
        assert all(p.grad is None for p in getattr(one.pipe, part).parameters())
    assert BLANK.columns["image"].size == (64, 64)


# ------------------------------------------------------------------------------------------------ bad input


def bad(folder: Path, row: dict) -> Path:
    file = folder / "bad.jsonl"
    file.write_text((folder / "prompts.jsonl").read_text() + json.dumps(row) + "\n")
    return file


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, "WanImageToVideoPipeline starts from a picture: give its path in the column 'image'"),
        ({"prompt": "x", "image": "lost.png"}, r"image: there is no picture \S+/lost.png"),
        ({"prompt": "x", "image": "prompts.jsonl"}, r"image: \S+/prompts.jsonl is no picture: cannot identify"),
        ({"prompt": "x", "image": "cut.png"}, r"image: \S+/cut.png is no picture: "),
        ({"prompt": "x", "image": 3}, "image is 3, not the path of a picture"),
    ],
)
def test_rows_without_a_picture_are_named_before_weights_are_loaded(folder, tmp_path, row, message, monkeypatch):
    (folder / "cut.png").write_bytes((folder / "teal.png").read_bytes()[:60])
    (folder / "model_index.json").write_text('{"_class_name": "WanImageToVideoPipeline"}')
    monkeypatch.setattr(Policy, "load", None)
    with pytest.raises(ConfigError, match=rf"bad\.jsonl, line 5: {message}"):
        trainer(folder, tmp_path / "run", f"prompts={bad(folder, row)}")
    assert not (tmp_path / "run").exists()


def test_a_prompt_without_a_picture_is_named_at_the_call_too():
    with pytest.raises(ConfigError, match="'it moves': WanImageToVideoPipeline starts from a picture"):
        policy().rollout(["it moves"], [0])


# ------------------------------------------------------------------------------------------------ the command


def test_sample(folder, tmp_path, capsys):
    """Pictures by row or by --image; a clip knows its own, is drawn again from itself, and is not taken for one of another."""
    model, out = tmp_path / "model", tmp_path / "out"
    tiny("wan_i2v").save_pretrained(model)
    (model / "flowrl.json").write_text(json.dumps({"call": CALL_ONLY}))
    argv = ["sample", str(model), "--steps", "2", "--out", str(out)]
    assert main([*argv, "--prompts", str(folder / "prompts.jsonl")]) == 0
    files = sorted(out.glob("*/*.webp"))
    assert len(files) == 4, "equal words from two pictures are two clips"
    path = next(file for file in files if read_facts(file)["request"]["columns"]["image"].endswith("red.png"))
    assert read_facts(path)["request"]["columns"]["image"] == str((folder / "red.png").resolve())
    assert f"--image {folder.resolve()}/red.png" in read_facts(path)["command"]
    assert main(["sample", "--from", str(path), "--out", str(tmp_path / "again")]) == 0
    [again] = (tmp_path / "again").glob("*/*.webp")
    assert (read_clip(again)[0] == read_clip(path)[0]).all()
    assert main([*argv, "a new one", "--image", str(folder / "red.png")]) == 0
    capsys.readouterr()
    assert main([*argv, "a new one", "--image", str(folder / "gold.png")]) == 2
    assert 'was drawn with columns={"image": ' in capsys.readouterr().err
    assert main([*argv, "without"]) == 2
    assert "'without': WanImageToVideoPipeline starts from a picture" in capsys.readouterr().err
