"""Pinned evaluation: what makes two scores comparable, and the paired interval, by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from flowrl.batch import Prompt
from flowrl.evaluate import (
    Evaluation,
    Protocol,
    compare,
    comparison_rows,
    evaluate,
    prompt_seed,
    score_rows,
    text_table,
)
from flowrl.policy import Policy
from flowrl.reward_models import load_reward
from tests.pipelines import CALL, tiny

PROTOCOL = Protocol("four", num_inference_steps=2, seeds=2)
PROMPTS = [Prompt("a red circle", {"kind": "one"}), Prompt("blue", {"kind": "two"}), Prompt("a cat", {"kind": "two"})]
REWARDS = {"brightness": load_reward("brightness")}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(tiny("sd3"), CALL["sd3"])


def made(scores: list[list[float]], name: str = "m", protocol: Protocol = PROTOCOL, kinds: str = "abab") -> Evaluation:
    """An evaluation with one reward and the given scores, a list of seeds for each prompt."""
    prompts = [Prompt(f"p{i}", {"kind": kinds[i]}) for i in range(len(scores))]
    seeds = [list(range(len(scores[0])))] * len(scores)
    return Evaluation(name, protocol, prompts, seeds, ["r"], torch.tensor(scores)[:, :, None])


def test_paired_difference_by_hand():
    """Per prompt, means over seeds: base 1, 2 and tuned 2, 5: differences 1 and 3, mean 2.

    A bootstrap of two prompts draws (1,1), (1,3), (3,1), (3,3), so means 1, 2, 2, 3 with probabilities 1/4, 1/2, 1/4: the
    2.5 % and 97.5 % quantiles are 1 and 3. The seeds of a prompt stay together: spread within a prompt adds nothing.
    """
    base, tuned = made([[0.0, 2.0], [2.0, 2.0]]), made([[4.0, 0.0], [5.0, 5.0]])
    d = compare(base, tuned, "r")
    assert (d.base, d.tuned, d.value, d.low, d.high) == (1.5, 3.5, 2.0, 1.0, 3.0)
    assert d.significant and not compare(base, base, "r").significant
    assert compare(base, tuned, "r", kind="b").value == 3.0


def test_interval_has_the_width_of_the_standard_error():
    """100 prompts with differences of deviation 1 around 0.5: the interval is 0.5 +- 1.96 x 0.1, and pairing is what makes
    it narrow: the prompts' own spread of 10 does not enter."""
    rng = np.random.default_rng(0)
    level, noise = rng.normal(0, 10, 100), rng.normal(0, 1, 100)
    noise = (noise - noise.mean()) / noise.std()
    base = made([[float(a)] for a in level], kinds="a" * 100)
    tuned = made([[float(a)] for a in level + 0.5 + noise], kinds="a" * 100)
    d = compare(base, tuned, "r")
    assert d.low == pytest.approx(0.5 - 0.196, abs=0.02) and d.high == pytest.approx(0.5 + 0.196, abs=0.02)


def test_a_prompt_that_one_model_has_no_score_for_is_left_out_of_both():
    nan = math.nan
    d = compare(made([[0.0], [100.0], [1.0]]), made([[1.0], [nan], [2.0]]), "r")
    assert (d.base, d.tuned) == (0.5, 1.5)
    assert math.isnan(compare(made([[nan]]), made([[nan]]), "r").value)
    assert made([[1.0, nan], [nan, nan], [3.0, 4.0]]).mean("r") == 2.25


def test_other_protocols_are_refused_and_named():
    base = made([[0.0]])
    other = replace(PROTOCOL, num_inference_steps=4, guidance_scale=3.0)
    with pytest.raises(ValueError, match=r"num_inference_steps: 2 against 4; guidance_scale: None against 3\.0"):
        compare(base, made([[0.0]], protocol=other), "r")
    longer = made([[0.0], [1.0]])
    with pytest.raises(ValueError, match="had 1 prompts for m, and 2 prompts, or others"):
        compare(base, longer, "r")
    renamed = replace(base, prompts=[Prompt("q0")])
    with pytest.raises(ValueError, match="do not compare"):
        compare(base, renamed, "r")


def test_tables_have_a_row_for_each_kind():
    header, rows = comparison_rows(made([[0.0], [2.0], [0.0]], "base"), made([[1.0], [2.0], [1.0]], "tuned"), "r")
    assert header[1:3] == ["base", "tuned"]
    assert rows[0] == ["a", "0.000", "1.000", "+1.000", "+1.000 to +1.000", "2"]
    assert [row[0] for row in rows] == ["a", "b", "all"] and rows[2][5] == "3"
    assert score_rows(made([[0.0], [2.0]]))[1] == [["a", "0.000", "1"], ["b", "2.000", "1"], ["all", "1.000", "2"]]
    lines = text_table(header, rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1] == "-" * len(lines[0])
    numbered = made([[1.0], [3.0]])
    numbered.prompts = [Prompt("p", {"kind": 1}), Prompt("q", {"kind": 2})]  # kinds need not be text
    assert [row[1] for row in score_rows(numbered)[1]] == ["1.000", "3.000", "2.000"]


def test_json_is_json():
    """NaN is null: `NaN` is not JSON, and other readers refuse it."""
    facts = json.loads(json.dumps(made([[1.0], [math.nan]]).to_json(), allow_nan=False))
    assert facts["means"]["r"] == {"all": 1.0, "a": 1.0, "b": None}
    assert [row["rewards"]["r"] for row in facts["samples"]] == [1.0, None]
    assert facts["protocol"]["num_inference_steps"] == 2


def test_seeds_depend_on_the_prompts_text_alone():
    assert prompt_seed("a", 0) == prompt_seed("a", 0) and len({prompt_seed(p, i) for p in "ab" for i in (0, 1)}) == 4
    assert prompt_seed("a", 0, seed=1) != prompt_seed("a", 0)


def test_a_prompts_score_does_not_depend_on_its_neighbours(policy):
    """Another order of the file, and another batch size, give every prompt the same seeds and the same picture."""
    first = evaluate(policy, PROMPTS, REWARDS, PROTOCOL, batch_size=64, keep_images=True)
    again = evaluate(policy, PROMPTS[::-1], REWARDS, PROTOCOL, batch_size=64)
    assert again.seeds == first.seeds[::-1]
    assert torch.allclose(again.scores, first.scores.flip(0), atol=1e-5)
    single = evaluate(policy, PROMPTS, REWARDS, PROTOCOL, batch_size=1, keep_images=True)
    assert torch.allclose(single.samples.images, first.samples.images, atol=1e-4)
    assert first.samples.images.shape == (6, 3, 32, 32)
    assert (first.samples.images[0] - first.samples.images[1]).abs().max() > 0.05
    assert torch.equal(evaluate(policy, PROMPTS, REWARDS, PROTOCOL).scores, first.scores)


def test_evaluation_wears_the_weights_it_is_told(policy):
    """EMA weights inside, the policy's own afterwards; sampling is deterministic, without gradient."""
    policy.train_all()
    policy.snapshot("ema")
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.3)
    ema, own = (evaluate(policy, PROMPTS[:1], REWARDS, PROTOCOL, weights=w) for w in ("ema", "policy"))
    assert not torch.equal(ema.scores, own.scores) and not own.scores.requires_grad
    for parameter, kept in zip(policy.trainable().values(), policy.snapshots["ema"].values(), strict=True):
        parameter.data.copy_(kept)
    assert torch.equal(evaluate(policy, PROMPTS[:1], REWARDS, PROTOCOL).scores, ema.scores)
