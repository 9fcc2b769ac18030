"""The watch over real runs whose pictures are made to drift: it says so, shows it, stops, goes back; and costs nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageStat
from safetensors.torch import load_file

from flowrl import Policy, Trainer, load_recipe
from flowrl.batch import Samples
from flowrl.cli import main
from flowrl.config import ConfigError
from flowrl.record import LORA_FILE, checkpoints, read_metrics
from flowrl.train.trends import Trend
from flowrl.train.watch import Trends, Watch
from tests.pipelines import CALL, tiny
from tests.runs import SERVER, ranks

#: Certain early, for the sake of time; no gradient would make pictures drift so fast.
OPTIONS = ["watch.false_alarms=0.5", "num_inference_steps=2", "max_steps=30", "checks=false"]


def darkness(images, prompts):
    return (1 - images.mean((1, 2, 3))).tolist()


def brightness(images, prompts):
    return images.mean((1, 2, 3)).tolist()


def make(recipe: Path, folder: Path, *overrides: str, dims: Callable[[int], float] = lambda step: 1.0) -> Trainer:
    """A run whose pictures are dimmed by dims(steps taken), a reward that likes that, and a held-out one that does not."""
    policy = Policy(tiny("sd3"), CALL["sd3"])
    options = [f"output_dir={folder}", "eval_rewards.brightness=1", *OPTIONS, *overrides]
    trainer = Trainer(load_recipe(recipe, options), policy=policy, rewards={"darkness": darkness})
    decode = policy.decode
    policy.decode = lambda *args, **kwargs: decode(*args, **kwargs) * dims(trainer.progress.step)
    return trainer


def dimming(step: int) -> float:
    return 0.85**step


class Counted:
    """A reward that notes how many samples it was asked about."""

    def __init__(self, reward: Any):
        self.name, self.traits, self.reward, self.sizes = reward.name, reward.traits, reward, []

    def __call__(self, samples: Samples) -> torch.Tensor:
        self.sizes.append(len(samples))
        return self.reward(samples)


def alarms(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ alarms


@pytest.fixture(scope="module")
def dimmed(recipe, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of 16 steps that grows darker and darker, and what it printed."""
    folder, said = tmp_path_factory.mktemp("watch") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tqdm.auto.tqdm.write", lambda line: said.append(line))
        make(recipe, folder, "max_steps=16", "samples_steps=0", dims=dimming).train()
    return folder, said


def test_an_alarm_names_its_signs(dimmed):
    """Darkness is up, brightness is down, and what was held out with it; once, within 16 steps, and not in the first five."""
    folder, said = dimmed
    rows = {row["alarm"]: row for row in alarms(folder)}
    hacking = rows["hacking"]
    assert 5 < hacking["step"] <= 16 and hacking["since"] <= 3
    assert {sign["series"] for sign in hacking["signs"]} >= {"reward", "held_out/brightness"}
    assert "train reward up" in hacking["text"] and "held-out brightness down" in hacking["text"]
    assert hacking["text"].endswith("likely hacking") or "; KL to the base" in hacking["text"]
    assert hacking["advice"]
    for row in rows.values():
        line = f"ALARM in step {row['step']}: {row['text']} ({folder / row['pictures']})"
        assert said.count(line) == 1
    assert len(said) == len(alarms(folder)) == len(rows), "each alarm once"


def test_an_alarm_shows_before_and_now(dimmed):
    """Left the pictures of the first step, right the same prompts and noise, dimmed by 0.85 to the power of the steps taken."""
    folder, _ = dimmed
    row = next(row for row in alarms(folder) if row["alarm"] == "hacking")
    sheet = Image.open(folder / row["pictures"]).convert("L")

    def mean(column: int) -> float:
        """Of the inner part of a picture in the first row: columns of 128 pixels with 6 between them, behind the prompts."""
        left = 216 + 134 * column
        return ImageStat.Stat(sheet.crop((left + 4, 60, left + 124, 160))).mean[0]

    for column in (0, 1):
        assert mean(column + 2) / mean(column) == pytest.approx(dimming(row["step"]), rel=0.15)


