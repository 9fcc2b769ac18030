"""A run that was stopped, however it was stopped, goes on as if it had not been: to the bit, from a whole checkpoint."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowrl.record import LORA_FILE, STATE, checkpoints, read_metrics
from tests.runs import FLOWRL, run, start

TIMES = ("_time", "seconds", "memory_gb")


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, averaged weights and the optimiser's moments of a checkpoint, by name."""
    folder = run / f"checkpoint-{step}" / STATE
    tensors = {}
    for name in ("policy", "snapshot-ema"):
        tensors |= {f"{name}/{key}": value for key, value in load_file(folder / f"{name}.safetensors").items()}
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    for i, moments in optimizer["state"].items():
        tensors |= {f"optimizer/{i}/{key}": value for key, value in moments.items()}
    tensors["learning_rate"] = torch.tensor(optimizer["param_groups"][0]["lr"])
    return tensors


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Equal to the bit: the state after `step`, the result, and every metric of every step that is not a time."""
    a, b = state(one, step), state(other, step)
    assert a.keys() == b.keys() and len(a) > 8
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert metrics(one) == metrics(other)
    results = [sorted(p for p in run.rglob("*.safetensors") if "checkpoint" not in str(p)) for run in (one, other)]
    assert results[0]
    for x, y in zip(*([load_file(file) for file in files] for files in results), strict=True):
        assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


def metrics(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in read_metrics(run)]


LORA = ["updates_per_step=2", "lr_warmup_steps=5", "objective.beta=0.01"]
FULL = ["train=full", "autocast=bfloat16", "objective.beta=0.01", "steps=window", "steps.high=2", "steps.size=1"]


@pytest.mark.parametrize("options", [LORA, FULL], ids=["lora", "full"])
def test_resuming_is_bit_for_bit(tmp_path, recipe, options):
    """4 steps, against 1 + 2 + 1 in processes of their own: with two updates per step and a warm-up that the first stop cuts
    through (LoRA), with a frozen copy as reference and windows drawn at random (full), and evaluations."""
    options = [*options, "eval_steps=2", f"eval_prompts={tmp_path}/eval.txt", "eval_num_inference_steps=2"]
    (tmp_path / "eval.txt").write_text("a cat\n")
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    done = run(["train", recipe, f"output_dir={whole}", "max_steps=4", *options], tmp_path / "log")
    assert done.code == 0, done.err
    for stop in (1, 3, 4):
        resume = ["resume_from_checkpoint=latest"] if stop > 1 else []
        argv = ["train", recipe, f"output_dir={pieces}", f"max_steps={stop}", *options, *resume]
        done = run(argv, tmp_path / "log")
        assert done.code == 0, done.err
    assert_same_run(whole, pieces, 4)
    rows = read_metrics(whole)
    assert rows[0]["reward"] != rows[1]["reward"] and "eval/brightness" in rows[3]
    if options[0] == LORA[0]:
        assert [row["learning_rate"] for row in rows] == pytest.approx([4e-4, 8e-4, 1e-3, 1e-3])


def test_a_changed_option_is_said_and_applies(tmp_path, recipe):
    """Options that a checkpoint does not fix may change when going on; the run says which."""
    argv = ["train", recipe, f"output_dir={tmp_path}/run"]
    run([*argv, "max_steps=1"], tmp_path / "log")
    done = run([*argv, "max_steps=2", "learning_rate=0.5", "resume_from_checkpoint=latest"], tmp_path / "log")
    assert done.code == 0, done.err
    assert f"resuming from {tmp_path}/run/checkpoint-1" in done.out
    assert "changed: learning_rate: 0.001 -> 0.5" in done.out and "changed: max_steps" not in done.out
    assert read_metrics(tmp_path / "run")[1]["learning_rate"] == 0.5


def test_a_run_can_go_on_in_another_folder(tmp_path, recipe):
    """From a checkpoint by its path; the folder that it comes from stays as it was."""
    argv = ["train", recipe, "checkpointing_steps=1", "max_steps=3"]
    assert run([*argv, f"output_dir={tmp_path}/a"], tmp_path / "log").code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    branch = [*argv, f"output_dir={tmp_path}/b", f"resume_from_checkpoint={tmp_path}/a/checkpoint-2"]
    assert run(branch, tmp_path / "log").code == 0
    a, b = state(tmp_path / "a", 3), state(tmp_path / "b", 3)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [row["step"] for row in read_metrics(tmp_path / "b")] == [3]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")} == before


def test_going_on_at_the_end_leaves_the_checkpoint_alone(tmp_path, recipe):
    """Writing it anew over itself would risk the only one; the result is written."""
    argv = ["train", recipe, f"output_dir={tmp_path}/run", "max_steps=1"]
    assert run(argv, tmp_path / "log").code == 0
    (place,) = checkpoints(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in [place, *place.rglob("*")]}
    (tmp_path / "run" / LORA_FILE).unlink()
    assert run([*argv, "resume_from_checkpoint=latest"], tmp_path / "log").code == 0
    assert {path: path.stat().st_mtime_ns for path in [place, *place.rglob("*")]} == before
    assert (tmp_path / "run" / LORA_FILE).is_file() and lines(tmp_path / "run") == 1


# ------------------------------------------------------------------------------------------------ Ctrl-C


def wait_for(condition, process, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        assert (process.poll() if hasattr(process, "poll") else process.exitcode) is None, "it ended on its own"
        time.sleep(0.002)


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, recipe):
    """The installed command, interrupted in its second step or later: it finishes the step, saves, prints a command and exits
    with 130. That command, as printed, ends where the uninterrupted run ends."""
    options = [f"output_dir={tmp_path}/run", "max_steps=200"]
    process = subprocess.Popen(
        [FLOWRL, "train", recipe, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    wait_for(lambda: lines(tmp_path / "run") >= 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    (place,) = checkpoints(tmp_path / "run")
    stopped = int(place.name.split("-")[1])
    assert 2 <= stopped < 200
    assert lines(tmp_path / "run") == stopped
    assert not (tmp_path / "run" / LORA_FILE).exists(), "an interrupted run has no result"
    assert "Finishing this step, then saving" in out
    command = out.split("Go on with: ")[1].strip()
    assert command == f"flowrl train {tmp_path}/run/recipe.yaml resume_from_checkpoint=latest"

    goal = stopped + 1
    done = run([*command.split()[1:], f"max_steps={goal}"], tmp_path / "log")
    assert done.code == 0, done.err
    straight = run(["train", recipe, f"output_dir={tmp_path}/straight", f"max_steps={goal}"], tmp_path / "log")
    assert straight.code == 0, straight.err
    assert_same_run(tmp_path / "straight", tmp_path / "run", goal)


SLOW_REWARD = """
import time

