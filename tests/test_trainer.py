"""The loop, end to end, on tiny real pipelines: it trains what it should, by the gradient it says, and records what it did."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from flowrl import Policy, Trainer, load_recipe
from flowrl.batch import Prompt
from flowrl.clips import read_clip
from flowrl.evaluate import Protocol, compare, evaluate
from flowrl.record import LORA_FILE, load_trained, read_metrics
from flowrl.reward_models import load_reward
from flowrl.train.objectives import GRPO
from flowrl.train.predict import PolicyPredict
from tests.pipelines import CALL, DENOISER, GUIDED, tiny

TIMES = ("rollout_time", "decode_time", "score_time", "update_time", "step_time")


def make(recipe, tmp_path, *overrides: str, name: str = "sd3", guided: bool = False, **options) -> Trainer:
    """A trainer of a tiny pipeline, in memory."""
    policy = Policy(tiny(name), {**CALL[name], **(GUIDED[name] if guided else {})})
    return Trainer(load_recipe(recipe, [f"output_dir={tmp_path}/run", *overrides]), policy=policy, **options)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {f"{part}.{key}": p.detach().clone() for part, m in policy.denoisers.items() for key, p in m.named_parameters()}


# ------------------------------------------------------------------------------------------------ one run of each family


@pytest.mark.parametrize(
    ("name", "transition", "guided"),
    [("sd15", "ddim", False), ("sd3", "flow_sde", True), ("flux", "dance_sde", False), ("wan", "cps", False)],
)
def test_a_run_of_each_family(recipe, tmp_path, name, transition, guided):
    """UNet, transformer with guidance, packed latents, video: three steps change LoRA weights and nothing else.

    The first update's ratio is 1 to the bit; metrics have TRL's names and a companion per time bin; pictures, tables, the
    result and the card are there.
    """
    trainer = make(
        recipe, tmp_path, f"transition={transition}", "max_steps=3", "samples_steps=2", "objective.epsilon=1e-6",
        name=name, guided=guided,
    )  # fmt: skip
    before = weights(trainer.policy)
    folder = trainer.train()
    after = weights(trainer.policy)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all("lora_" in key and key.startswith(DENOISER[name]) for key in changed)
    assert all(value.isfinite().all() for value in after.values())

    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3] and [row["images"] for row in rows] == [4, 8, 12]
    assert {"reward", "reward_std", "rewards/brightness/mean", "frac_reward_zero_std", "clip_ratio", "grad_norm"} <= {*rows[0]}
    assert {"learning_rate", "policy_loss", *TIMES} <= {*rows[0]}
    bins = [key for key in rows[0] if key.startswith("clip_ratio/t")]
    assert len(bins) == 2 and f"policy_loss/{bins[0].split('/')[1]}" in rows[0]
    for row in rows:
        assert all(value is not None for value in row.values()) and row["grad_norm"] > 0
        assert row["ratio_deviation"] == 0 and row["clip_ratio"] == 0, "each of these is the first update of its rollout"
    assert rows[0]["reward"] != rows[2]["reward"]

    frames = CALL[name].get("num_frames", 1)
    for step in (1, 2):
        place = folder / "samples" / f"step-{step:06d}"
        table = [json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines()]
        assert len(table) == 4 and len({row["group"] for row in table}) == 2 and len({row["seed"] for row in table}) == 4
        for row in table:
            if frames == 1:
                assert Image.open(place / row["file"]).size == (32, 32)
            else:
                pixels, rate = read_clip(place / row["file"])
                assert pixels.shape == (frames, 32, 32, 3) and rate == 16
        mean = sum(row["rewards"]["brightness"] for row in table) / 4
        assert mean == pytest.approx(rows[step - 1]["reward"], rel=1e-4)
    assert not (folder / "samples" / "step-000003").exists()
    assert (folder / LORA_FILE).is_file() and "12 generated" in (folder / "README.md").read_text()


def test_a_run_is_a_function_of_its_seed(recipe, tmp_path):
    """Twice the same: equal to the bit, whatever else drew random numbers. Another seed: another run."""

    def rewards(folder, seed):
        torch.rand(seed + 1)
        trainer = make(recipe, tmp_path / folder, f"seed={seed}")
        trainer.train()
        return [row["reward"] for row in read_metrics(trainer.folder)], trainer.policy.trainable()

    (first, a), (again, b), (other, _) = rewards("a", 0), rewards("b", 0), rewards("c", 1)
    assert first == again != other
    assert all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------ the gradient


def test_the_gradient_is_the_mean_over_samples_and_steps(recipe, tmp_path):
    """By hand: the mean over 4 samples and 2 trained steps of the objective's values, from one batch or from two."""
    trainer = make(recipe, tmp_path)
    batches = list(trainer.rollout(0))
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5])
    predict = PolicyPredict(trainer.policy, batches[0])
    losses = [trainer.objective.loss(predict, step, advantage).values for step in batches[0].steps]
    torch.stack(losses).mean().backward()
    parameters = trainer.policy.trainable()
    expected = {key: p.grad.clone() for key, p in parameters.items() if p.grad is not None}
    assert expected

    for size in (4, 2):
        trainer = make(recipe, tmp_path / str(size), f"batch_size={size}")
        seen = {}
        trainer.apply = lambda t=trainer, seen=seen: seen.update({k: p.grad for k, p in t.policy.trainable().items()}) or 0.0
        trainer.update(list(trainer.rollout(0)), advantage)
        for key, gradient in expected.items():
            torch.testing.assert_close(seen[key], gradient, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(recipe, tmp_path):
    plain, saving = (make(recipe, tmp_path / v, f"gradient_checkpointing={v}", "max_steps=1") for v in ("false", "true"))
    assert saving.step()["grad_norm"] == pytest.approx(plain.step()["grad_norm"], rel=1e-5)


def test_an_old_policy_that_is_the_policy_of_now_costs_no_pass(recipe, tmp_path):
    """The network runs once for both, with the same velocity; once a weight has moved, twice, with another."""
    trainer = make(recipe, tmp_path, "objective=nft", "transition=ode")
    batch = next(trainer.rollout(0))
    point = next(trainer.points(batch))[0]
    denoiser = trainer.policy.denoisers["transformer"]
    calls: list[int] = []
    denoiser.register_forward_hook(lambda *_: calls.append(1))

    predict = PolicyPredict(trainer.policy, batch)
    old, now = predict.old(point), predict(point)
    assert len(calls) == 1 and torch.equal(old, now) and now.requires_grad and not old.requires_grad
    with torch.no_grad():
        for parameter in trainer.policy.trainable().values():
            parameter += 0.01
    assert not trainer.policy.holds("old")
    predict = PolicyPredict(trainer.policy, batch)
    moved, now = predict.old(point), predict(point)
    assert len(calls) == 3 and not torch.equal(moved, now)
    torch.testing.assert_close(moved, old, rtol=1e-4, atol=1e-4)


def test_the_second_update_of_a_rollout_is_off_policy(recipe, tmp_path):
    """Two updates per step: the first one's samples have ratio 1 to the bit; the second's do not, and can be clipped."""
    seen = []

    class Watched(Trainer):
        def backward(self, batch, advantage, gathered, rows=None):
            own = type(gathered)()
            super().backward(batch, advantage, own, rows)
            for name, entry in own.sums.items():
                gathered.sums[name] += entry
            seen.append((self.progress.updates, {k: float(v[0] / v[1]) for k, v in own.sums.items()}))

    recipe = load_recipe(recipe, [f"output_dir={tmp_path}/run", "updates_per_step=2", "objective.epsilon=1e-7"])
    trainer = Watched(recipe, policy=Policy(tiny("sd3"), CALL["sd3"]))
    metrics = trainer.step()
    assert [updates for updates, _ in seen] == [0, 1]
    assert seen[0][1]["ratio_deviation"] == 0 == seen[0][1]["clip_ratio"]
    assert seen[1][1]["ratio_deviation"] > 1e-7 and seen[1][1]["clip_ratio"] > 0
    assert metrics["ratio_deviation"] == pytest.approx(seen[1][1]["ratio_deviation"] / 2)


def test_kl_has_a_gradient_after_a_step_under_autocast(recipe, tmp_path):
    """Full fine-tuning, bf16 autocast, a reference pass under no_grad before the policy's: the KL starts at 0, is positive
    after an update, and pulls back (a cached cast of the weights would leave it at 0 for ever)."""
    trainer = make(recipe, tmp_path, "train=full", "autocast=bfloat16", "objective.beta=1", "learning_rate=1e-2")
    trainer.policy.autocast_dtype = torch.bfloat16
    assert trainer.step()["kl"] == 0
    assert trainer.step()["kl"] > 1e-4
    batch = next(trainer.rollout(2))
    loss = trainer.objective.loss(PolicyPredict(trainer.policy, batch), batch.steps[0], torch.zeros(4))
    assert (loss.metrics["kl"] > 1e-4).all()
    loss.total.sum().backward()
    gradients = {key: p.grad for key, p in trainer.policy.trainable().items() if p.grad is not None and p.grad.any()}
    assert len(gradients) > len(trainer.policy.trainable()) / 2
    with torch.no_grad():
        for key, gradient in gradients.items():
            trainer.policy.trainable()[key] -= 1e-5 * gradient / gradient.norm()
        trainer.policy.autocast_dtype = None
        pulled = trainer.objective.loss(PolicyPredict(trainer.policy, batch), batch.steps[0], torch.zeros(4))
    with torch.no_grad():
        for key, gradient in gradients.items():
            trainer.policy.trainable()[key] += 1e-5 * gradient / gradient.norm()
        stayed = trainer.objective.loss(PolicyPredict(trainer.policy, batch), batch.steps[0], torch.zeros(4))
    assert pulled.metrics["kl"].mean() < stayed.metrics["kl"].mean()


def test_averaged_weights_and_warm_up_by_hand(recipe, tmp_path):
    """ema_decay warms up as (1 + n) / (10 + n): after two updates ema = 2/11 (0.1 w0 + 0.9 w1) + 9/11 w2. The learning rate
    rises by a third of itself with each update."""
    trainer = make(recipe, tmp_path, "lr_warmup_steps=3", "ema_decay=0.99", "learning_rate=0.03")
    key = next(key for key in trainer.policy.trainable() if "lora_B" in key)
    history, rates = [trainer.policy.trainable()[key].detach().clone()], []
    for _ in range(2):
        rates.append(trainer.step()["learning_rate"])
        history.append(trainer.policy.trainable()[key].detach().clone())
    w0, w1, w2 = history
    torch.testing.assert_close(trainer.policy.snapshots["ema"][key], 2 / 11 * (0.1 * w0 + 0.9 * w1) + 9 / 11 * w2)
    assert rates == pytest.approx([0.01, 0.02]) and not torch.equal(w1, w2)


def test_a_step_without_signal_changes_nothing(recipe, tmp_path):
    """All rewards equal: no gradient, so that neither momentum nor weight decay moves a weight; and it is counted."""
    flat = []
    trainer = make(
        recipe, tmp_path, "checks=false", rewards={"r": lambda images, prompts: torch.zeros(4) if flat else images[:, 0, 0, 0]}
    )
    assert trainer.step()["frac_reward_zero_std"] == 0
    before = weights(trainer.policy)
    flat.append(True)
    assert trainer.step()["frac_reward_zero_std"] == 1
    assert all(torch.equal(before[key], value) for key, value in weights(trainer.policy).items())


# ------------------------------------------------------------------------------------------------ rewards


def test_rewards_as_functions_with_columns_and_abstentions(recipe, tmp_path):
    """A function gets the prompts' columns; None abstains: left out of its own mean and of the total, and never a 0."""
    seen = []

    def target(images, prompts, level):
        seen.append(level)
        return [None if want is None else want + float(image.mean()) for want, image in zip(level, images, strict=True)]

    prompts = [Prompt("a", {"level": 10}), Prompt("b", {"level": None})]
    trainer = make(recipe, tmp_path, prompts=prompts, rewards={"target": target})
    metrics = trainer.step()
    assert sorted(seen[0], key=str) == [10, 10, None, None]
    assert 10 < metrics["rewards/target/mean"] < 11
    assert metrics["reward"] == pytest.approx(metrics["rewards/target/mean"])


def test_reward_weights_of_the_recipe(recipe, tmp_path):
    """`reward` is the weighted sum; a weight belongs to a name, also when the reward itself is handed over."""
    rewards = {"up": lambda images, prompts: [2.0 + float(i.mean()) for i in images], "down": load_reward("brightness")}
    trainer = make(recipe, tmp_path, "rewards.brightness=null", "rewards.up=0.5", "rewards.down={weight: -3}", rewards=rewards)
    metrics = trainer.step()
    assert metrics["reward"] == pytest.approx(0.5 * metrics["rewards/up/mean"] - 3 * metrics["rewards/down/mean"], rel=1e-5)
    assert metrics["rewards/up/mean"] == pytest.approx(2 + metrics["rewards/down/mean"], rel=1e-5)


def test_shared_initial_noise(recipe, tmp_path):
    """branches=[2]: the members of a group start from the same noise and part at the first stochastic step."""
    (batch,) = make(recipe, tmp_path, "branches=[2]").rollout(0)
    assert len(batch.steps[0].native) == 2  # one state per group, evaluated once
    first = batch.steps[0].per_sample(batch.steps[0].native)
    assert batch.group.tolist() == [0, 0, 1, 1]
    assert torch.equal(first[0], first[1]) and torch.equal(first[2], first[3]) and not torch.equal(first[1], first[2])
    assert not torch.equal(batch.latents[0], batch.latents[1])
    (own,) = make(recipe, tmp_path / "own").rollout(0)
    assert not torch.equal(own.steps[0].native[0], own.steps[0].native[1])


def red(images, prompts):
    """How much more red than green and blue."""
    return (images[:, 0] - images[:, 1:].mean(1)).flatten(1).mean(1)


def test_a_reward_rises(recipe, tmp_path):
    """Eight steps on the redness of random pictures: on prompts that are evaluated by the ODE, with the seeds of both models
    paired, it rises by more than two standard deviations of a picture, and the interval excludes less than one."""
    prompts = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("circle", "square", "cat")]
    trainer = make(
        recipe, tmp_path, "train=full", "learning_rate=3e-3", "objective.epsilon=1e-2", "num_inference_steps=4",
        "prompts_per_step=6", "num_generations=8", "batch_size=48", "max_steps=8",
        prompts=prompts, rewards={"red": red},
    )  # fmt: skip
    protocol, rewards = Protocol("six", num_inference_steps=4, seeds=4), {"red": load_reward(red)}
    base = evaluate(trainer.policy, trainer.prompts, rewards, protocol)
    trainer.train()
    tuned = evaluate(trainer.policy, trainer.prompts, rewards, protocol, weights="ema")
    spread = float(base.scores.std())
    rise = compare(base, tuned, "red")
    assert rise.value > 2 * spread and rise.low > spread, (rise, spread)