def test_everything_is_in_the_metrics(dimmed):
    rows = read_metrics(dimmed[0])
    names = {"brightness", "dark", "edges", "colours", "saturation", "high_frequency", "diversity", "spread", "velocity"}
    for row in rows:
        assert {f"watch/{name}" for name in names} | {"watch/held_out/brightness", "watch/alarms", "watch_time"} <= {*row}
        assert row["watch/held_out/brightness"] == pytest.approx(1 - row["rewards/darkness/mean"], rel=1e-5)
    assert rows[0]["watch/velocity"] == 1 and any(name.startswith("watch/velocity_norm/t") for name in rows[0])
    assert ["watch/distance" in row for row in rows[:7]] == [True, *[False] * 4, True, False]
    assert 0 < rows[0]["watch/distance"] < rows[5]["watch/distance"]
    assert rows[0]["watch/alarms"] == 0 and rows[-1]["watch/alarms"] == len(alarms(dimmed[0]))


def test_a_run_that_does_not_drift_says_nothing(recipe, tmp_path):
    make(recipe, tmp_path / "run", "max_steps=12", "learning_rate=1e-6").train()
    assert not (tmp_path / "run" / "alarms.jsonl").exists() and not (tmp_path / "run" / "watch").exists()


def test_what_is_ignored_says_nothing(recipe, tmp_path):
    """The reward itself is no sign any more, so nothing can be hacking; an alarm can be ignored by its name as well."""
    ignore = "watch.ignore=[reward, collapse, sameness, over_optimisation, no_signal]"
    make(recipe, tmp_path / "run", "max_steps=14", ignore, dims=dimming).train()
    assert not (tmp_path / "run" / "alarms.jsonl").exists()


def test_watching_changes_nothing(recipe, tmp_path):
    """The same weights with and without, to the bit, though a sheet was drawn on the way; without, no metrics of it."""
    runs = []
    for option in ("watch=trends", "watch=none"):
        extra = ["watch.false_alarms=0.5"] if option == "watch=trends" else []
        policy = Policy(tiny("sd3"), CALL["sd3"])
        options = [f"output_dir={tmp_path}/{option}", *OPTIONS[1:], "max_steps=12", option, *extra]
        trainer = Trainer(load_recipe(recipe, options), policy=policy, rewards={"darkness": darkness})
        decode = policy.decode
        policy.decode = lambda *a, d=decode, t=trainer, **k: d(*a, **k) * dimming(t.progress.step)
        trainer.train()
        runs.append(trainer)
    watched, plain = (trainer.policy.trainable() for trainer in runs)
    assert all(torch.equal(watched[key], plain[key]) for key in watched)
    assert list((runs[0].folder / "watch").iterdir())
    assert not any(name.startswith("watch") for name in read_metrics(runs[1].folder)[0])


# ------------------------------------------------------------------------------------------------ stop and roll back


def test_stop(recipe, tmp_path, capsys):
    """The run ends with the step of the alarm, and with a result."""
    trainer = make(recipe, tmp_path / "run", "watch.action=stop", dims=dimming)
    trainer.train()
    step = trainer.progress.step
    assert step == alarms(trainer.folder)[0]["step"] < 30 and trainer.finished
    assert (trainer.folder / LORA_FILE).is_file() and checkpoints(trainer.folder)[-1].name == f"checkpoint-{step}"
    assert f"Stopped after step {step}: watch.action=stop" in capsys.readouterr().out


@pytest.fixture
def falling(recipe, tmp_path) -> Trainer:
    """Twelve steps as they are, then nearly black: it should go back to a checkpoint from before."""
    options = ["watch.action=rollback", "checkpointing_steps=2", "checkpoints_total_limit=0", "learning_rate=1e-3"]
    return make(recipe, tmp_path / "run", *options, dims=lambda step: 1.0 if step < 12 else 0.02)


