"""Two processes compute what one computes: same rewards, same losses, same weights; and only the first one writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowrl import Trainer, load_recipe
from flowrl.record import LORA_FILE, checkpoints, read_metrics
from tests.runs import SERVER, finish, ranks, start
from tests.test_resume import lines, wait_for

#: One group to a batch, so that the batches are the same on one process and on two.
OPTIONS = ["batch_size=2", "prompts_per_step=4", "updates_per_step=2", "objective.beta=0.1", "max_steps=3"]
OPTIONS += ["samples_steps=1", "checkpointing_steps=1", "eval_steps=3", "eval_num_inference_steps=2", "report_to=tensorboard"]
OPTIONS += ["eval_rewards.jpeg_size=1"]


class Watched(Trainer):
    """Keeps what each step saw."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, hooks=[self.look])
        self.seen: list[dict] = []

    def scored(self, drawn, clock):
        batches, samples, scores = super().scored(drawn, clock)
        self.seen.append({"scores": scores, "group": samples.group})
        return batches, samples, scores

    def advantages(self, rewards, groups):
        advantage, metrics = super().advantages(rewards, groups)
        self.seen[-1]["advantage"] = advantage
        return advantage, metrics

    @staticmethod
    def look(trainer, step, metrics):
        times = {name for name in metrics if name.endswith(("_time", "memory_gb"))}
        trainer.seen[-1]["metrics"] = {name: value for name, value in metrics.items() if name not in times}
        for name in ("policy", "ema"):
            with trainer.policy.using(name):
                weights = {key: p.detach().clone() for key, p in trainer.policy.trainable().items()}
            trainer.seen[-1][name] = weights


def train(recipe: str, overrides: list[str], out: str, env: dict[str, str]) -> None:
    """One process: trains, and saves what each step saw and which paths this process wrote to."""
    os.environ.update(env)
    torch.set_num_threads(1)
    written: list[str] = []

    def audit(event, args):
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            written.append(str(args[0]))
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            written.append(str(args[0]))

    sys.addaudithook(audit)
    trainer = Watched(load_recipe(recipe, overrides))
    trainer.train()
    torch.save({"seen": trainer.seen, "written": [*written]}, out)


def trained(recipe: Path, folder: Path, count: int, options: list[str]) -> list[dict]:
    """What each of `count` processes saw."""
    envs = ranks(count) if count > 1 else [{}]
    outs = [str(folder / f"rank-{count}-{rank}.pt") for rank in range(count)]
    overrides = [*options, f"output_dir={folder}/run-{count}", f"eval_prompts={load_recipe(recipe).prompts}"]
    processes = [SERVER.Process(target=train, args=(str(recipe), overrides, *pair)) for pair in zip(outs, envs, strict=True)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    return [torch.load(out, weights_only=True) for out in outs]


@pytest.fixture(scope="module", params=[["train=lora"], ["train=full", "learning_rate=1e-4"]], ids=["lora", "full"])
def runs(request, tmp_path_factory, recipe) -> tuple[Path, dict, list[dict]]:
    """The same recipe on one process and on two."""
    folder = tmp_path_factory.mktemp("ranks")
    options = [*OPTIONS, *request.param]
    (one,) = trained(recipe, folder, 1, options)
    return folder, one, trained(recipe, folder, 2, options)


def test_two_processes_train_the_same_weights(runs):
    """Rewards, advantages, metrics (ratio, KL, gradient norm, ...) and weights of three steps with two updates each.

    Sums run in another order on two processes: everything of the first step agrees within 1e-6 of itself, and later steps
    as far as they follow from the weights.
    """
    _, one, two = runs
    for step, alone in enumerate(one["seen"]):
        both = [rank["seen"][step] for rank in two]
        order = torch.cat([rank["group"] for rank in both]).argsort(stable=True)
        alone_order = alone["group"].argsort(stable=True)
        for name, rtol in (("group", 0), ("scores", 1e-6), ("advantage", 1e-6 if step == 0 else 1e-3)):
            together = torch.cat([rank[name] for rank in both])[order]
            torch.testing.assert_close(together, alone[name][alone_order], rtol=rtol, atol=0)
        assert both[0]["metrics"] == pytest.approx(alone["metrics"], rel=1e-6 if step == 0 else 0.02, abs=1e-6)
        assert both[0]["metrics"]["grad_norm"] > 1e-3 and both[0]["metrics"]["kl"] > 0
        for name in ("policy", "ema"):
            assert_same_weights(both[0][name], alone[name])


def assert_same_weights(a: dict, b: dict) -> None:
    """99 of 100 weights agree within 1e-6, where an update moves them by 1e-4 to 1e-3.

    Not all: Adam divides a gradient by its own size, so that one of nearly 0 becomes a step whose sign its last bit decides.
    """
    assert a.keys() == b.keys()
    difference = torch.cat([(a[key] - b[key]).abs().flatten() for key in a])
    assert difference.quantile(0.99) < 1e-6
    assert difference.max() < 3e-3


def test_both_processes_hold_the_same_weights_after_every_step(runs):
    """To the bit; and training moves them."""
    _, _, (first, second) = runs
    for a, b in zip(first["seen"], second["seen"], strict=True):
        assert all(torch.equal(a["policy"][key], b["policy"][key]) for key in a["policy"])
    moved = first["seen"][0]["policy"], first["seen"][-1]["policy"]
    assert any(not torch.equal(moved[0][key], moved[1][key]) for key in moved[0])


def test_groups_never_cross_a_process(runs):
    """4 prompts x 2 samples: each process has 2 whole groups of its own, new ones in every step."""
    _, _, (first, second) = runs
    everything = []
    for a, b in zip(first["seen"], second["seen"], strict=True):
        for groups in (a["group"], b["group"]):
            ids, counts = groups.unique(return_counts=True)
            assert len(ids) == 2 and counts.tolist() == [2, 2] and groups.dtype == torch.int64
            everything += ids.tolist()
    assert len(set(everything)) == len(everything) == 12


def test_only_the_first_process_writes(runs):
    folder, _, (first, second) = runs
    run = str(folder / "run-2")
    assert any(path.startswith(run) for path in first["written"])
    assert [path for path in second["written"] if path.startswith(run)] == []
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]


