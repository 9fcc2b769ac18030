"""Advantages: hand arithmetic, invariances, abstaining rewards, silent groups."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.train.advantages import (
    AGGREGATIONS,
    advantages,
    binding,
    fronts,
    group_mean_std,
    normalized,
    room,
    weighted_sum,
    zero_variance_share,
)

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


def test_gdpo_is_what_trl_computes():
    """TRL's normalize_then_sum: sum_k w_k (r - m_k) / (s_k + 1e-4) in the group, then over the batch the same once more."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(24, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 100.0, 5.0])
    group, weights = torch.arange(24) // 6, torch.tensor([1.0, 0.5, 2.0])
    summed = torch.zeros(24, dtype=torch.float64)
    for rows in torch.arange(24).split(6):
        of = rewards[rows]
        summed[rows] = (weights * (of - of.mean(0)) / (of.std(0) + 1e-4)).sum(1)
    expected = (summed - summed.mean()) / (summed.std() + 1e-4)
    got = advantages(rewards.float(), group, weights, "normalize_then_sum")
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=0)


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


# ------------------------------------------------------------------------------------------------ many rewards as one


def three_groups(K: int, seed: int = 0, abstain: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(24, K) rewards of 3 groups of 8, some of them abstaining."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(24, K, generator=generator)
    if abstain:
        rewards[torch.rand(24, K, generator=generator) < 0.3] = NAN
    return rewards, torch.arange(3).repeat_interleave(8)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("K", [3, 5])
def test_what_holds_for_every_aggregation(aggregation, K):
    """Permuting samples permutes advantages, ties included; permuting rewards changes nothing; a reward that abstains
    everywhere is as good as none; nothing is NaN; who is scored by nothing has no advantage of its own."""
    rewards, group = three_groups(K, abstain=True)
    rewards[:, 0] = (rewards[:, 0] * 3).round()  # ties
    weights = torch.tensor([1.0, 2.0, -0.5, 1.0, 1.0])[:K]
    a = advantages(rewards, group, weights, aggregation)
    assert a.isfinite().all() and a.std() > 0.1
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(advantages(rewards[order], group[order], weights, aggregation), a[order], atol=1e-5)
    others = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(advantages(rewards[:, others], group, weights[others], aggregation), a, atol=1e-5)
    silent = torch.cat([rewards[:, :3], torch.full((24, 1), NAN)], 1)
    if aggregation != "sum_then_normalize":  # where abstentions leave the sum larger, which one reward's scale takes back
        without = advantages(rewards[:, :3], group, weights[:3], aggregation)
        if aggregation != "pareto":
            assert torch.allclose(advantages(silent, group, torch.cat([weights[:3], torch.ones(1)]), aggregation), without)
    rewards[5] = NAN
    a = advantages(rewards, group, weights, aggregation)
    assert a.isfinite().all()
    if aggregation not in ("normalize_then_sum", "correlation"):  # these subtract the mean of the batch
        assert a[5] == 0


@pytest.mark.parametrize("aggregation", [name for name in AGGREGATIONS if name != "sum_then_normalize"])
@pytest.mark.parametrize("K", [3, 5])
def test_the_scale_of_one_reward_does_not_matter(aggregation, K):
    """Each is normalised by itself: 1000 r_0 + 7 in place of r_0 changes nothing. The plain sum follows the large one."""
    rewards, group = three_groups(K)
    scaled = rewards * torch.tensor([1000.0, 1, 1, 1, 1])[:K] + torch.tensor([7.0, 0, -3, 0, 0])[:K]
    assert torch.allclose(advantages(scaled, group, None, aggregation), advantages(rewards, group, None, aggregation), atol=1e-3)
    plain = advantages(scaled, group)
    assert torch.corrcoef(torch.stack([plain, normalized(scaled[:, 0], group)]))[0, 1] > 0.999


def test_binding_by_hand():
    """r_1 = 2 r_0: correlation 1. r_2 = -r_0: -1 with both. Of 4 samples, shrunk by 3/4.

    b_0 = (3/4 - 3/4) / 2 = 0 = b_1, b_2 = (-3/4 - 3/4) / 2 = -3/4. A constant reward binds with 1.
    """
    r = torch.tensor([0.0, 1, 5, 2])
    rewards = torch.stack([r, 2 * r, -r], 1)
    assert torch.allclose(binding(rewards), torch.tensor([0.0, 0, -0.75], dtype=torch.float64), atol=1e-6)
    assert binding(torch.stack([r, torch.ones(4)], 1)).tolist() == [0.0, 1.0]
    assert binding(rewards[:2]).tolist() == [0.0, 0.0, 0.0]  # two samples say nothing of a correlation
    assert binding(r.unsqueeze(1)).tolist() == [0.0]


def test_binding_is_over_the_samples_that_both_score():
    """As numpy's correlation of the four samples that both rewards score, shrunk by 3/4."""
    a = torch.tensor([0.1, NAN, 0.7, 0.3, 0.9, 0.2])
    b = torch.tensor([0.2, 0.4, 0.1, NAN, 0.5, 0.9])
    both = ~(a.isnan() | b.isnan())
    expected = torch.corrcoef(torch.stack([a[both], b[both]]))[0, 1] * 3 / 4
    assert binding(torch.stack([a, b], 1)).tolist() == pytest.approx([float(expected)] * 2, abs=1e-6)


def test_correlated_rewards_share_their_weight():
    """Two copies of r and one reward against them: tau 1/2, b = 0, 0, -3/4, so the shares are 1 : 1 : e^1.5 = 4.48.

    With G = 4: A ~ 2 z - 4.48 z < 0 along r, where the plain sum has 2 z - z > 0.
    """
    r = torch.tensor([0.0, 1, 5, 2])
    rewards, group = torch.stack([r, r, -r], 1), torch.zeros(4, dtype=torch.int64)
    z = normalized(r, group)
    assert torch.allclose(advantages(rewards, group, None, "normalize_then_sum"), z, atol=1e-5)
    assert torch.allclose(advantages(rewards, group, None, "correlation"), -z, atol=1e-5)
    soft = advantages(rewards, group, None, "correlation", temperature=100.0)  # nearly equal shares
    assert torch.allclose(soft, z, atol=1e-5)


def test_fronts_by_hand():
    """(3, 1), (1, 3), (2, 2) are in each other's way; (2, 1) is beaten by (3, 1), and (1, 1) by that."""
    values = torch.tensor([[3.0, 1], [1, 3], [2, 2], [2, 1], [1, 1], [2, 2]])
    assert fronts(values).tolist() == [0, 0, 0, 1, 2, 0]
    assert fronts(torch.tensor([[3.0, NAN], [2, 5], [1, 9]])).tolist() == [0, 1, 1]  # compared on what both have
    assert room(values, fronts(values)).tolist() == pytest.approx([1, 1, 2 / 3, 1, 1, 2 / 3])  # 2/2 + 2/2 of the range: 2 / 3


def test_pareto_masks_the_dominated_and_ranks_when_there_are_many():
    """Three rewards: sample 3, worse than sample 0 in all, has advantage 0, not less. Five: the last of the ranks."""
    rewards = torch.tensor([[1.0, 0.9, 0.9], [0.0, 1.0, 0.1], [0.1, 0.0, 1.0], [0.5, 0.4, 0.4]])
    group = torch.zeros(4, dtype=torch.int64)
    a = advantages(rewards, group, None, "pareto")
    raw = normalized(rewards, group).sum(1) * torch.tensor([1.0, 1, 1, 0])
    assert a[3] == 0 and torch.allclose(a, raw / raw.std())
    many = advantages(torch.cat([rewards, rewards[:, :2]], 1), group, None, "pareto")
    assert many[3] == many.min() < -1 and many.sum().abs() < 1e-5


@pytest.mark.parametrize(("K", "share"), [(2, 0.22), (3, 0.40), (4, 0.61), (5, 0.75)])
def test_few_of_many_rewards_dominate(K, share):
    """The share of 16 independent samples on the first front, measured elsewhere as .22, .40, .61, .75."""
    generator = torch.Generator().manual_seed(0)
    found = [float((fronts(torch.rand(16, K, generator=generator)) == 0).float().mean()) for _ in range(150)]
    assert sum(found) / len(found) == pytest.approx(share, abs=0.03)


def test_softmin_by_hand():
    """One group, z = +-0.7071 and -+0.7071 for two rewards that disagree: every sample's minimum is the same, so no advantage.

    Where the third sample is the middle in both, its minimum 0 is the best.
    """
    two = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert advantages(two, torch.zeros(2, dtype=torch.int64), None, "softmin").abs().max() == 0
    three = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    group = torch.zeros(3, dtype=torch.int64)
    low = [-0.5 * math.log((math.exp(2) + math.exp(-2)) / 2)] * 2 + [0.0]
    a = advantages(three, group, None, "softmin")
    assert torch.allclose(a, normalized(torch.tensor(low), group), atol=1e-5) and a[2] == a.max()
    mean = advantages(three, group, torch.tensor([3.0, 1.0]), "softmin", temperature=1e4)
    assert torch.allclose(mean, advantages(three, group, torch.tensor([3.0, 1.0]), "normalize_then_sum"), atol=1e-2)


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="aggregation is one of sum_then_normalize, normalize_then_sum, .* not 'mean'"):
        advantages(torch.rand(4, 2), torch.zeros(4, dtype=torch.int64), None, "mean")
