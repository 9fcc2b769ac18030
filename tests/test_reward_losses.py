"""Losses and measures of comparisons: hand arithmetic, limits, Monte Carlo."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.train.rewards import losses

NAN = math.nan


def t(*values):
    return torch.tensor(values)


# ------------------------------------------------------------------------------------------------ pairs


def test_bradley_terry_by_hand():
    """-log sigma(1) = 0.313262 when the first is chosen, -log sigma(-1) = 1.313262 when the second; margin 0.57: sigma(0.43)."""
    assert losses.bradley_terry(t(1.0, 1.0), t(1.0, 0.0)).tolist() == pytest.approx([0.313262, 1.313262], abs=1e-5)
    assert float(losses.bradley_terry(t(1.0), t(1.0), margin=0.57)) == pytest.approx(-math.log(1 / (1 + math.exp(-0.43))))
    per_pair = losses.bradley_terry(t(1.0, -1.0), t(1.0, 0.0), margin=t(0.0, 1.0))
    assert per_pair.tolist() == pytest.approx([0.313262, math.log(2)], abs=1e-5)


@pytest.mark.parametrize("label", [0.0, 0.2, 0.5, 1.0])
def test_soft_labels_cost_nothing_where_the_model_says_the_same(label):
    """The loss is KL(label || sigma(d)): 0 at d = logit(label), positive elsewhere; a tie at d = 0 costs 0, not ln 2."""
    d = t(math.log(label / (1 - label))) if 0 < label < 1 else t(60.0 * (2 * label - 1))
    assert float(losses.bradley_terry(d, t(label))) == pytest.approx(0, abs=1e-6)
    assert (losses.bradley_terry(d + t(-1.0, 1.0), t(label, label)) >= -1e-6).all()
    assert float(losses.bradley_terry(t(2.0), t(0.5))) == pytest.approx(-math.log(2 * math.exp(1) / (1 + math.exp(2))), abs=1e-6)


def test_ties_by_hand_and_as_probabilities():
    """k = 5, d = 0: P(first) = 1 / 6 and P(tie) = 24 / 36. Over any d the three probabilities sum to 1, and as the definition
    has it P(first) = e^A / (e^A + k e^B), P(tie) = (k^2 - 1) e^A e^B / ((e^A + k e^B)(k e^A + e^B))."""
    zero = losses.bradley_terry_with_ties(torch.zeros(3), t(1.0, 0.5, 0.0)).neg().exp()
    assert zero.tolist() == pytest.approx([1 / 6, 2 / 3, 1 / 6])
    A, B, k = 0.7, -0.4, 3.0
    a, b = math.exp(A), math.exp(B)
    expected = [a / (a + k * b), (k * k - 1) * a * b / ((a + k * b) * (k * a + b)), b / (b + k * a)]
    got = losses.bradley_terry_with_ties(t(A - B).expand(3), t(1.0, 0.5, 0.0), k).neg().exp()
    assert got.tolist() == pytest.approx(expected) and float(got.sum()) == pytest.approx(1)
    with pytest.raises(ValueError, match="k=1"):
        losses.bradley_terry_with_ties(torch.zeros(1), t(1.0), 1.0)


def test_ties_pull_equal_scores_together():
    d = t(1.5, -1.5).requires_grad_()
    losses.bradley_terry_with_ties(d, t(0.5, 0.5)).sum().backward()
    assert d.grad[0] > 0 > d.grad[1]


def test_triplet_by_hand():
    """On unit vectors |t - i|^2 = 2 - 2 cos, so the loss is relu(2 cos- - 2 cos+ + 0.3): 0.3 at equal cosines, 0 from 0.15 on."""
    torch.manual_seed(0)
    text, good, bad = torch.nn.functional.normalize(torch.randn(3, 8, 16), dim=-1)
    squared = ((text - good).square().sum(-1) - (text - bad).square().sum(-1) + 0.3).relu()
    assert torch.allclose(losses.triplet((text * good).sum(-1), (text * bad).sum(-1)), squared, atol=1e-6)
    assert losses.triplet(t(0.2, 0.4, 0.1), t(0.2, 0.2, 0.2)).tolist() == pytest.approx([0.3, 0, 0.5])


# ------------------------------------------------------------------------------------------------ doubt


def monte_carlo(m, variance, of):
    z = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return of(m + math.sqrt(variance) * z)


@pytest.mark.parametrize(("m", "stds"), [(1.0, (0.3, 0.4)), (1.0, (2**0.5, 2**0.5)), (-2.0, (1.0, 0.2)), (3.0, (2.5, 1.0))])
def test_gaussian_against_monte_carlo(m, stds):
    """expected is E[-log sigma]; marginal is -log E[sigma], to 2 % by the probit; expansion is the former for small variance."""
    mean, log_std, label = t([m, 0.0]), t(list(stds)).log(), t(1.0)
    variance = sum(s * s for s in stds)
    penalised = float(monte_carlo(m, variance, lambda x: torch.nn.functional.softplus(-x).mean()))
    absorbed = float(monte_carlo(m, variance, lambda x: -x.sigmoid().mean().log()))
    assert float(losses.gaussian(mean, log_std, label)) == pytest.approx(penalised, rel=5e-3)
    assert float(losses.gaussian(mean, log_std, label, "marginal")) == pytest.approx(absorbed, rel=0.05)
    if variance < 0.5:
        assert float(losses.gaussian(mean, log_std, label, "expansion")) == pytest.approx(penalised, rel=5e-3)
    assert absorbed < penalised  # Jensen


def test_gaussian_by_hand():
    """m = 1, S^2 = 0.25: expansion softplus(-1) + 0.125 * 0.196612 = 0.337839; S^2 = 4: marginal at 1 / sqrt(1 + pi / 2)."""
    half = math.log(0.5 / 2**0.5)
    assert float(losses.gaussian(t([1.0, 0.0]), t([half, half]), t(1.0), "expansion")) == pytest.approx(0.337839, abs=1e-5)
    two = math.log(2 / 2**0.5)
    expected = math.log1p(math.exp(-1 / math.sqrt(1 + math.pi / 2)))
    assert float(losses.gaussian(t([1.0, 0.0]), t([two, two]), t(1.0), "marginal")) == pytest.approx(expected, abs=1e-5)


def test_doubt_is_punished_or_takes_up_noise():
    """Of a pair that the mean has wrong, the marginal loss wants more variance and the expected one less."""
    for kind, sign in [("expected", 1), ("expansion", 1), ("marginal", -1)]:
        log_std = torch.zeros(1, 2, requires_grad=True)
        losses.gaussian(t([0.0, 2.0]), log_std, t(1.0), kind).sum().backward()
        assert (log_std.grad * sign > 0).all(), kind


def test_gaussian_without_variance_is_bradley_terry_and_knows_no_order():
    mean, small, label = torch.randn(5, 2), torch.full((5, 2), -12.0), t(1.0, 0.0, 1.0, 0.0, 1.0)
    for kind in ("expected", "expansion", "marginal"):
        value = losses.gaussian(mean, small, label, kind)
        assert torch.allclose(value, losses.bradley_terry(mean[:, 0] - mean[:, 1], label), atol=1e-4)
        doubt = torch.randn(5, 2)
        swapped = losses.gaussian(mean.flip(1), doubt.flip(1), 1 - label, kind)
        assert torch.allclose(losses.gaussian(mean, doubt, label, kind), swapped, atol=1e-5)


# ------------------------------------------------------------------------------------------------ lists


def test_ranked_pairs_by_hand():
    """Scores 2, 1, 0 of ranks 1, 3, 1: decided are (0, 1) with d = 2 - 1 and (2, 1) with d = 0 - 1: mean of 0.3133 and 1.3133."""
    assert float(losses.ranked_pairs(t([2.0, 1.0, 0.0]), t([1.0, 3.0, 1.0]))) == pytest.approx(0.813262, abs=1e-5)


def test_plackett_luce_by_hand():
    """Scores ln 3, ln 2, ln 1 in their order: 3/6 * 2/3, over two choices. In the reverse order: 1/6 * 2/5."""
    scores = t([3.0, 2.0, 1.0]).log().expand(2, 3)
    got = losses.plackett_luce(scores, t([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]))
    assert got.tolist() == pytest.approx([-math.log(1 / 3) / 2, -math.log(1 / 15) / 2])
    # ranks 1, 2, 2: one choice, 3 among all; the two tied last ones are no choice
    assert float(losses.plackett_luce(scores[:1], t([1.0, 2.0, 2.0]))) == pytest.approx(math.log(2))
    # ranks 1, 1, 2: both tied ones compete with each other: 3/6 and 2/6
    assert float(losses.plackett_luce(scores[:1], t([1.0, 1.0, 2.0]))) == pytest.approx((math.log(2) + math.log(3)) / 2)


@pytest.mark.parametrize("loss", [losses.ranked_pairs, losses.plackett_luce])
def test_lists_of_two_padding_and_lists_without_order(loss):
    """Two are Bradley-Terry; NaN ranks do not count, in value or gradient; a list of equals costs nothing."""
    scores = torch.randn(4, 2)
    assert torch.allclose(
        loss(scores, t([1.0, 2.0]).expand(4, 2)), losses.bradley_terry(scores[:, 0] - scores[:, 1], torch.ones(4)), atol=1e-6
    )
    long = torch.cat([scores, torch.full((4, 1), 50.0)], 1).requires_grad_()
    value = loss(long, torch.tensor([[1.0, 2.0, NAN]] * 3 + [[1.0, 1.0, NAN]]))
    assert torch.allclose(value[:3], loss(scores, t([1.0, 2.0]).expand(4, 2))[:3], atol=1e-6) and value[3] == 0
    value.sum().backward()
    assert long.grad.isfinite().all() and long.grad[:, 2].abs().max() == 0 and long.grad[3].abs().max() == 0


# ------------------------------------------------------------------------------------------------ measures


def test_accuracy_within_a_prompt():
    """Row 1: both right ones above the wrong one; row 2: the right one above one wrong one, below the other. Rows do not meet."""
    scores, truth = t([1.0, 2.0, 9.0], [5.0, 6.0, 7.0]), t([0.0, 1.0, 1.0], [0.0, 1.0, 0.0])
    assert losses.accuracy_within(scores, truth) == (pytest.approx(3 / 4), 4)


def test_accuracy():
    """Decided pairs: right, wrong, equal scores (a half). The tie does not count."""
    assert losses.accuracy(t(1.0, -2.0, 0.0, 5.0), t(1.0, 1.0, 0.0, 0.5)) == pytest.approx(0.5)
    assert losses.accuracy(t(3.0, -3.0), t(0.8, 0.1)) == 1
    assert math.isnan(losses.accuracy(t(1.0), t(0.5)))
    assert math.isnan(losses.accuracy(t(1.0, math.nan), t(1.0, 1.0)))
    assert losses.accuracy(t(1.0, math.nan), t(1.0, 0.5)) == 1  # what is not decided does not count


def test_tie_calibration_by_hand():
    """Differences 0.1, -0.2, 0.9, 1.5 of a tie, a tie, the first, the second: calling |d| <= 0.2 a tie gets 3 of 4; calling none
    a tie gets 1."""
    d, label = t(0.1, -0.2, 0.9, 1.5), t(0.5, 0.5, 1.0, 0.0)
    value, threshold = losses.accuracy_with_ties(d, label)
    assert value == 0.75 and threshold == pytest.approx(0.2)
    assert losses.accuracy_with_ties(d, label, 0.0)[0] == 0.25
    assert losses.accuracy_with_ties(d, label, 9.0)[0] == 0.5
    assert losses.accuracy_with_ties(t(1.0, -1.0), t(1.0, 0.0)) == (1.0, -1.0)


def test_tie_calibration_is_the_best_threshold():
    torch.manual_seed(1)
    d = torch.randn(200).mul(4).round() / 4  # many equal differences
    label = torch.randint(0, 3, (200,)) / 2
    value, threshold = losses.accuracy_with_ties(d, label)
    every = [losses.accuracy_with_ties(d, label, float(x))[0] for x in [-1, *d.abs().unique()]]
    assert value == max(every) == losses.accuracy_with_ties(d, label, threshold)[0]


def test_calibration_error():
    """Who says 0.75 and is right 3 of 4 times: 0; who says 0.9 and is right 1 of 2 times: 0.4. Ties do not count."""
    assert losses.calibration_error(t(0.75, 0.25, 0.75, 0.75, 0.9), t(1, 0, 1, 0, 0.5)) == pytest.approx(0, abs=1e-6)
    assert losses.calibration_error(t(0.9, 0.9), t(1.0, 0.0)) == pytest.approx(0.4)
    torch.manual_seed(0)
    p = torch.rand(40_000)
    assert losses.calibration_error(p, (torch.rand(40_000) < p).float()) < 0.01


def test_rank_correlation():
    """Of three pairs one is the other way round: tau = 1/3; a list without order is left out."""
    scores, truth = t([3.0, 1.0, 2.0], [1.0, 2.0, 3.0]), t([3.0, 2.0, 1.0], [1.0, 1.0, 1.0])
    assert losses.rank_correlation(scores, truth) == pytest.approx(1 / 3)
    assert math.isnan(losses.rank_correlation(scores[1:], truth[1:]))
