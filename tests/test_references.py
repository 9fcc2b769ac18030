"""Pictures to compare with: whose they are, which of them, and that the loop hands them to those who ask."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from flowrl import Policy, Trainer, load_recipe
from flowrl.batch import Prompt
from flowrl.config import ConfigError
from flowrl.evaluate import prompt_seed
from flowrl.record import read_metrics
from flowrl.references import Drawn, Stored, references_of
from flowrl.reward_models.base import RewardError, Traits
from tests.pipelines import CALL, tiny

PROMPTS = [Prompt("a red circle"), Prompt("blue"), Prompt("a red circle")]


@pytest.fixture
def policy() -> Policy:
    policy = Policy(tiny("sd3"), {**CALL["sd3"], "num_inference_steps": 2})
    policy.add_lora(rank=2)
    policy.snapshot("ema")
    return policy


def move(policy: Policy) -> None:
    """Give the adapters something to say."""
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.3)


def test_base_references_are_the_models_before_training(policy):
    source = references_of({"name": "base", "count": 2})
    before = source(PROMPTS, policy)
    assert before.shape[:3] == (3, 2, 3) and torch.equal(before[0], before[2])  # one row per prompt, drawn once
    plain = policy.rollout([PROMPTS[1]] * 2, [prompt_seed("blue", j, seed=1) for j in range(2)])
    assert (policy.decode(plain) - before[1]).abs().max() <= 0.5 / 255 + 1e-5  # kept in 8 bits
    move(policy)
    assert torch.equal(source(PROMPTS, policy), before)
    fresh = references_of({"name": "base", "count": 2})(PROMPTS, policy)
    assert torch.equal(fresh, before)  # adapters off, not whatever the policy has become
    one_by_one = Drawn("reference", count=2, batch_size=1)(PROMPTS, policy)
    assert (one_by_one - before).abs().max() <= 1.01 / 255


def test_references_of_the_averaged_policy_move_with_it(policy):
    source = references_of({"name": "ema"})
    before = source(PROMPTS, policy)
    move(policy)
    assert torch.equal(source(PROMPTS, policy), before)  # the average has not moved yet
    policy.blend("ema", 0.0)
    assert not torch.equal(source(PROMPTS, policy), before)


def test_the_best_of_several(policy):
    all_of_them = Drawn("reference", count=4)(PROMPTS, policy)
    best = Drawn("reference", count=2, best_of=4, by="brightness")(PROMPTS, policy)
    light = all_of_them.flatten(2).mean(2)
    order = light.argsort(dim=1, descending=True)
    assert torch.equal(best, all_of_them[torch.arange(3)[:, None], order[:, :2]])


def test_references_from_a_folder(tmp_path, policy):
    rows = []
    for i, text in enumerate(["blue", "a red circle", "a red circle"]):
        Image.new("RGB", (4, 4), (i * 50, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"file": f"{i}.png", "prompt": text})
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = Stored(str(tmp_path))(PROMPTS, policy)
    assert (got[:, 0, 0, 0, 0] * 255).round().tolist() == [50, 0, 50]
    with pytest.raises(RewardError, match="has 1 of 2 pictures for 'blue'"):
        Stored(str(tmp_path), count=2)(PROMPTS, policy)
    with pytest.raises(FileNotFoundError, match="flowrl sample"):
        Stored(str(tmp_path / "nowhere"))
    Image.new("RGB", (4, 6)).save(tmp_path / "0.png")
    with pytest.raises(RewardError, match=r"pictures of several sizes \(4 x 4, 4 x 6\)"):
        Stored(str(tmp_path))(PROMPTS, policy)
    (tmp_path / "0.png").write_bytes(b"\x89PNG rubbish")
    with pytest.raises(RewardError, match="0.png is no picture that can be read"):
        Stored(str(tmp_path))(PROMPTS, policy)


class Nearness:
    """How near a sample is to its reference."""

    name, traits = "nearness", Traits(needs=("images", "references"))

    def __call__(self, samples):
        return -(samples.references[:, 0] - samples.images).abs().flatten(1).mean(1)


def test_the_loop_hands_them_over(recipe, tmp_path, policy):
    options = [f"output_dir={tmp_path}/run", "references={name: base}", "eval_steps=1"]
    (tmp_path / "eval.txt").write_text("a cat\n")
    trainer = Trainer(
        load_recipe(recipe, [*options, f"eval_prompts={tmp_path}/eval.txt", "eval_num_inference_steps=2"]),
        policy=policy,
        rewards={"near": Nearness()},
    )
    rows = read_metrics(trainer.train())
    assert all(-1 < row["rewards/near/mean"] < 0 for row in rows) and -1 < rows[0]["eval/near"] <= 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("references={}", "rewards.near compares with other pictures: say which, as in references={name: base"),
        ("references=based", "name='based': choose one of base, ema, folder"),
        ("references={name: base, many: 2}", "references base: .*many"),
        ("references={name: base, best_of: 3}", "best_of wants `by`"),
        ("references={name: base, count: 3, best_of: 2, by: brightness}", "count=3 of best_of=2 is not a choice"),
    ],
)
def test_references_that_cannot_be(recipe, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(load_recipe(recipe, [f"output_dir={tmp_path}/run", override]), rewards={"near": Nearness()})
