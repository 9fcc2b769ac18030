"""Win rates inside a group: hand arithmetic, what they must be invariant to, and what they do to an illusory advantage."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flowrl.batch import Prompt, Samples
from flowrl.reward_models.base import load_reward, score
from flowrl.reward_models.win_rate import WinRate, bradley_terry, coin, schedule, soft_wins, win_rate

NAN = math.nan


def samples(values: list[float], group: list[int]) -> Samples:
    """Pictures whose brightness is the value."""
    images = torch.tensor(values)[:, None, None, None].expand(-1, 3, 2, 2).clone()
    prompts = [Prompt(f"prompt {g}") for g in group]
    return Samples(prompts, list(range(len(values))), torch.tensor(group), torch.zeros(len(values), 1), images)


def test_hand():
    """Scores 1, 3, 3: w_01 = w_02 = 0, w_12 = 1/2. r = (0 + 0)/2, (1 + 1/2)/2, the same."""
    wins = soft_wins(torch.tensor([1.0, 3.0, 3.0]))
    assert torch.equal(wins.nan_to_num(-1), torch.tensor([[-1.0, 0, 0], [1, -1, 0.5], [1, 0.5, -1]]))
    assert torch.equal(win_rate(wins), torch.tensor([0.0, 0.75, 0.75]))
    assert soft_wins(torch.tensor([0.0, 1.0]), 0.5)[1, 0].item() == pytest.approx(1 / (1 + math.exp(-2)))


def test_the_illusory_advantage():
    """Scores .8200 ... .8207: divided by their deviation they are advantages of +-1.43 (+-1.53 with the population's); with 0.01
    added to it +-0.034. Soft wins at tau = 0.01 are 1/2 +- 0.01: sigmoid(x) is 1/2 + x/4, the best leads by 4e-4 on average."""
    scores = 0.82 + torch.arange(8, dtype=torch.float64) * 1e-4
    centred = scores - scores.mean()
    assert (centred / scores.std())[-1].item() == pytest.approx(1.4289, abs=1e-4)
    assert (centred / scores.std(correction=0))[-1].item() == pytest.approx(1.5275, abs=1e-4)
    assert (centred / (scores.std() + 0.01))[-1].item() == pytest.approx(0.0342, abs=1e-4)
    soft = win_rate(soft_wins(scores, 0.01))
    assert soft[-1].item() == pytest.approx(0.5 + 4e-4 / 0.01 / 4, abs=1e-5)
    assert torch.equal(win_rate(soft_wins(scores)), torch.arange(8).double() / 7)  # plain wins know the order and nothing else


@pytest.mark.parametrize("temperature", [None, 0.1, 3.0])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_what_a_win_rate_must_be(size, temperature):
    torch.manual_seed(size)
    scores = torch.randn(size, dtype=torch.float64)
    scores[-1] = scores[0]  # a tie
    wins = soft_wins(scores, temperature)
    rates = win_rate(wins)
    assert torch.equal(wins.isnan(), torch.eye(size, dtype=torch.bool))
    torch.testing.assert_close(wins.nan_to_num(0.5) + wins.T.nan_to_num(0.5), torch.ones_like(wins))
    assert rates.mean().item() == pytest.approx(0.5, abs=1e-12)
    order = torch.randperm(size)
    torch.testing.assert_close(win_rate(soft_wins(scores[order], temperature)), rates[order])
    padded = torch.cat([scores[:1], torch.tensor([NAN]), scores[1:]])  # somebody who abstains changes nothing for the others
    with_nan = win_rate(soft_wins(padded, temperature))
    assert with_nan[1].isnan()
    torch.testing.assert_close(with_nan[~with_nan.isnan()], rates)
    torch.testing.assert_close(win_rate(soft_wins(scores * 5 + 2, temperature and temperature * 5)), rates)


def test_a_win_rate_keeps_the_gradient_and_keeps_nan_out_of_it():
    scores = torch.tensor([0.1, NAN, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    win_rate(soft_wins(scores, 0.1))[2].backward()
    step = 1e-6
    for i in (0, 2, 3):
        up, down = scores.detach().clone(), scores.detach().clone()
        up[i] += step
        down[i] -= step
        slope = (win_rate(soft_wins(up, 0.1))[2] - win_rate(soft_wins(down, 0.1))[2]) / (2 * step)
        assert scores.grad[i].item() == pytest.approx(slope.item(), abs=1e-6)
    assert scores.grad[1] == 0


def test_bradley_terry_finds_the_strengths_behind_sparse_comparisons():
    """Everybody meets two of seven, and wins as often as the strengths say: these are then the likelihood's maximum."""
    true = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.5, 2.5, -1.5], dtype=torch.float64)
    wins = torch.full((7, 7), NAN, dtype=torch.float64)
    for i, j in schedule([3, 1, 4, 0, 5, 9, 2], opponents=2):
        wins[i, j], wins[j, i] = torch.sigmoid(true[i] - true[j]), torch.sigmoid(true[j] - true[i])
    torch.testing.assert_close(bradley_terry(wins, prior=1e-9), true - true.mean(), atol=1e-5, rtol=0)
    assert win_rate(wins).argsort().tolist() != true.argsort().tolist()  # who only met the strong looks weak


