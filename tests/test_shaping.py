"""Shapes of reward values, worked by hand; and what a shaped reward says of itself."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.batch import Prompt, Samples
from flowrl.reward_models import load_reward, score
from flowrl.reward_models.base import FunctionReward, RewardError, Traits
from flowrl.reward_models.shaping import Shaped, cap, dither, preference_as_reward, sigmoid, softmin

NAN = math.nan


def samples(values: list[float], group: list[int] | None = None, references: list[list[float]] | None = None) -> Samples:
    """Grey pictures whose brightness is the value."""
    n = len(values)

    def grey(v: list[float]) -> torch.Tensor:
        return torch.tensor(v).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)

    refs = None if references is None else torch.stack([grey(r) for r in references])
    prompts = [Prompt(f"prompt {g}") for g in group or range(n)]
    return Samples(
        prompts, list(range(n)), torch.tensor(group or list(range(n))), torch.zeros(n, 1), grey(values), references=refs
    )


def bright(images, prompts):
    return images.flatten(1).mean(1)


bright.traits = Traits(range=(0.0, 1.0), differentiable=True)


def test_cap_and_sigmoid():
    r = torch.tensor([-1.0, 2.0, NAN], requires_grad=True)
    assert cap(r, 1.0).tolist()[:2] == [-1.0, 1.0] and cap(r, 1.0)[2].isnan()
    cap(r, 1.0)[:2].sum().backward()
    assert r.grad.tolist() == [1.0, 0.0, 0.0]  # above the cap nothing pulls
    assert sigmoid(torch.tensor([0.2, 0.3]), 0.2, 0.1).tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-1))])


def test_preference_as_reward_by_hand():
    """r = 1 against references 1 and 3 with k = 1, scale 2: (sigmoid(0) + sigmoid(-1)) / 2 = (0.5 + 0.26894) / 2."""
    r, ref = torch.tensor([1.0, NAN]), torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    got = preference_as_reward(r, ref, k=1.0, scale=2.0)
    assert got[0] == pytest.approx(0.384471, abs=1e-6) and got[1].isnan()
    one = preference_as_reward(torch.tensor([1.0]), torch.tensor([[NAN, 1.0]]), scale=2.0)
    assert one.item() == 0.5  # a reference that abstains is left out
    tens, hundredths = (preference_as_reward(c * r[:1], c * torch.tensor([[0.0, 3.0]]), k=2.0) for c in (10.0, 0.01))
    assert tens.item() == pytest.approx(hundredths.item(), abs=1e-6)  # measured in deviations of the references


def test_dither_breaks_ties_only_where_the_group_varies():
    r = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, NAN, 0.0])
    group = torch.tensor([7, 7, 7, 8, 8, 8, 9])
    noisy = dither(r, group, torch.arange(1.0, 8.0), std=0.1)
    assert noisy[:3].tolist() == pytest.approx([0.1, 0.2, 1.3])
    assert noisy[3:5].tolist() == [1.0, 1.0] and noisy[5].isnan() and noisy[6] == 0.0


def test_softmin_is_near_the_worst():
    """T = 1, r = (0, 1): weights (e^0, e^-1)/(1 + e^-1): 0.26894."""
    assert softmin(torch.tensor([0.0, 1.0]), 1.0).item() == pytest.approx(0.268941, abs=1e-6)
    assert softmin(torch.tensor([0.2, 0.9, NAN]), 0.01).item() == pytest.approx(0.2, abs=1e-6)
    assert softmin(torch.tensor([[NAN, NAN]]), 1.0).isnan().all()
    assert softmin(torch.tensor([1.0, 2.0, 3.0]), 1e6).item() == pytest.approx(2.0, abs=1e-4)


def test_a_shaped_reward_in_order():
    reward = load_reward(bright, shape=[{"sigmoid": {"center": 0.5, "scale": 0.1}}, {"cap": 0.6}])
    got = reward(samples([0.5, 0.9]))
    assert got.tolist() == pytest.approx([0.5, 0.6])
    assert reward.traits.range == (0.0, 0.6) and reward.traits.differentiable and reward.name == "bright"
    for shape in ("negate", ["negate"], {"negate": True}):
        assert load_reward(bright, shape=shape)(samples([0.25])).tolist() == [-0.25]


def test_against_references_shared_by_the_group():
    seen = []

    def counted(images, prompts):
        seen.append(len(images))
        return bright(images, prompts)

    reward = Shaped(counted, {"par": {"scale": 1.0}})
    given = samples([0.5, 0.1, 0.9], [4, 4, 5], references=[[0.5, 0.5], [0.5, 0.5], [0.4, 0.9]])
    got = score({"par": reward}, given)[:, 0]
    assert seen == [3, 4]  # two groups of two references, each scored once
    expected = [0.5, 1 / (1 + math.exp(0.4)), (1 / (1 + math.exp(-0.5)) + 0.5) / 2]
    assert got.tolist() == pytest.approx(expected, abs=1e-6)
    assert reward.traits.needs == ("images", "references") and reward.traits.range == (0.0, 1.0)
    with pytest.raises(RewardError, match="needs references: it compares with other pictures: say which with `references`"):
        score({"par": reward}, samples([0.5]))


def test_dither_depends_on_the_seed_of_the_sample_alone():
    reward = load_reward(FunctionReward(bright), shape={"dither": 0.1})
    assert reward.traits.arity == "group"
    given = samples([0.0, 1.0, 1.0], [1, 1, 1])
    values = reward(given)
    assert values[1] != values[2]
    torch.testing.assert_close(reward(given.select([2, 0, 1])), values[[2, 0, 1]])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"capp": 1.0}, "shape 'capp'; did you mean cap"),
        ({"cap": None}, "shape cap needs its value"),
        ({"sigmoid": {"centre": 1}}, "shape sigmoid has no option 'centre'; did you mean center"),
        ({"par": {"k": -1}}, "shape par: k=-1 must be positive"),
        ({"dither": "much"}, "shape dither: std='much' is not a number"),
        ({"negate": False}, "shape negate has no options, and got False"),
        ("cap", "shape cap needs its value"),
        (3, "shape=3: a name, {name: options}, or a list of them; names are cap, "),
        ([["cap", 1]], r"shape=\['cap', 1\]: a name"),
        ([], "shape is empty"),
    ],
)
def test_broken_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        load_reward(bright, shape=shape)
