"""Advantages: hand arithmetic, invariances, abstaining rewards, silent groups."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.train.advantages import advantages, group_mean_std, normalized, weighted_sum, zero_variance_share

NAN = float("nan")


def test_group_normalisation_by_hand():
    """Rewards 1, 2, 3 | 10, 10, 40. Group 1: mean 2, sample deviation 1 -> -1, 0, 1.

    Group 2: mean 20, deviation sqrt((100 + 100 + 400) / 2) = 17.3205 -> -0.57735, -0.57735, 1.1547.
    """
    rewards = torch.tensor([1.0, 2, 3, 10, 10, 40])
    group = torch.tensor([5, 5, 5, 9, 9, 9])
    expected = torch.tensor([-1, 0, 1, -0.5773503, -0.5773503, 1.1547005])
    assert torch.allclose(normalized(rewards, group), expected, atol=1e-6)
    assert torch.allclose(normalized(rewards, group, "none"), torch.tensor([-1.0, 0, 1, -10, -10, 20]))
    deviation = rewards.std()
    assert torch.allclose(normalized(rewards, group, "batch"), torch.tensor([-1.0, 0, 1, -10, -10, 20]) / deviation)


def test_groups_need_not_be_contiguous_and_large_ids_stay_apart():
    """Two ids that a float32 cannot tell apart are two groups."""
    big = 2**53
    group = torch.tensor([big, big + 1, big, big + 1])
    a = normalized(torch.tensor([0.0, 10, 1, 30]), group)
    assert torch.allclose(a, torch.tensor([-1.0, -1, 1, 1]) / math.sqrt(2))
    with pytest.raises(TypeError, match="int64"):
        group_mean_std(torch.zeros(4), group.float())


def test_abstention_is_masked_and_never_zero():
    """Reward 2 abstains on sample 1: its group mean is over 4 and 8 only, and sample 1 gets reward 1's advantage alone."""
    rewards = torch.tensor([[1.0, 4], [2, NAN], [3, 8]])
    group = torch.zeros(3, dtype=torch.int64)
    mean, std, count = group_mean_std(rewards, group)
    assert mean[0].tolist() == [2.0, 6.0]
    assert count[0].tolist() == [3.0, 2.0]
    assert std[0].tolist() == pytest.approx([1.0, math.sqrt(8)])
    z = normalized(rewards, group)
    assert z[1, 1].isnan()
    a = advantages(rewards, group, aggregation="normalize_then_sum")
    raw = torch.tensor([-1 - 1 / math.sqrt(2), 0.0, 1 + 1 / math.sqrt(2)])
    assert torch.allclose(a, raw / raw.std())


def test_weighted_sum_over_present_rewards():
    """Weights 1 and 3. Both present: 1*2 + 3*4 = 14. Second abstains: 2 * (4 / 1) = 8. None: NaN."""
    values = torch.tensor([[2.0, 4], [2, NAN], [NAN, NAN]])
    assert torch.allclose(weighted_sum(values, torch.tensor([1.0, 3.0])), torch.tensor([14.0, 8.0, NAN]), equal_nan=True)


def test_one_nan_does_not_spread():
    rewards = torch.rand(16, 1)
    rewards[3] = NAN
    group = torch.arange(4).repeat_interleave(4)
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        a = advantages(rewards, group, aggregation=aggregation)
        assert a.isfinite().all()
        assert a[3] == 0 or aggregation == "normalize_then_sum"


def test_flat_groups_have_no_advantage_and_are_counted():
    """A gap of 1e-9 in reward is noise: no advantage of 0.7 comes of it."""
    rewards = torch.tensor([[1.0], [1.0 + 1e-9], [0.0], [1.0]])
    group = torch.tensor([0, 0, 1, 1])
    assert normalized(rewards, group)[:2].abs().max() == 0
    assert zero_variance_share(rewards, group) == 0.5
    assert advantages(torch.ones(4, 1), group, aggregation="normalize_then_sum").abs().max() == 0


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_invariances(aggregation):
    """Shift and scale of a reward change nothing; permuting samples permutes advantages."""
    torch.manual_seed(0)
    rewards, group = torch.rand(12, 1), torch.arange(3).repeat_interleave(4)
    a = advantages(rewards, group, aggregation=aggregation)
    assert torch.allclose(advantages(7 * rewards - 3, group, aggregation=aggregation), a, atol=1e-4)
    order = torch.randperm(12)
    assert torch.allclose(advantages(rewards[order], group[order], aggregation=aggregation), a[order], atol=1e-5)


def test_gdpo_does_not_drown_the_small_reward():
    """Two rewards that disagree, one a thousand times larger: the sum follows the large one, GDPO hears both."""
    rewards = torch.tensor([[0.0, 1000.0], [1.0, 0.0], [0.4, 600.0], [0.6, 400.0]])
    group = torch.zeros(4, dtype=torch.int64)
    assert advantages(rewards, group)[0] > 1
    weighted = advantages(rewards, group, torch.tensor([2.0, 1.0]), "normalize_then_sum")
    assert weighted[1] > 0 > weighted[0]


def test_a_virtual_best_sample_gives_hopeless_groups_a_direction():
    """NGRPO, r_max = 1. Eight zeros: mean 1/9, deviation sqrt((8/81 + 64/81) / 8) = 1/3, so -1/3 each. Eight ones: nothing.

    Zeros and a one, (0, 0, 1) with 1: mean 1/2, deviation sqrt(1/3): -0.866, -0.866, 0.866.
    """
    rewards = torch.tensor([0.0] * 8 + [1.0] * 8 + [0.0, 0.0, 1.0])
    group = torch.tensor([3] * 8 + [4] * 8 + [1] * 3)
    got = normalized(rewards, group, best=torch.tensor(1.0))
    half = math.sqrt(3) / 2
    assert torch.allclose(got, torch.tensor([-1 / 3] * 8 + [0.0] * 8 + [-half, -half, half]), atol=1e-6)
    summed = advantages(torch.stack([rewards, rewards], 1), group, torch.tensor([1.0, 3.0]), best=torch.ones(2))
    assert torch.allclose(summed, got, atol=1e-6)
    both = advantages(rewards[:8, None], group[:8], aggregation="normalize_then_sum", best=torch.ones(1))
    assert bool((both <= 0).all())  # never centred away


def test_a_virtual_best_of_an_unbounded_reward_is_none():
    rewards = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    got = normalized(rewards, group, best=torch.tensor([NAN, 5.0]))
    assert torch.equal(got[:, 0], normalized(rewards, group)[:, 0])
    assert got[:3, 1].mean() < -0.1 and got[3:, 1].mean() < -0.1  # both groups are below what is possible