def test_ctrl_c_in_one_process_stops_both(tmp_path, recipe):
    """Only the second process hears it; both end after the same step, and one process alone can go on from there."""
    argv = ["train", recipe, f"output_dir={tmp_path}/run", "batch_size=2", "max_steps=500"]
    processes = [start(argv, tmp_path / f"log{rank}", env=env) for rank, env in enumerate(ranks(2))]
    wait_for(lambda: lines(tmp_path / "run") >= 1, processes[0])
    os.kill(processes[1].pid, signal.SIGINT)
    done = [finish(process, tmp_path / f"log{rank}") for rank, process in enumerate(processes)]
    assert [output.code for output in done] == [130, 130], done
    (place,) = checkpoints(tmp_path / "run")
    assert f"Stopped after step {place.name.split('-')[1]}. Go on with: flowrl train" in done[0].out
    assert done[1].out == ""
    assert not (tmp_path / "run" / LORA_FILE).exists()
    argv[-1] = f"max_steps={int(place.name.split('-')[1]) + 1}"
    alone = finish(start([*argv, "resume_from_checkpoint=latest"], tmp_path / "log"), tmp_path / "log")
    assert alone.code == 0, alone.err


def test_the_arithmetic_is_checked_for_all_processes(tmp_path, recipe):
    """2 prompts in 2 updates on 2 processes: refused by every process before anything is written."""
    argv = ["train", recipe, f"output_dir={tmp_path}/run", "updates_per_step=2"]
    processes = [start(argv, tmp_path / f"log{rank}", env=env) for rank, env in enumerate(ranks(2))]
    for rank, process in enumerate(processes):
        output = finish(process, tmp_path / f"log{rank}")
        assert output.code == 2
        assert "does not divide over 2 process(es) x updates_per_step=2; use 4" in output.err
    assert not (tmp_path / "run").exists()


def test_a_launcher_starts_the_command_on_two_processes(tmp_path, recipe):
    """torch's launcher (accelerate's own starts a single process where there is no GPU): same result as alone, said once."""
    options = [f"output_dir={tmp_path}/launched", "batch_size=2"]
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    argv += [f"--master_port={ranks(1)[0]['MASTER_PORT']}", "-m", "flowrl.cli", "train", str(recipe), *options]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Done: ") == 1 and "processes                2" in done.stdout
    alone = finish(start(["train", recipe, "batch_size=2", f"output_dir={tmp_path}/alone"], tmp_path / "log"), tmp_path / "log")
    assert alone.code == 0, alone.err
    a, b = (load_file(tmp_path / run / LORA_FILE) for run in ("alone", "launched"))
    assert_same_weights(a, b)
