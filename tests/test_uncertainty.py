"""Doubt as a reward and as a weight: by hand, on views, on members, on pairs."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.batch import Prompt, Samples
from flowrl.reward_models import load_reward
from flowrl.reward_models.base import FunctionReward, Traits, parts_of, score_one
from flowrl.reward_models.uncertainty import confidence, disagreement, jittered, spread


def made(images: torch.Tensor, group=None) -> Samples:
    n = len(images)
    group = torch.arange(n) if group is None else torch.tensor(group)
    return Samples([Prompt(f"p{g}") for g in group.tolist()], list(range(n)), group, torch.zeros(n, 1), images)


def picture(n: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def dot(images, prompts):
    """One pixel: as unsteady as a reward can be."""
    return images[:, :, 16, 16].mean(1)


def brightness(images, prompts):
    return images.flatten(1).mean(1)


brightness.traits = Traits(range=(0.0, 1.0), differentiable=True)


def test_weights_by_hand():
    """exp(-u / 1) of 0 and ln 3 is 1 and 1/3, their mean 2/3: weights 1.5 and 0.5. What is unknown is left as it is."""
    w = confidence(torch.tensor([0.0, math.log(3), math.nan]), tau=1.0)
    torch.testing.assert_close(w, torch.tensor([1.5, 0.5, 1.0]))
    torch.testing.assert_close(confidence(torch.tensor([5.0, 5.0])), torch.ones(2))
    u = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(confidence(100 * u), confidence(u))  # tau None: in units of u itself
    assert confidence(torch.tensor([1e4, 1e4 + 1]), tau=1.0).isfinite().all()  # exp(-1e4) is 0
    assert confidence(torch.tensor([math.nan, math.nan])).tolist() == [1, 1]


def test_spread_over_views_that_speak():
    mean, u = spread(torch.tensor([[1.0, 3.0, math.nan], [2.0, 2.0, 2.0], [1.0, math.nan, math.nan]]))
    torch.testing.assert_close(mean, torch.tensor([2.0, 2.0, math.nan]), equal_nan=True)
    torch.testing.assert_close(u, torch.tensor([math.sqrt(2), 0.0, math.nan]), equal_nan=True)


def test_disagreement_by_hand():
    """Group 0: |1 - 2|, |1 - 4|, |2 - 4| = 1, 3, 2, mean 2; group 1: 5; group 2 has one sample; NaN is no opinion."""
    r = torch.tensor([1.0, 0.0, 2.0, 5.0, 4.0, 9.0, math.nan])
    group = torch.tensor([0, 1, 0, 1, 0, 2, 0])
    torch.testing.assert_close(
        disagreement(r, group), torch.tensor([2.0, 5.0, 2.0, 5.0, 2.0, math.nan, math.nan]), equal_nan=True
    )


def test_views_look_alike_and_depend_on_the_sample_only():
    images = picture(3)
    view = jittered(images, [5, 6, 7], view=2)
    torch.testing.assert_close(jittered(images[[2, 0]], [7, 5], view=2), view[[2, 0]])
    assert not torch.equal(jittered(images, [5, 6, 7], view=1), view)
    flat = torch.full((1, 3, 32, 32), 0.5)
    assert float((jittered(flat, [0], 1) - flat).abs().max()) <= 0.5 * 0.03 + 1e-6
    clip = images[:, None].expand(-1, 4, -1, -1, -1)
    torch.testing.assert_close(jittered(clip, [5, 6, 7], 2), view[:, None].expand_as(clip))


def test_what_changes_with_a_pixel_is_doubted():
    """Half of the pictures are flat, so that one pixel says the same in every view; the others are noise."""
    images = torch.cat([torch.full((4, 3, 32, 32), 0.5), picture(4)])
    reward = load_reward("uncertain", of=FunctionReward(dot), kappa=2.0)
    mean, u = reward.distribution(made(images)).unbind(1)
    assert float(u[:4].max()) < 0.02 < 0.05 < float(u[4:].min())
    torch.testing.assert_close(score_one("r", reward, made(images)), mean - 2 * u)
    w = reward.confidence(made(images))
    assert float(w.mean()) == pytest.approx(1) and float(w[:4].min()) > 1 > float(w[4:].max())
    order = torch.tensor([6, 1, 3])
    torch.testing.assert_close(reward(made(images).select(order)), (mean - 2 * u)[order])


def test_members_and_their_traits():
    """Brightness and its half: of a picture of brightness b, mean 0.75 b and deviation 0.25 sqrt(2) b."""

    def half(images, prompts):
        return brightness(images, prompts) / 2

    images = picture()
    b = brightness(images, None)
    parts = [FunctionReward(brightness), FunctionReward(half)]
    reward = load_reward("uncertain", of=parts, kind="members")
    torch.testing.assert_close(reward(made(images)), 0.75 * b - 0.25 * math.sqrt(2) * b)
    assert [part.name for part in parts_of(reward)] == ["uncertain", "brightness", "half"]
    with pytest.raises(ValueError, match="wants several"):
        load_reward("uncertain", of=parts[:1], kind="members")


def test_pairs_hold_back_prompts_on_which_samples_disagree():
    images = torch.stack([torch.full((3, 8, 8), value) for value in (0.1, 0.9, 0.5, 0.52)])
    reward = load_reward("uncertain", of=FunctionReward(brightness), kind="pairs", tau=0.5)
    assert reward.traits.arity == "group"
    r, w = reward(made(images, [0, 0, 1, 1])), reward.confidence(made(images, [0, 0, 1, 1]))
    torch.testing.assert_close(r, torch.tensor([0.1 - 0.8, 0.9 - 0.8, 0.5 - 0.02, 0.52 - 0.02]))
    assert float(w[0]) == float(w[1]) < 1 < float(w[2]) == float(w[3])
    assert reward(made(images)).isnan().all()  # alone, nobody disagrees


def test_a_reward_that_says_how_sure_it_is():
    class Gaussian:
        name = "gaussian"

        def __call__(self, samples):
            return torch.zeros(len(samples))

        def distribution(self, samples):
            return torch.tensor([[1.0, 0.5], [2.0, math.nan]])

    reward = load_reward("uncertain", of=Gaussian(), kind="sigma", kappa=3.0)
    torch.testing.assert_close(reward(made(picture(2))), torch.tensor([-0.5, math.nan]), equal_nan=True)
    with pytest.raises(ValueError, match="does not say how sure"):
        load_reward("uncertain", of="brightness", kind="sigma")


def test_gradients_pass_even_where_all_views_agree():
    images = torch.full((2, 3, 16, 16), 0.5).requires_grad_()
    reward = load_reward("uncertain", of=FunctionReward(brightness), kappa=1.0)
    assert reward.traits.differentiable and reward.traits.range == (-math.inf, math.inf)
    spread(torch.stack([brightness(images, None)] * 3, 1))[1].sum().backward(retain_graph=True)
    assert images.grad.abs().sum() == 0
    reward(made(images)).sum().backward()
    assert images.grad.isfinite().all() and float(images.grad.sum()) > 0
    assert load_reward("uncertain", of=FunctionReward(brightness), kappa=0.0).traits.range == (0.0, 1.0)


def test_options_that_cannot_work():
    for options, message in (({"kind": "guess"}, "choose augment"), ({"views": 1}, "at least 2"), ({"tau": 0.0}, "positive")):
        with pytest.raises(ValueError, match=message):
            load_reward("uncertain", of="brightness", **options)