def slow(images, prompts):
    open("scoring", "w").close()
    time.sleep(100)
    return [0.0] * len(prompts)
"""


def test_a_second_ctrl_c_stops_at_once(tmp_path, recipe, monkeypatch):
    """During a scorer that takes 100 s: the first asks to finish the step, the second ends it, without a checkpoint."""
    (tmp_path / "slow_rewards.py").write_text(SLOW_REWARD)
    monkeypatch.chdir(tmp_path)
    argv = ["train", recipe, f"output_dir={tmp_path}/run", "rewards.slow_rewards.slow=1"]
    process = start(argv, tmp_path / "log")
    wait_for((tmp_path / "scoring").exists, process)
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: "Ctrl-C again stops at once" in (tmp_path / "log.out").read_text(), process)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    assert (tmp_path / "log.err").read_text().endswith("flowrl: stopped\n")
    assert checkpoints(tmp_path / "run") == [] and not list(tmp_path.rglob(".writing-*"))


# ------------------------------------------------------------------------------------------------ kill -9


def test_killed_at_any_moment_it_goes_on_from_a_whole_checkpoint(tmp_path, recipe):
    """Eight kills: at random moments, and while a checkpoint is being written. Every time the run goes on, at the end its
    weights, moments and metrics are those of a run that was never killed, and nothing unfinished is left."""
    options = ["checkpointing_steps=1", "samples_steps=1", "num_inference_steps=2", "max_steps=40"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(["train", recipe, f"output_dir={whole}", *options], tmp_path / "log")
    assert done.code == 0, done.err

    dice = random.Random(0)
    reached = []
    for kill in range(8):
        found = checkpoints(killed)
        resume = ["resume_from_checkpoint=latest"] if found else []
        process = start(["train", recipe, f"output_dir={killed}", *options, *resume], tmp_path / "log")
        before = lines(killed)
        wait_for(lambda before=before: lines(killed) != before and checkpoints(killed), process)
        if kill % 2:  # while something is being written
            wait_for(lambda: any(killed.rglob(".writing-*/**")), process)
        else:
            time.sleep(dice.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was over before the kill: make the run longer"
        reached.append(lines(killed))
    done = run(["train", recipe, f"output_dir={killed}", *options, "resume_from_checkpoint=latest"], tmp_path / "log")
    assert done.code == 0, done.err
    assert reached[0] < reached[-1] < 40, reached
    assert_same_run(whole, killed, 40)
    assert [path.name for path in checkpoints(killed)] == ["checkpoint-39", "checkpoint-40"]
    assert not list(killed.rglob(".writing-*"))
    assert {p.name for p in killed.iterdir()} == {p.name for p in whole.iterdir()}
    assert len(list((killed / "samples").iterdir())) == 40
