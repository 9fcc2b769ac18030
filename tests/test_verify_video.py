"""Exact rewards of the embedded world of clips: hand cases, abstention, what a frozen or a reversed clip gets, one reading."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.batch import Prompt, Samples
from flowrl.reward_models import RewardError, load_reward, score
from flowrl.reward_models import verify_video as module
from flowrl.tiny.follow import PARTS
from flowrl.tiny.moves import Clip, Moving, render_clip


def drawn(step: tuple[float, float], color: str = "red", start: tuple[float, float] = (30, 24)) -> torch.Tensor:
    return torch.from_numpy(render_clip(Clip((Moving("circle", color, start, step, (16, 16)),))))


def told(moves: str | None, color: str | None = None) -> Prompt:
    item = {"shape": "circle", "color": color, "count": 1, "moves": moves, "speed": None, "size": None}
    return Prompt(f"a circle moving {moves}", {"kind": "direction", "include": [item]})


def made(clips: torch.Tensor, prompts: list[Prompt]) -> Samples:
    n = len(prompts)
    return Samples(prompts, list(range(n)), torch.arange(n), torch.zeros(n, 1), clips, fps=8)


LEFT = drawn((-2, 0))


def test_the_truth_a_reversed_clip_a_frozen_clip_and_another_colour():
    """To the left at 2 pixels a frame: 1. Reversed it goes right: motion 0, the other three parts 1, dense 3/4. Frozen it is the
    same in all frames, on a smooth way, and does not move: 3/4 again. Blue, when red was asked for: no object, but the motion."""
    frozen = LEFT[:1].expand_as(LEFT)
    clips = torch.stack([LEFT, LEFT.flip(0), frozen, drawn((-2, 0), "blue")])
    samples = made(clips, [told("left"), told("left"), told("left"), told("left", "red")])
    strict, dense, *each = score(
        {name: load_reward(name) for name in ("tiny_video_strict", "tiny_video_dense")}
        | {part: load_reward("tiny_video_part", part=part) for part in PARTS},
        samples,
    ).T
    assert strict.tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(dense, torch.tensor([1, 0.75, 0.75, 0.75]))
    expected = {"object": [1, 1, 1, 0], "motion": [1, 0, 0, 1], "smooth": [1, 1, 1, 1], "same": [1, 1, 1, 1]}
    for part, values in zip(PARTS, each, strict=True):
        assert values.tolist() == expected[part]


def test_permuted_frames_are_not_smooth():
    order = torch.tensor([0, 5, 2, 7, 4, 1, 6, 3, 8])
    samples = made(torch.stack([LEFT, LEFT[order]]), [told("left")] * 2)
    smooth, same = (load_reward("tiny_video_part", part=part)(samples) for part in ("smooth", "same"))
    assert smooth[0] == 1 and smooth[1] < 0.5 and same.tolist() == [1, 1]


@pytest.mark.parametrize("columns", [{}, {"include": [{"shape": "circle", "count": 1}]}, {"include": []}, {"include": "x"}])
def test_prompts_that_say_nothing_of_motion_abstain(columns):
    samples = made(torch.stack([LEFT, LEFT]), [Prompt("a red circle", columns), told("left")])
    for reward in (
        load_reward("tiny_video_strict"),
        load_reward("tiny_video_dense"),
        load_reward("tiny_video_part", part="same"),
    ):
        assert [math.isnan(value) for value in reward(samples).tolist()] == [True, False]


def test_pictures_and_unknown_parts_are_named():
    samples = made(LEFT, [told("left")] * len(LEFT))
    with pytest.raises(RewardError, match="needs clips"):
        score({"r": load_reward("tiny_video_dense")}, samples)
    with pytest.raises(ValueError, match="part='speed': choose object, motion, smooth or same"):
        load_reward("tiny_video_part", part="speed")
    with pytest.raises(ValueError, match="wants part"):
        load_reward("tiny_video_part")


@pytest.fixture
def readings(monkeypatch) -> list[int]:
    counted, read = [], module._read.function

    def counting(samples: Samples) -> torch.Tensor:
        counted.append(len(samples))
        return read(samples)

    monkeypatch.setattr(module, "_read", module.Once(counting))
    return counted


def test_rewards_side_by_side_read_the_clips_once(readings):
    strict, dense = load_reward("tiny_video_strict"), load_reward("tiny_video_dense")
    samples = made(LEFT[None].clone(), [told("left")])
    assert strict(samples) == dense(samples) == 1 and readings == [1]
    samples.prompts = [told("right")]  # another question
    assert strict(samples) == 0 and readings == [1, 1]
    samples.images[:] = samples.images.flip(1)  # another answer
    assert strict(samples) == 1 and readings == [1, 1, 1]
    values = dense(samples)
    values += 1  # the caller's own
    assert dense(samples) == 1
    again = made(samples.images.clone(), samples.prompts)
    assert dense(again) == 1 and readings == [1, 1, 1, 1]


def test_clips_of_an_inference_are_read_each_time(readings):
    with torch.inference_mode():
        samples = made(LEFT[None].clone(), [told("left")])
        assert load_reward("tiny_video_strict")(samples) == load_reward("tiny_video_dense")(samples) == 1
    assert readings == [1, 1]
