"""The protocol of an evaluation: what makes it another one, how that is named, and when a reward is another version."""

from __future__ import annotations

import inspect
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from flowrl.batch import Prompt
from flowrl.protocol import Protocol, differences, digest_of, reward_version
from flowrl.reward_models import load_reward
from flowrl.reward_models.base import embedded_folder

PROTOCOL = Protocol("four", 20, 1.0, seeds=4, digest="aa", size=(64, 64), dtype="float32", rewards={"r": "1", "s": "2"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_inference_steps": 28}, "num_inference_steps: 20 against 28"),
        ({"guidance_scale": None}, "guidance_scale: 1.0 against None"),
        ({"seeds": 2}, "seeds: 4 against 2"),
        ({"seed": 7}, "seed: 0 against 7"),
        ({"solver": "dpmpp2m"}, "solver: 'euler' against 'dpmpp2m'"),
        ({"digest": "bb", "prompts": "five"}, "prompts: four (aa) against five (bb)"),
        ({"digest": "bb"}, "prompts: four (aa) against four (bb)"),
        ({"size": (32, 64)}, "size: 64 x 64 against 32 x 64"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' against 'bfloat16'"),
        ({"call": {"negative_prompt": "x"}}, "call: {} against {'negative_prompt': 'x'}"),
        ({"rewards": {"r": "9", "s": "2"}}, "reward r: version 1 against 9"),
    ],
)
def test_each_difference_is_named(change, named):
    assert differences(PROTOCOL, replace(PROTOCOL, **change), "r") == [named]


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": "elsewhere/four.txt"},  # the same prompts in another place
        {"size": None},  # nobody knows
        {"dtype": None},
        {"ema": True},  # the other was never averaged
        {"call": {"height": 64, "width": 64}},  # what came out is as large
        {"rewards": {"r": "1", "s": "9"}},  # s is not asked about
        {"rewards": {}},
    ],
)
def test_what_is_no_difference(change):
    assert differences(PROTOCOL, replace(PROTOCOL, **change), "r") == []


def test_averaged_and_raw_weights_differ():
    assert differences(replace(PROTOCOL, ema=True), replace(PROTOCOL, ema=False)) == ["ema: True against False"]


def test_one_line_for_the_head_of_a_report():
    assert str(PROTOCOL) == "four (aa), 4 seeds from 0, 20 ODE steps, guidance 1, 64 x 64, float32"
    loose = Protocol("geneval", None, solver="dpmpp2m", ema=True)
    assert str(loose) == "geneval, 1 seed from 0, an unknown number of ODE steps (dpmpp2m), averaged weights"
    assert loose.arguments() == {} and PROTOCOL.arguments() == {"num_inference_steps": 20, "guidance_scale": 1.0}


def test_the_digest_is_of_texts_columns_and_order():
    prompts = [Prompt("a", {"kind": "x", "n": 1}), Prompt("b")]
    assert digest_of(prompts) == digest_of([Prompt("a", {"n": 1, "kind": "x"}), Prompt("b")])
    others = [prompts[::-1], prompts[:1], [Prompt("a", {"kind": "y", "n": 1}), Prompt("b")], [Prompt("ab"), Prompt("")]]
    assert len({digest_of(other) for other in [prompts, *others]}) == 5


# ------------------------------------------------------------------------------------------------ versions of rewards


def test_the_version_of_a_reward_follows_options_weights_and_what_is_inside():
    specs = ["tiny_strict", "tiny_dense", "brightness", "mmd features=pixels", "mmd features=pixels bandwidth=2.0"]
    specs += ["tiny_preference", "tiny_preference_1", "uncertain of=tiny_preference", "uncertain of=tiny_preference_1"]
    specs += [f"brightness 'shape={{cap: {cap}}}'" for cap in (0.5, 0.6)]
    versions = [reward_version(load_reward(spec)) for spec in specs]
    assert len(set(versions)) == len(specs)
    assert versions == [reward_version(load_reward(spec)) for spec in specs]


def test_one_changed_weight_in_a_reward_shows():
    reward = load_reward("tiny_preference")
    before = reward_version(reward)
    parameter = max(reward.network.parameters(), key=torch.numel)
    parameter.data.mul_(1.001)
    assert reward_version(reward) != before


def test_a_function_of_the_users_counts_by_its_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, weight in (("one", 1), ("two", 2)):
        (tmp_path / f"{name}.py").write_text(
            f"def red(images, prompts):\n    return {weight} * images[:, 0].flatten(1).mean(1)\n"
        )
    versions = [reward_version(load_reward(f"{name}.red")) for name in ("one", "two")]
    source = {inspect.getsource(sys.modules[name].red) for name in ("one", "two")}
    assert len(source) == len(set(versions)) == 2
    assert reward_version(load_reward("one.red")) == versions[0]


def test_where_a_reward_lies_does_not_matter(tmp_path):
    """The same folder in another place is the same version."""
    shutil.copytree(embedded_folder("tiny_preference"), tmp_path / "moved")
    assert reward_version(load_reward(str(tmp_path / "moved"))) == reward_version(load_reward("tiny_preference"))