# ------------------------------------------------------------------------------------------------ around the loop


def test_evaluations_wear_the_averaged_weights(recipe, tmp_path, prompts):
    """eval/NAME is the held-out and the training reward of the averaged weights, by the ODE."""
    trainer = make(
        recipe, tmp_path, f"eval_prompts={prompts}", "eval_steps=2", "eval_num_inference_steps=2", "eval_seeds=2",
        "eval_rewards.jpeg_size=1",
    )  # fmt: skip
    folder = trainer.train()
    rows = read_metrics(folder)
    assert "eval/brightness" not in rows[0]
    protocol = Protocol(str(prompts), num_inference_steps=2, seeds=2)
    expected = evaluate(trainer.policy, trainer.eval_prompts, trainer.eval_rewards, protocol, weights="ema")
    for name in ("brightness", "jpeg_size"):
        assert rows[1][f"eval/{name}"] == pytest.approx(expected.mean(name), rel=1e-5)


def test_training_goes_on_from_a_lora(recipe, tmp_path, model):
    """`lora=RUN` starts from that run's averaged weights, with its rank, and the result loads like any other."""
    options = [f"output_dir={tmp_path}/first", "max_steps=2", "learning_rate=0.05"]
    before = Trainer(load_recipe(recipe, options))
    first = before.train()
    trainer = Trainer(load_recipe(recipe, [f"output_dir={tmp_path}/second", f"lora={first}", "max_steps=1", "lora_rank=2"]))
    start = trainer.policy.rollout(["a cat"], [1]).latents
    kept = load_trained(first)
    kept.call.update(trainer.policy.call)
    assert torch.allclose(kept.rollout(["a cat"], [1]).latents, start, atol=1e-5)
    assert not torch.allclose(Policy.load(model, num_inference_steps=3).rollout(["a cat"], [1]).latents, start, atol=1e-3)
    assert trainer.policy.trainable().keys() == before.policy.trainable().keys()
    trainer.train()
    again = load_trained(tmp_path / "second")
    again.call.update(trainer.policy.call)
    with trainer.policy.using("ema"):
        expected = trainer.policy.rollout(["a cat"], [1]).latents
    assert torch.allclose(again.rollout(["a cat"], [1]).latents, expected, atol=1e-5)


