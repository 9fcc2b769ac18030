"""Rewards of pictures on clips: those that take clips by frame, and `frames`, which lets any other see some of them."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.batch import Prompt, Samples
from flowrl.reward_models import RewardError, load_reward, score
from flowrl.reward_models.base import score_one

#: Rewards of pictures that ship, or want no weights, and take clips frame by frame.
BY_FRAME = ("tiny_clip", "tiny_preference", "tiny_transport", "token_transport")


def clips(count: int = 2, frames: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, frames, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def made(images: torch.Tensor, texts: tuple[str, ...] = ("a red circle", "two blue stars")) -> Samples:
    prompts = [Prompt(text, {"target": text}) for text in texts[: len(images)]]
    n = len(images)
    return Samples(prompts, [7 + i for i in range(n)], torch.arange(n), torch.zeros(n, 1), images)


def as_pictures(samples: Samples) -> Samples:
    """Every frame as a sample of its own."""
    assert samples.images is not None
    rows = torch.arange(len(samples)).repeat_interleave(samples.images.shape[1])
    pictures = samples.select(rows)
    pictures.images = samples.images.flatten(0, 1)
    return pictures


@pytest.mark.parametrize("name", BY_FRAME)
@pytest.mark.parametrize("frames", ["mean", "min"])
def test_rewards_of_pictures_take_clips_by_frame(name, frames):
    reward, samples = load_reward(name, frames=frames), made(clips())
    each = score_one(name, reward, as_pictures(samples)).view(2, 4)
    expected = each.mean(1) if frames == "mean" else each.amin(1)
    torch.testing.assert_close(score_one(name, reward, samples), expected, rtol=1e-3, atol=1e-4)
    permuted = made(samples.images[:, [2, 0, 3, 1]])
    torch.testing.assert_close(score_one(name, reward, permuted), expected, rtol=1e-3, atol=1e-4)


def test_an_artifact_in_one_frame_is_one_of_the_clip():
    reward, samples = load_reward("tiny_artifact"), made(clips())
    each = score_one("a", reward, as_pictures(samples)).view(2, 4)
    torch.testing.assert_close(score_one("a", reward, samples), each.amin(1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("of", ["tiny_yes_token", "tiny_clean", "tiny_clip", "jpeg_size"])
def test_any_reward_of_pictures_sees_frames(of):
    """Among them those that refuse clips, or would take them for something else."""
    samples = made(clips())
    each = score_one(of, load_reward(of), as_pictures(samples)).view(2, 4)
    for reduce, expected in (("mean", each.mean(1)), ("min", each.amin(1))):
        found = score_one(of, load_reward("frames", of=of, pick="all", reduce=reduce), samples)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        score_one(of, load_reward("frames", of=of, count=2), samples), each[:, [0, 3]].mean(1), rtol=1e-3, atol=1e-4
    )


def number(images: torch.Tensor, prompts: list[str], **columns) -> list[float | None]:
    """The first pixel in tenths, and abstention at 0.3."""
    values = [round(10 * float(image[0, 0, 0])) for image in images]
    assert columns["target"] == prompts and images.ndim == 4
    return [None if value == 3 else value for value in values]


def numbered(frames: int) -> torch.Tensor:
    return (torch.arange(float(frames)) / 10).view(1, frames, 1, 1, 1).expand(2, frames, 3, 4, 4)


@pytest.mark.parametrize(
    ("pick", "count", "expected"),
    [
        ("even", 3, [0, 4, 8]),
        ("even", 1, [0]),
        ("even", 20, range(9)),
        ("first", 2, [0, 1]),
        ("last", 2, [7, 8]),
        ("all", 1, range(9)),
    ],
)
def test_which_frames(pick, count, expected):
    reward = load_reward("frames", of="brightness", pick=pick, count=count)
    assert reward.chosen(9, [0, 1]).tolist() == [list(expected)] * 2


def test_frames_at_random_depend_on_the_seed_alone():
    reward = load_reward("frames", of="brightness", pick="random", count=5)
    chosen = reward.chosen(81, [3, 4, 3])
    assert chosen[0].tolist() == chosen[2].tolist() != chosen[1].tolist()
    assert all(row == sorted(set(row)) and len(row) == 5 for row in chosen.tolist())
    assert reward.chosen(81, [4]).tolist() == [chosen[1].tolist()]
    counts = torch.zeros(9)
    for seed in range(300):
        counts[reward.chosen(9, [seed])[0]] += 1
    assert float((counts / 300 - 5 / 9).abs().max()) < 0.12


def test_a_frame_that_abstains_is_left_out_and_a_clip_of_such_frames_abstains():
    """Frames 0 ... 3, where 3 abstains: the mean of 0, 1, 2 is 1, the least 0; of the last alone nothing is known."""
    samples = made(numbered(4))
    assert load_reward("frames", of=number, pick="all")(samples).tolist() == [1, 1]
    assert load_reward("frames", of=number, pick="all", reduce="min")(samples).tolist() == [0, 0]
    assert all(math.isnan(value) for value in load_reward("frames", of=number, pick="last", count=1)(samples).tolist())


def test_gradients_reach_the_chosen_frames():
    images = clips().requires_grad_()
    reward = load_reward("frames", of="tiny_clip", count=2)
    assert reward.traits.differentiable and reward.traits.needs == ("clips",)
    reward(made(images)).sum().backward()
    assert (images.grad.flatten(2).abs().sum(2) > 0).tolist() == [[True, False, False, True]] * 2


def test_what_does_not_look_at_one_picture_is_refused():
    for of, message in (
        ({"name": "win_rate", "of": "tiny_clip"}, "compares a group"),
        ("temporal_flicker", "wants clips"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward("frames", of=of)
    with pytest.raises(ValueError, match="pick='middle': choose even, random"):
        load_reward("frames", of="tiny_clip", pick="middle")
    with pytest.raises(ValueError, match="count=0: one at least"):
        load_reward("frames", of="tiny_clip", count=0)
    with pytest.raises(RewardError, match="needs clips"):
        score({"r": load_reward("frames", of="tiny_clip")}, made(clips()[:, 0]))


def test_t2v_turbos_mixture():
    """5 frames under an image reward, all under a video reward, 1 and 2 times: what a recipe says is what is summed."""
    from flowrl.reward_models.base import load_rewards

    section = {
        "image": {"name": "frames", "of": "tiny_clip", "count": 5, "pick": "random", "weight": 1.0},
        "video": {"name": "video_text", "encoder": "tiny_clip", "weight": 2.0},
    }
    rewards = load_rewards(section)
    samples = made(clips(frames=8))
    values = score({name: reward for name, (reward, _) in rewards.items()}, samples)
    assert [weight for _, weight in rewards.values()] == [1.0, 2.0] and values.shape == (2, 2) and values.isfinite().all()