def test_bradley_terry_stays_finite():
    """One beat the other two, who drew; a fourth met nobody. Two players and one game: the derivative of the likelihood in the
    winner's theta = a vanishes where 1 - sigmoid(2a) = prior (sigmoid(a) - 1/2)."""
    wins = torch.tensor([[NAN, 1, 1, NAN], [0, NAN, 0.5, NAN], [0, 0.5, NAN, NAN], [NAN] * 4])
    theta = bradley_terry(wins)
    assert theta[3].isnan() and theta[:3].isfinite().all() and theta[0] > theta[1] == theta[2]
    a = bradley_terry(torch.tensor([[NAN, 1.0], [0.0, NAN]], dtype=torch.float64), prior=0.1)[0]
    assert (1 - torch.sigmoid(2 * a)).item() == pytest.approx(0.1 * (torch.sigmoid(a).item() - 0.5), abs=1e-12)
    assert bradley_terry(torch.full((2, 2), NAN)).isnan().all()


def test_everybody_meets_equally_many():
    for size, opponents in itertools.product(range(1, 10), (None, 1, 2, 3, 4, 5, 8, 20)):
        pairs = schedule(list(range(size)), opponents)
        wanted = size - 1 if opponents is None else min(opponents, size - 1)
        met = [sum(i in pair for pair in pairs) for i in range(size)]
        assert set(met) <= {wanted + (wanted % 2 and size % 2)}, (size, opponents)
        assert len({frozenset(pair) for pair in pairs}) == len(pairs) and all(i != j for i, j in pairs)


def test_who_meets_whom_depends_on_seeds_and_not_on_places():
    seeds = [7, 3, 11, 5, 2]
    by_seed = {frozenset((seeds[i], seeds[j])) for i, j in schedule(seeds, 2)}
    moved = [seeds[i] for i in (4, 0, 3, 1, 2)]
    assert {frozenset((moved[i], moved[j])) for i, j in schedule(moved, 2)} == by_seed
    tosses = [coin(i, j) for i in range(40) for j in range(40)]
    assert 0.45 < sum(tosses) / len(tosses) < 0.55 and tosses == [coin(i, j) for i in range(40) for j in range(40)]


def test_the_reward_compares_within_groups():
    """Groups (.1, .3, .2) and (.9, .8), interleaved, and one alone: the bright group does not beat the dark one."""
    batch = samples([0.1, 0.9, 0.3, 0.8, 0.2, 0.5], [0, 1, 0, 1, 0, 2])
    reward = load_reward("win_rate", of="brightness")
    values = score({"w": reward}, batch)[:, 0]
    assert values[:5].tolist() == [0.0, 1.0, 1.0, 0.0, 0.5] and values[5].isnan()
    assert reward.traits.arity == "group" and reward.traits.range == (0.0, 1.0)


def test_the_reward_lets_the_inner_one_abstain():
    def some(images, prompts):
        return [None if v > 0.75 else v for v in images[:, 0, 0, 0].tolist()]

    values = WinRate(some, temperature=0.1)(samples([0.1, 0.9, 0.3], [0, 0, 0]))
    alone = WinRate(some, temperature=0.1)(samples([0.1, 0.3], [0, 0]))
    assert values[1].isnan() and torch.equal(values[[0, 2]], alone)


def test_the_reward_is_differentiable_where_it_says_so():
    batch = samples([0.1, 0.3], [0, 0])
    batch.images.requires_grad_()
    reward = WinRate({"name": "brightness"}, temperature=0.5)
    reward(batch)[0].backward()
    assert batch.images.grad[0].sum() > 0 > batch.images.grad[1].sum()
    assert not WinRate("brightness").traits.differentiable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "brightness", "temperature": 0}, "temperature=0: a positive difference"),
        ({"of": "brightness", "strength": "elo"}, "strength='elo': choose win_rate or bradley_terry"),
        ({"of": {"name": "win_rate", "of": "brightness"}}, "it compares samples already"),
        ({}, "wants of"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        load_reward("win_rate", **options)