def test_rollback(recipe, falling, capsys):
    """Back to what drew the last sound pictures: step 13 was the first dark one, so checkpoint-10 at most; the result is the
    averaged weights of that checkpoint, later ones are set aside, and the run can go on from there."""
    folder = falling.train()
    step = falling.progress.step
    assert step in (6, 8, 10) and falling.finished
    kept = checkpoints(folder)
    assert kept[-1].name == f"checkpoint-{step}"
    result, chosen = load_file(folder / LORA_FILE), load_file(kept[-1] / LORA_FILE)
    assert all(torch.equal(result[key], chosen[key]) for key in result)
    aside = {place.name for place in folder.glob("checkpoint-*-rolled-back")}
    assert "checkpoint-12-rolled-back" in aside and f"checkpoint-{step}-rolled-back" not in aside
    last = alarms(folder)[-1]
    assert last["alarm"] == "rollback" and f"to checkpoint-{step}" in last["text"]
    assert f"Rolled back from step {last['step']} to checkpoint-{step}" in capsys.readouterr().out

    again = make(recipe, folder, "resume_from_checkpoint=latest", f"max_steps={step + 1}")
    again.train()
    assert again.progress.step == step + 1
    assert [row["step"] for row in read_metrics(folder)] == [*range(1, step + 2)]
    assert not any(row["step"] > step for row in alarms(folder)), "alarms of steps that are taken again go"


def test_rollback_without_a_sound_checkpoint(recipe, tmp_path, capsys):
    """It grew dark from the first step on: there is nothing to go back to, and the run stops where it is."""
    trainer = make(recipe, tmp_path / "run", "watch.action=rollback", "checkpointing_steps=5", dims=dimming)
    trainer.train()
    assert trainer.progress.step == alarms(trainer.folder)[-1]["step"]
    assert "found no checkpoint from before step" in capsys.readouterr().out


def darkening(recipe: str, folder: str, out: str, env: dict[str, str]) -> None:
    """One of several processes that train together, with pictures that turn dark in step 13."""
    os.environ.update(env)
    torch.set_num_threads(1)
    options = ["watch.action=rollback", "checkpointing_steps=2", "checkpoints_total_limit=0", "batch_size=2"]
    trainer = make(Path(recipe), Path(folder), *options, dims=lambda step: 1.0 if step < 12 else 0.02)
    trainer.train()
    torch.save({"step": trainer.progress.step, "weights": dict(trainer.policy.trainable())}, out)


