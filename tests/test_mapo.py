"""MaPO: hand arithmetic, its transform near 0, gradients, short runs."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.batch import Noised
from flowrl.train.objectives import MaPO
from flowrl.train.objectives.mapo import phi
from tests.objectives import Fixed, finite_difference, make_noised, part_of, short_run

SIGNS = torch.tensor([1.0, -1.0])


def test_the_transform():
    """x / (e^x - 1): 1 at 0 with slope -1/2, 1 / (e - 1) at 1, falling, and smooth where the two forms meet."""
    x = torch.tensor([0.0, 1e-6, 9e-5, 1.1e-4, 1.0, 50.0], requires_grad=True)
    values = phi(x)
    (slopes,) = torch.autograd.grad(values.sum(), x)
    expected = [1, 1 - 5e-7, 1 - 4.5e-5, 1 - 5.5e-5, 1 / (math.e - 1), 50 * math.exp(-50)]
    assert values.tolist() == pytest.approx(expected, abs=2e-7) and (values.diff() <= 0).all()
    assert slopes[:4].tolist() == pytest.approx([-0.5] * 4, abs=1e-3)
    assert float(slopes[4]) == pytest.approx((math.e - 1 - math.e) / (math.e - 1) ** 2, abs=1e-6)


def test_value_by_hand():
    """m = 2 and 4 (targets 0), s = 1/2, T = 10: phi(1) = .581977, phi(2) = .313035, u = 2.68941, so that
    L = 2 + .1 * .065718 = 2.006572. Equal errors: m + beta ln 2. Weighting eps at t = 1/2: m = 1/2 and 1."""
    pair = Noised(torch.ones(2, 1), torch.ones(2, 1), torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64))
    v = torch.tensor([[2.0**0.5], [2.0]])
    loss = MaPO(temperature=10).loss(Fixed(v), pair, SIGNS)
    assert loss.values.tolist() == pytest.approx([2.006572], abs=1e-5)
    assert loss.metrics["margin"].tolist() == pytest.approx([2.0]) and loss.metrics["implicit_accuracy"].tolist() == [1]
    equal = MaPO().loss(Fixed(torch.full((2, 1), 0.7)), pair, SIGNS)
    assert equal.values.tolist() == pytest.approx([0.49 + 0.1 * math.log(2)]) and float(equal.metrics["logit"]) == 0
    eps = MaPO(weighting="eps").loss(Fixed(v), pair, 3 * SIGNS)
    assert eps.metrics["error_loser"].tolist() == pytest.approx([1.0]) and float(eps.values) == pytest.approx(1.5, abs=1e-3)


def test_gradient_against_finite_differences():
    noised = make_noised(4)
    torch.manual_seed(1)
    v, A = torch.randn(4, 3, 2), torch.tensor([1.0, -1.0, 0.5, -0.5])
    objective = MaPO(beta=2.0, temperature=3.0)
    by_graph, numeric = finite_difference(lambda w: objective.loss(Fixed(w), noised, A).values, v)
    assert torch.allclose(by_graph, numeric, rtol=1e-3, atol=2e-4)
    assert by_graph[1::2].abs().max() > 1e-2, "losers have a gradient of their own"


def test_without_a_margin_it_is_supervised_training_on_winners():
    noised = make_noised(4)
    v = torch.randn(4, 3, 2, requires_grad=True)
    MaPO(beta=0).loss(Fixed(v), noised, SIGNS.repeat(2)).values.sum().backward()
    expected = 2 * (v.detach() - noised.target) / 6
    assert torch.allclose(v.grad[0::2], expected[0::2], atol=1e-6) and v.grad[1::2].abs().max() == 0


def test_splitting_a_batch_changes_nothing_and_no_reference_is_asked_for():
    noised = make_noised(6)
    v, A = torch.randn(6, 3, 2), SIGNS.repeat(3)
    predict = Fixed(v)
    whole = MaPO().loss(predict, noised, A).values
    assert set(predict.asked) == {"policy"} and not MaPO().needs.reference
    parts = [MaPO().loss(Fixed(v[rows]), part_of(noised, rows), A[rows]).values for rows in torch.arange(6).split(2)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_a_run_of_each_family(recipe, tmp_path, name):
    options = ["objective=mapo", "num_generations=3", "batch_size=6", "times.count=2", "learning_rate=1e-2"]
    _, metrics = short_run(recipe, tmp_path, *options, name=name)
    assert metrics[0]["rows"] == 4 and metrics[0]["margin"] != 0 and 0 <= metrics[0]["implicit_accuracy"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1}, "beta=-1: must be zero or positive"),
        ({"steepness": 0}, "steepness=0: must be positive"),
        ({"weighting": "snr"}, "weighting='snr': choose one of constant, eps, kl"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MaPO(**options)
