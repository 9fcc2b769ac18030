"""KTO: hand arithmetic, its baseline, gradients, labels from signs, short runs."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.batch import Noised
from flowrl.train.objectives import KTO
from tests.objectives import Fixed, finite_difference, make_noised, part_of, short_run


def rows(count: int, t: float = 0.5) -> Noised:
    """One latent each, target 0."""
    return Noised(torch.ones(count, 1), torch.ones(count, 1), torch.full((count,), t), torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({}, [1 - 0.622459, 1 - 0.622459]),
        ({"utility": "averse"}, [1.474077, 1.474077]),  # 1 - log sigmoid(1/2)
        ({"utility": "seeking"}, [0.025923, 0.025923]),  # 1 + log sigmoid(-1/2)
        ({"weighting": "eps"}, [1 - 0.531209, 1 - 0.531209]),  # z = 1/8
        ({"desirable_weight": 2.0, "undesirable_weight": 0.0}, [2 * (1 - 0.622459), 0]),
        ({"weighted": True}, [2 * (1 - 0.622459), 0.5 * (1 - 0.622459)]),
    ],
)
def test_value_by_hand(options, values):
    """v = .1 and .3, reference .2: g = .04 - .01 = .03 and .04 - .09 = -.05, whose mean is below 0, so Q0 = 0. The good row with
    beta = 50/3 has z = 1/2; so has the bad one, with beta = 10: each row is asked for by a loss of its own."""
    predict, A = Fixed(torch.tensor([[0.1], [0.3]]), torch.full((2, 1), 0.2)), torch.tensor([2.0, -0.5])
    for row, beta in ((0, 50 / 3), (1, 10)):
        loss = KTO(beta=beta, **options).loss(predict, rows(2), A)
        assert float(loss.values[row]) == pytest.approx(values[row], abs=1e-6)
    assert loss.metrics["baseline"] == 0 and loss.metrics["desirable"].tolist() == [1, 0]
    assert loss.metrics["change"].tolist() == pytest.approx([v * (0.25 if "weighting" in options else 1) for v in (-0.03, 0.05)])
    assert loss.metrics["implicit_accuracy"].tolist() == [1, 1]


def test_the_baseline_is_the_mean_gain_and_has_no_gradient():
    """Where the policy fits every row better than the reference, z counts from the mean gain: .03 and .04 against .035."""
    v = torch.tensor([[0.1], [0.0]], requires_grad=True)
    loss = KTO(beta=100).loss(Fixed(v, torch.full((2, 1), 0.2)), rows(2), torch.ones(2))
    assert loss.metrics["baseline"] == pytest.approx(0.035)
    assert loss.values.tolist() == pytest.approx([1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.5))])
    loss.values[0].backward()
    assert v.grad[1].abs().max() == 0, "through the baseline, the other row would get a gradient"
    s = 1 / (1 + math.exp(0.5))
    assert float(v.grad[0]) == pytest.approx(100 * s * (1 - s) * 2 * 0.1, rel=1e-4)


def test_at_the_start():
    """Policy = reference: 1/2 each; the other label gives the opposite gradient, to the bit; A = 0 gives nothing at all."""
    noised = make_noised(3, t=0.4)
    torch.manual_seed(1)
    start = torch.randn(3, 3, 2)

    def gradient(A):
        v = start.clone().requires_grad_()
        loss = KTO(beta=8.0).loss(Fixed(v, start), noised, torch.tensor(A))
        assert loss.values.tolist() == [0.5 * (a != 0) for a in A]
        loss.values.sum().backward()
        return v.grad

    good, bad = gradient([1.0, 2.0, 0.0]), gradient([-1.0, -0.3, 0.0])
    assert torch.equal(good, -bad) and good[:2].abs().max() > 0 and good[2].abs().max() == 0


@pytest.mark.parametrize("utility", ["sigmoid", "averse", "seeking"])
def test_gradient_against_finite_differences(utility):
    """With a baseline of 0 on both sides of the difference, since it is held fixed: the policy is worse on the whole."""
    noised = make_noised(4)
    torch.manual_seed(1)
    v, A = noised.target + torch.randn(4, 3, 2), torch.tensor([1.0, -1.0, 0.5, -0.5])
    objective = KTO(beta=0.5, utility=utility, desirable_weight=2.0, weighted=True)
    predict = Fixed(v, noised.target + 0.1)
    assert objective.loss(predict, noised, A).metrics["baseline"] == 0
    by_graph, numeric = finite_difference(lambda w: objective.loss(Fixed(w, noised.target + 0.1), noised, A).values, v)
    assert torch.allclose(by_graph, numeric, rtol=1e-3, atol=2e-4) and by_graph.abs().max() > 1e-2


def test_only_signs_count_and_order_does_not():
    noised = make_noised(4)
    torch.manual_seed(1)
    v, v_ref, A = torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.tensor([1.0, -1.0, 0.5, -0.5])
    values = KTO(beta=1.0).loss(Fixed(v, v_ref), noised, A).values
    assert torch.equal(values, KTO(beta=1.0).loss(Fixed(v, v_ref), noised, 7 * A).values)
    order = torch.tensor([2, 0, 3, 1])
    turned = KTO(beta=1.0).loss(Fixed(v[order], v_ref[order]), part_of(noised, order), A[order]).values
    assert torch.allclose(turned, values[order], atol=1e-6)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_a_run_of_each_family(recipe, tmp_path, name):
    """Half of each group is good; the first step is at 1/2 with baseline 0; all rows are trained on."""
    options = ["objective=kto", "times=uniform", "times.count=2", "learning_rate=1e-2"]
    _, metrics = short_run(recipe, tmp_path, *options, name=name)
    assert metrics[0]["policy_loss"] == 0.5 and metrics[0]["baseline"] == 0 and metrics[0]["desirable"] == 0.5
    assert metrics[1]["policy_loss"] != 0.5 and "rows" not in metrics[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta=0: must be positive"),
        ({"utility": "risky"}, "utility='risky': choose one of sigmoid, averse, seeking"),
        ({"desirable_weight": -1}, "desirable_weight=-1: must be zero or positive"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        KTO(**options)