def test_two_processes_go_back_together(recipe, tmp_path):
    """Both come to the same verdict, take the same checkpoint, and hold the same weights; the alarm is written once."""
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    processes = [
        SERVER.Process(target=darkening, args=(str(recipe), str(tmp_path / "run"), str(out), env))
        for out, env in zip(outs, ranks(2), strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    one, other = (torch.load(out, weights_only=False) for out in outs)
    assert one["step"] == other["step"] in (6, 8, 10)
    assert all(torch.equal(one["weights"][key], other["weights"][key]) for key in one["weights"])
    rows = alarms(tmp_path / "run")
    assert rows[-1]["alarm"] == "rollback" and len({row["alarm"] for row in rows}) == len(rows)


# ------------------------------------------------------------------------------------------------ state, options, other runs


def test_a_resumed_run_knows_what_it_saw(recipe, tmp_path):
    """5 + 5 steps end with the same evidence, scales, first pictures and alarms as 10, to the bit."""
    whole = make(recipe, tmp_path / "whole", "max_steps=10", dims=dimming)
    whole.train()
    make(recipe, tmp_path / "parts", "max_steps=5", dims=dimming).train()
    rest = make(recipe, tmp_path / "parts", "max_steps=10", "resume_from_checkpoint=latest", dims=dimming)
    rest.train()
    assert whole.watch is not None and rest.watch is not None
    a, b = whole.watch.state_dict(), rest.watch.state_dict()
    assert torch.equal(a["start"].pop("pictures"), b["start"].pop("pictures"))
    for name, trend in a.pop("trends").items():
        other = b["trends"].pop(name)
        assert trend["steps"] == other["steps"]
        assert all(torch.equal(trend[key], other[key]) for key in ("values", "sums", "capital", "gaps")), name
    assert not b.pop("trends") and a == b
    assert alarms(tmp_path / "whole") == alarms(tmp_path / "parts")


def test_a_resumed_run_of_other_prompts_raises_its_alarms_without_a_sheet(recipe, tmp_path):
    """One prompt a step in place of two: the first step's noise would draw something else now."""
    make(recipe, tmp_path / "run", "max_steps=5", dims=dimming).train()
    rest = ["max_steps=14", "resume_from_checkpoint=latest", "prompts_per_step=1", "batch_size=2"]
    make(recipe, tmp_path / "run", *rest, dims=dimming).train()
    rows = alarms(tmp_path / "run")
    assert "hacking" in {row["alarm"] for row in rows} and all(row["pictures"] is None for row in rows)


def test_held_out_rewards_score_some_of_the_samples(recipe, tmp_path):
    """One sample of four, and none: then they are left to evaluations."""
    for count, known in ((1, True), (0, False)):
        trainer = make(recipe, tmp_path / str(count), f"watch.held_out_samples={count}")
        assert trainer.watch is not None
        seen = Counted(trainer.eval_rewards["brightness"])
        trainer.watch.held_out = dict.fromkeys(trainer.watch.held_out, seen)
        assert ("watch/held_out/brightness" in trainer.step()) is known
        assert seen.sizes == [1] * known


def test_a_fall_between_evaluations_is_a_sign(recipe, tmp_path):
    """Two evaluations of 30 prompts, each of which lost a little; with a train reward that rose, that is hacking."""
    watch = Watch(Trends(), {}, ["truth"])
    items = torch.rand(30, generator=torch.Generator().manual_seed(0))
    for step, values in ((25, items), (50, items - 0.2 - 0.01 * items)):
        watch.evaluated(step, SimpleNamespace(per_prompt=lambda name, values=values: values))
    (sign,) = watch.signs().values()
    assert (sign.series, sign.drift.since, sign.drift.up) == ("evaluated/truth", 25, False)
    assert sign.text.startswith("truth in evaluations down ")


def test_the_error_is_shared_by_all_series():
    """11 series and the reward, a held-out reward, two evaluated ones: each gets a fifteenth of the false alarms."""
    from math import log

    watch = Watch(Trends(false_alarms=0.03), {"a": brightness}, ["a", "b"])
    assert watch.certain == pytest.approx(log(15 / 0.03))


def test_the_share_of_false_alarms_of_a_whole_watch():
    """40 runs of 24 steps in which no series drifts, at false_alarms = 0.3: at most 12 of them have a certain drift in any of 12
    series, however small; alarms need large ones."""
    watch, found = Watch(Trends(false_alarms=0.3), {}, []), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        trends = [Trend() for _ in range(12)]
        for step in range(24):
            for trend, value in zip(trends, torch.randn(12, generator=generator).tolist(), strict=True):
                trend.add(step, value)
        drifts = [trend.drift(up) for trend in trends for up in (True, False)]
        found += any(drift is not None and drift.evidence >= watch.certain for drift in drifts)
    assert found <= 12


def test_training_from_data_is_watched_too(recipe, tmp_path):
    """No pictures are drawn: the velocity and the distance to the base are what there is."""
    options = ["objective=dpo", "data=tiny-pairs", f"output_dir={tmp_path}/run", "max_steps=2", "batch_size=4", "checks=false"]
    trainer = Trainer(load_recipe(recipe, options), policy=Policy(tiny("sd3"), CALL["sd3"]))
    trainer.train()
    row = read_metrics(trainer.folder)[0]
    assert row["watch/velocity"] == 1 and "watch/dark" not in row


def test_every_option_is_explained(capsys):
    assert main(["train", "--options", "watch"]) == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.startswith("  ") and line[2] != " "}
    assert set(lines) == {"action", "false_alarms", "change", "held_out_samples", "ignore"}
    assert all(len(words) >= 4 for words in lines.values()) and "watch=none: Measure nothing." in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["watch=trend"], "unknown watch 'trend'; did you mean trends"),
        (["watch.action=pause"], "watch.action='pause': choose one of warn, stop, rollback"),
        (["watch.false_alarms=0"], "false_alarms=0.0: a probability, in \\(0, 1\\)"),
        (["watch.change=0.5"], "change=0.5: a factor, above 1"),
        (["watch.held_out_samples=-1"], "held_out_samples=-1: must be zero or positive"),
        (["watch.ignore=[darkness]"], "unknown series or alarm in watch.ignore 'darkness'; did you mean dark"),
        (["watch.colour=1"], "unknown watch option 'colour'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(recipe, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(load_recipe(recipe, [f"output_dir={tmp_path}/run", *options]))
    assert not (tmp_path / "run").exists()
