"""Scoring while drawing, rewards that learn, groups in evaluations: what the loop does for rewards."""

from __future__ import annotations

import time

import pytest
import torch

from flowrl import Policy, Trainer, load_recipe
from flowrl.batch import Prompt, Samples, concatenate
from flowrl.config import ConfigError
from flowrl.evaluate import Protocol, evaluate
from flowrl.record import read_metrics
from flowrl.reward_models.base import RewardError, Traits, load_reward
from flowrl.train.scoring import Scoring
from tests.pipelines import CALL, tiny
from tests.test_resume import metrics


def batch(n: int, first: int = 0) -> Samples:
    seeds = list(range(first, first + n))
    images = torch.tensor(seeds).float().view(-1, 1, 1, 1).expand(n, 3, 2, 2) / 100
    return Samples([Prompt("p")] * n, seeds, torch.tensor(seeds) // 2, torch.zeros(n, 1), images)


class Slow:
    """Waits like a server does."""

    name = "slow"

    def __init__(self, seconds: float = 0.2, fails_at: int | None = None, **traits):
        self.seconds, self.fails_at, self.sizes = seconds, fails_at, []
        self.traits = Traits(remote=True, **traits)

    def __call__(self, samples):
        time.sleep(self.seconds)
        self.sizes.append(len(samples))
        if self.fails_at in samples.seeds:
            raise ConnectionError("gone")
        return samples.images.flatten(1).mean(1)


def test_slow_rewards_score_while_the_next_batch_is_drawn():
    """Three batches that take 0.2 s to draw and 0.2 s to score: 0.8 s in a pipeline, 1.2 s one after the other."""
    parts = [batch(4), batch(4, 4), batch(4, 8)]
    slow, whole = Slow(), Slow(0.0, arity="group")
    start = time.monotonic()
    with Scoring({"slow": slow, "bright": load_reward("brightness"), "whole": whole}) as scoring:
        for part in parts:
            time.sleep(0.2)
            scoring.submit(part)
        scores = scoring.finish(concatenate(parts))
    assert time.monotonic() - start < 1.1
    assert slow.sizes == [4, 4, 4] and whole.sizes == [12]  # what compares samples sees them together
    torch.testing.assert_close(scores, (torch.arange(12.0) / 100)[:, None].expand(12, 3))


def test_a_failing_server_ends_the_step_with_its_name():
    slow = Slow(0.0, fails_at=1)
    with pytest.raises(RewardError, match=r"reward 'mine' raised ConnectionError: gone"):
        with Scoring({"mine": slow}) as scoring:
            scoring.submit(batch(4))
            scoring.finish(batch(4))
    with pytest.raises(RewardError, match="gone"):
        with Scoring({"mine": slow}) as scoring:
            scoring.submit(batch(4))
            time.sleep(0.2)
            scoring.submit(batch(4, 4))  # the news comes here: nothing more is drawn


class Drift:
    """Learns a number: what it has seen so far."""

    name, traits = "drift", Traits()

    def __init__(self):
        self.seen = torch.zeros(())

    def __call__(self, samples):
        return samples.images.flatten(1).mean(1) * (1 + self.seen)

    def update(self, samples, reduce):
        self.seen = self.seen + reduce(samples.images.mean())
        return {"seen": float(self.seen)}

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def trainer(recipe, folder, *overrides: str, **options) -> Trainer:
    policy = Policy(tiny("sd3"), {**CALL["sd3"], "num_inference_steps": 3})
    return Trainer(load_recipe(recipe, [f"output_dir={folder}", *overrides]), policy=policy, **options)


@pytest.mark.parametrize("wrap", [lambda r: r, lambda r: load_reward(r, shape={"cap": 5.0})], ids=["plain", "inside another"])
def test_a_reward_that_learns_goes_on_where_it_stopped(recipe, tmp_path, wrap):
    whole = trainer(recipe, tmp_path / "whole", "max_steps=4", rewards={"drift": wrap(Drift())}).train()
    rows = read_metrics(whole)
    seen = "rewards/drift/seen" if "rewards/drift/seen" in rows[0] else "rewards/drift.1/seen"
    assert rows[3][seen] > rows[0][seen] > 0
    parts = tmp_path / "parts"
    trainer(recipe, parts, "max_steps=2", rewards={"drift": wrap(Drift())}).train()
    on = ("max_steps=4", "resume_from_checkpoint=latest")
    trainer(recipe, parts, *on, rewards={"drift": wrap(Drift())}).train()
    assert metrics(whole) == metrics(parts)
    with pytest.raises(
        ConfigError, match=r"holds the state of rewards that learn: \['drift.*this recipe has none: start a new run"
    ):
        trainer(recipe, parts, "max_steps=5", "resume_from_checkpoint=latest", rewards={"bright": load_reward("brightness")})


def test_virtual_best_wants_a_maximum(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"virtual_best .* jpeg has none.*rewards.jpeg="):
        trainer(recipe, tmp_path / "a", "virtual_best=true", "aggregation=sum_then_normalize",
                rewards={"jpeg": lambda images, prompts: [0.0] * len(prompts), "b": load_reward("brightness")})  # fmt: skip
    rows = read_metrics(trainer(recipe, tmp_path / "b", "virtual_best=true").train())
    assert rows[0]["grad_norm"] > 0


def test_confidence_weighs_advantages(recipe, tmp_path, monkeypatch):
    """Without doubt anywhere all weights are 1; a sample that is doubted weighs less."""
    uncertain = load_reward("uncertain", of="brightness", views=3)
    run = trainer(recipe, tmp_path / "a", "confidence=u", rewards={"u": uncertain})
    seen = []
    update = run.update
    monkeypatch.setattr(run, "update", lambda batches, advantage: (seen.append(advantage), update(batches, advantage))[1])
    run.step()
    monkeypatch.setattr(uncertain, "confidence", lambda samples: torch.tensor([0.0, 1.0, 2.0, 1.0]))
    run.step()
    first, second = (advantage.abs().tolist() for advantage in seen)
    assert sum(first) > 0 and second[0] == 0 and second[2] == pytest.approx(2 * second[3], rel=1e-4)  # of one group of two
    with pytest.raises(ConfigError, match=r"confidence=b: no reward of this run that knows its doubt; those that do: u"):
        trainer(recipe, tmp_path / "b", "confidence=b", rewards={"u": uncertain, "b": load_reward("brightness")})


def test_evaluations_show_groups_whole():
    """Batches of three cut through groups of two; a reward that compares them still sees two."""

    class Group:
        name, traits = "group", Traits(arity="group")

        def __call__(self, samples):
            assert [len(rows) for rows in samples.by_group()] == [2, 2, 2]
            return samples.group.float()

    policy = Policy(tiny("sd3"), CALL["sd3"])
    rewards = {"group": Group(), "bright": load_reward("brightness")}
    protocol = Protocol("three", num_inference_steps=2, seeds=2)
    result = evaluate(policy, [Prompt(p) for p in ("a", "b", "c")], rewards, protocol, batch_size=3)
    assert result.scores[:, :, 0].tolist() == [[0, 0], [1, 1], [2, 2]]
    alone = evaluate(policy, [Prompt(p) for p in ("a", "b", "c")], {"bright": rewards["bright"]}, protocol, batch_size=3)
    assert torch.equal(alone.scores[:, :, 0], result.scores[:, :, 1]) and result.samples is None