def test_minutes_end_a_run(recipe, tmp_path):
    """max_minutes counts time spent training; a run that it ends is finished, with a result."""
    trainer = make(recipe, tmp_path, "max_minutes=0.001", "max_steps=1000")
    folder = trainer.train()
    assert 1 <= trainer.progress.step < 50 and trainer.finished
    assert trainer.progress.seconds >= 0.06 and (folder / LORA_FILE).is_file()


def test_hooks_and_trackers(recipe, tmp_path):
    """A hook sees every step's metrics; tensorboard gets the same numbers."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = []
    trainer = make(
        recipe, tmp_path, "report_to=tensorboard", hooks=[lambda t, step, metrics: seen.append((step, metrics["reward"]))]
    )
    folder = trainer.train()
    assert [step for step, _ in seen] == [1, 2]
    events = EventAccumulator(str(next((folder / "tracker").rglob("events*")).parent)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(s, pytest.approx(r)) for s, r in seen]


def test_what_the_loop_refuses_before_it_loads_weights(recipe, tmp_path):
    from flowrl.config import ConfigError

    base = load_recipe(recipe, [f"output_dir={tmp_path}/run", f"model={tmp_path}/nowhere"])
    for wrong, message in [
        ({"objective": {"name": "grpo", "epsilon": 0}}, "objective: epsilon=0.0: must be positive"),
        ({"transition": {"name": "cps", "noise_level": 0}}, "deterministic"),
        ({"batch_size": 3}, "batch_size=3 does not divide"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Trainer(replace(base, **wrong))
    with pytest.raises(FileNotFoundError, match="no model at"):
        Trainer(base)
    assert not (tmp_path / "run").exists() and GRPO().needs.trajectory
