"""What a run leaves behind is readable, whole or absent, and finds its way back into a policy."""

from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl import record
from flowrl.batch import Prompt, Samples
from flowrl.clips import read_clip
from flowrl.config import ConfigError, Recipe
from flowrl.policy import Policy
from tests.pipelines import CALL, tiny
from tests.runs import SERVER

RECIPE = Recipe(model="m", lora_rank=2, objective={"name": "grpo"})


def policy_with_optimizer(rank: int = 2) -> tuple[Policy, torch.optim.Optimizer]:
    policy = Policy(tiny("sd3"), CALL["sd3"])
    policy.add_lora(rank=rank)
    policy.snapshot("ema")
    return policy, torch.optim.AdamW(policy.trainable().values(), lr=1e-3)


def save(folder: Path, step: int, limit: int = 2) -> Path:
    return record.save_checkpoint(folder, *policy_with_optimizer(), RECIPE, record.Progress(step=step), limit)


def content(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------ whole or not at all


def test_an_error_leaves_what_was_there(tmp_path):
    """A folder and a file that fail half way leave the earlier version and nothing else."""
    with record.written_whole(tmp_path / "a") as place:
        (place / "x").write_text("first")
    with pytest.raises(KeyError), record.written_whole(tmp_path / "a") as place:
        (place / "x").write_text("second")
        raise KeyError
    assert (tmp_path / "a" / "x").read_text() == "first" and content(tmp_path) == {"a"}
    record.write_text(tmp_path / "b", "first")
    with pytest.raises(UnicodeEncodeError):
        record.write_text(tmp_path / "b", "\ud800")
    assert (tmp_path / "b").read_text() == "first" and content(tmp_path) == {"a", "b"}


def test_replacing_a_folder_leaves_nothing_of_the_old_one(tmp_path):
    for name in ("old", "new"):
        with record.written_whole(tmp_path / "a") as place:
            (place / name).write_text(name)
    assert content(tmp_path / "a") == {"new"} and content(tmp_path) == {"a"}


def test_at_every_moment_of_replacing_and_removing_the_name_is_whole_or_free(tmp_path, monkeypatch):
    """Stopped before any rename or deletion, a checkpoint is there with all its files or not at all."""
    everything = {"x", "y"}
    moments = 0

    def look(place=tmp_path / "a"):
        nonlocal moments
        moments += 1
        assert not place.exists() or content(place) == everything

    def watched(original):
        def call(*args, **kwargs):
            look()
            return original(*args, **kwargs)

        return call

    for name in ("rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    for _ in range(2):
        with record.written_whole(tmp_path / "a") as place:
            for name in sorted(everything):
                (place / name).write_text(name)
                look()
    record.remove(tmp_path / "a")
    assert moments > 8 and content(tmp_path) == set()


def killed_at(moment: int, act) -> bool:
    """Whether a fork that does `act` got as far as its file operation number `moment`, and was killed (-9) just before."""
    child = os.fork()
    if child == 0:
        operations = 0

        def audit(event, args):
            nonlocal operations
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"):
                operations += 1
                if operations == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        act()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def kill_everywhere(folder: Path) -> None:
    """Kill a third checkpoint (which lets the first two go), and a second one over itself, before each file operation."""
    policy, optimizer = policy_with_optimizer()
    for step in (1, 2):
        record.save_checkpoint(folder / "kept", policy, optimizer, RECIPE, record.Progress(step=step), 0)
    whole = {path.relative_to(folder / "kept/checkpoint-2") for path in (folder / "kept/checkpoint-2").rglob("*")}
    for step in (3, 2):
        for moment in itertools.count(1):
            run = folder / f"run-{step}-{moment}"
            shutil.copytree(folder / "kept", run)
            facts = (run, policy, optimizer, RECIPE, record.Progress(step=step), 1)
            killed = killed_at(moment, functools.partial(record.save_checkpoint, *facts))
            for place in run.glob("checkpoint-*"):
                assert {path.relative_to(place) for path in place.rglob("*")} == whole, (run, place)
            newest = record.checkpoints(run)[-1]
            assert record.load_checkpoint(newest, policy, optimizer).step == int(newest.name.split("-")[1])
            record.prepare_folder(run, newest)
            assert not list(run.glob(".*"))
            if not killed:
                assert content(run) == {f"checkpoint-{step}"} and moment > 20
                break


def test_a_checkpoint_killed_before_any_of_its_file_operations_is_whole_or_absent(tmp_path):
    """Every checkpoint under its name has all its files and loads, whatever moment the process died at."""
    process = SERVER.Process(target=kill_everywhere, args=(tmp_path,))
    process.start()
    process.join(240)
    assert process.exitcode == 0


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    """errno 28 of a write carries no file name; safetensors has an error class of its own. Both become one that names it."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    metrics = record.Metrics(tmp_path / "metrics.jsonl", 0)
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", full)
        with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: No space left on device"):
            metrics.write(1, {"reward": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(record, "flush", full)
        with pytest.raises(OSError, match=r"checkpoint-1 cannot be written: No space left on device"):
            save(tmp_path, 1)
    assert record.checkpoints(tmp_path) == [] and not list(tmp_path.rglob(".writing-*"))


# ------------------------------------------------------------------------------------------------ the folder


def test_folders_that_cannot_be_used(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=r"output_dir .*file is a file"):
        record.prepare_folder(file, None)
    with pytest.raises(ConfigError, match=r"output_dir .*run cannot be written: Not a directory"):
        record.prepare_folder(file / "run", None)
    with pytest.raises(ConfigError, match=r"output_dir .* cannot be written: No such file or directory"):
        record.prepare_folder(Path("/proc/flowrl"), None)
    used = tmp_path / "used"
    used.mkdir()
    (used / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds a run already; choose another, or remove it: it has no checkpoint"):
        record.prepare_folder(used, None)
    save(used, 1)
    with pytest.raises(ConfigError, match="holds a run already; choose another, or go on with resume_from_checkpoint=lat"):
        record.prepare_folder(used, None)


def test_leftovers_of_a_killed_run_go(tmp_path):
    """Unfinished folders are cleared wherever they lie, and nothing else."""
    for place in (".writing-abc/training_state", "samples/.writing-def", "samples/step-000001"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x").write_text("")
    record.prepare_folder(tmp_path, None)
    assert content(tmp_path) == {"samples"} and content(tmp_path / "samples") == {"step-000001"}


def test_going_on_from_an_earlier_checkpoint_of_the_folder_is_refused(tmp_path):
    """Otherwise `latest` would later name a checkpoint of the abandoned run."""
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds checkpoint-2, which is later than checkpoint-1: remove it, or go on in"):
        record.prepare_folder(tmp_path, tmp_path / "checkpoint-1")
    record.prepare_folder(tmp_path, tmp_path / "checkpoint-2")
    record.prepare_folder(tmp_path / "other", tmp_path / "checkpoint-1")
    with pytest.raises(ConfigError, match="holds a run already"):
        record.prepare_folder(tmp_path, tmp_path / "elsewhere" / "checkpoint-7")


# ------------------------------------------------------------------------------------------------ metrics, samples


def test_metrics_are_json_lines(tmp_path):
    """NaN is null; numbers have six figures; resuming from step 2 drops later rows and a line that a kill cut short."""
    metrics = record.Metrics(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        metrics.write(step, {"reward": 1 / 3, "kl": float("nan")})
    assert record.read_metrics(tmp_path)[0] == {"step": 1, "reward": 0.333333, "kl": None}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    again = record.Metrics(tmp_path / "metrics.jsonl", 2)
    again.write(3, {"reward": 7.0})
    assert [row["step"] for row in record.read_metrics(tmp_path)] == [1, 2, 3]
    assert record.read_metrics(tmp_path)[2]["reward"] == 7.0


@pytest.mark.parametrize("frames", [None, 3])
def test_samples_on_disk(tmp_path, frames):
    """PNG pictures, or lossless WebP clips at their rate, with the pixels that were scored, and a table with all rewards."""
    images = torch.rand(2, *([frames] if frames else []), 3, 8, 6, generator=torch.Generator().manual_seed(0))
    samples = Samples([Prompt("ein Haus"), Prompt("ü")], [5, 6], torch.tensor([7, 7]), images, images, fps=8 if frames else None)
    scores = torch.tensor([[0.5, float("nan")], [1.0, 2.0]])
    record.write_samples(tmp_path, 3, samples, scores, ["a", "b"], torch.tensor([-1.0, 1.0]))
    folder = tmp_path / "samples" / "step-000003"
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {
        "file": "0000.webp" if frames else "0000.png",
        "prompt": "ein Haus",
        "seed": 5,
        "group": 7,
        "rewards": {"a": 0.5, "b": None},
        "advantage": -1.0,
    }
    expected = (images[1] * 255).round().byte().movedim(-3, -1).numpy()
    if frames is None:
        assert np.array_equal(np.asarray(Image.open(folder / rows[1]["file"])), expected)
    else:
        pixels, rate = read_clip(folder / rows[1]["file"])
        assert np.array_equal(pixels, expected) and rate == 8


def test_of_large_clips_fewer_are_saved(tmp_path, monkeypatch):
    """Two clips of 3 x 8 x 6 = 144 pixels fit into 300; eight are kept whatever their size."""
    images = torch.rand(12, 3, 3, 8, 6)
    samples = Samples([Prompt("a")] * 12, list(range(12)), torch.zeros(12, dtype=torch.int64), images, images)
    kept = []
    for step, fewest in enumerate((1, 8), 1):
        monkeypatch.setattr(record, "MOST_PIXELS", 300)
        monkeypatch.setattr(record, "FEWEST", fewest)
        record.write_samples(tmp_path, step, samples, torch.zeros(12, 1), ["a"], torch.zeros(12))
        kept.append(len(list((tmp_path / "samples" / f"step-{step:06d}").glob("*.webp"))))
    assert kept == [2, 8]


# ------------------------------------------------------------------------------------------------ checkpoints


def test_checkpoints_beyond_the_limit_go(tmp_path):
    for step in (2, 10, 9, 11):
        save(tmp_path, step, limit=2)
    assert [path.name for path in record.checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]
    save(tmp_path / "all", 1, limit=0)
    save(tmp_path / "all", 2, limit=0)
    assert len(record.checkpoints(tmp_path / "all")) == 2


def test_a_checkpoint_brings_everything_back(tmp_path):
    """Weights, snapshots, optimiser moments, progress and the random states, into a policy that was built differently."""
    policy, optimizer = policy_with_optimizer()
    for parameter in policy.trainable().values():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    policy.snapshot("old")
    progress = record.Progress(step=3, updates=6, images=12, seconds=1.5)
    place = record.save_checkpoint(tmp_path, policy, optimizer, RECIPE, progress, 2)
    drawn = torch.rand(3)

    other, fresh = policy_with_optimizer()
    with torch.no_grad():
        for parameter in other.trainable().values():
            parameter.zero_()
    assert record.load_checkpoint(place, other, fresh) == progress
    assert torch.equal(torch.rand(3), drawn)
    for key, parameter in other.trainable().items():
        assert torch.equal(parameter, policy.trainable()[key])
        assert torch.equal(fresh.state[parameter]["exp_avg"], optimizer.state[policy.trainable()[key]]["exp_avg"])
        for name in ("ema", "old"):
            assert torch.equal(other.snapshots[name][key], policy.snapshots[name][key])


def test_checkpoints_that_do_not_fit_are_named(tmp_path):
    place = save(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"was trained with lora_rank=2, this recipe says 4: start a new run"):
        record.check_resumable(place, dataclasses.replace(RECIPE, lora_rank=4))
    with pytest.raises(ConfigError, match=r"was trained with model='m', this recipe says 'n'"):
        record.check_resumable(place, dataclasses.replace(RECIPE, model="n"))
    assert record.check_resumable(place, dataclasses.replace(RECIPE, max_steps=7, output_dir="x")) == []
    assert record.check_resumable(place, dataclasses.replace(RECIPE, learning_rate=1.0)) == ["learning_rate: 0.0003 -> 1.0"]
    with pytest.raises(ConfigError, match="is of another model: .* weights differ in name or shape, first transformer"):
        record.load_checkpoint(place, *policy_with_optimizer(rank=4))
    for name in ("policy.safetensors", "optimizer.pt"):
        whole = (place / record.STATE / name).read_bytes()
        (place / record.STATE / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ConfigError, match="checkpoint-1 is damaged"):
            record.load_checkpoint(place, *policy_with_optimizer())
        (place / record.STATE / name).write_bytes(whole)
    (place / record.STATE / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a whole checkpoint of flowrl"):
        record.check_resumable(place, RECIPE)


def test_finding_a_checkpoint(tmp_path):
    def found(wanted):
        return record.find_checkpoint(dataclasses.replace(RECIPE, output_dir=str(tmp_path), resume_from_checkpoint=wanted))

    assert found(None) is None
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint=latest: no checkpoint in"):
        found("latest")
    save(tmp_path, 1)
    place = save(tmp_path, 2)
    (tmp_path / "checkpoint-3").mkdir()  # not one of ours: no state in it
    assert found("latest") == place
    assert found(str(tmp_path / "checkpoint-1")) == tmp_path / "checkpoint-1"
    with pytest.raises(ConfigError, match=r"checkpoint-3 is not a checkpoint of flowrl \(no training_state/state.json\)"):
        found(str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_runs_and_checkpoints_load_as_policies(tmp_path, model, kind):
    """load_trained opens a run by its newest checkpoint, then by its result; both wear the averaged weights."""
    recipe = dataclasses.replace(RECIPE, model=str(model), train=kind)
    policy = Policy.load(model, num_inference_steps=2)
    policy.add_lora(rank=2) if kind == "lora" else policy.train_all()
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.05)
    policy.snapshot("ema")
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.5)
    with policy.using("ema"):
        expected = policy.rollout(["a cat"], [1]).latents
    run = tmp_path / "run"
    run.mkdir()
    record.write_facts(run, recipe)
    with pytest.raises(ConfigError, match="has no result and no checkpoint yet"):
        record.load_trained(run)
    optimizer = torch.optim.AdamW(policy.trainable().values())
    place = record.save_checkpoint(run, policy, optimizer, recipe, record.Progress(step=1), 2)
    for source in (run, place):
        loaded = record.load_trained(source, num_inference_steps=2)
        assert torch.allclose(loaded.rollout(["a cat"], [1]).latents, expected, atol=1e-5)
    record.save_result(policy, run)
    record.save_result(policy, run)  # over an earlier one
    record.remove(place)
    loaded = record.load_trained(run, num_inference_steps=2)
    assert torch.allclose(loaded.rollout(["a cat"], [1]).latents, expected, atol=1e-5)
    assert not list(run.rglob(".writing-*"))


def test_the_model_card_says_how_to_use_and_repeat_it(tmp_path):
    policy, _ = policy_with_optimizer()
    recipe = dataclasses.replace(RECIPE, rewards={"brightness": 2.0, "jpeg_size": {"weight": 0.5}}, prompts="p.txt")
    record.write_model_card(tmp_path, policy, recipe, record.Progress(step=3, images=24, seconds=90))
    card = (tmp_path / "README.md").read_text()
    for fact in (
        "base_model: m",
        "24 generated images, 3 steps, 1.5 minutes",
        "brightness (2.0), jpeg_size (0.5)",
        "LoRA of rank 2",
        f'pipe.load_lora_weights("{tmp_path}")',
        "height=32",
        "flowrl train recipe.yaml",
    ):
        assert fact in card
