"""Reward-weighted regression: hand arithmetic, its optimum, invariances, runs on samples and on data."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.batch import Noised
from flowrl.train.objectives import RWR
from tests.objectives import Fixed, finite_difference, make_noised, part_of, short_run


def test_value_by_hand():
    """Latents 1, noise 0: target -1, v = 1: m = 4. A = 1, -1, 9 at temperature 2: 4 e^.5, 4 e^-.5, and 4 e^2.5, clipped at 5."""
    noised = Noised(torch.ones(3, 1), torch.zeros(3, 1), torch.full((3,), 0.5))
    loss = RWR(temperature=2.0).loss(Fixed(torch.ones(3, 1)), noised, torch.tensor([1.0, -1.0, 9.0]))
    assert loss.values.tolist() == pytest.approx([4 * math.exp(x) for x in (0.5, -0.5, 2.5)])
    assert loss.metrics["weight"].tolist() == pytest.approx([math.exp(x) for x in (0.5, -0.5, 2.5)])
    assert not RWR().needs.old and not RWR().needs.reference and loss.penalty is None
    held = RWR(kl=2.0).loss(Fixed(torch.ones(3, 1), torch.tensor([[1.0], [2.0], [4.0]])), noised, torch.zeros(3))
    assert held.penalty is not None and held.penalty.tolist() == [0, 2, 18] and RWR(kl=2.0).needs.reference


def test_its_minimum_is_the_weighted_mean_of_targets():
    """One velocity for two samples in the same place: v* = sum w target / sum w, whatever constant is added to A."""
    noised = Noised(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1), torch.full((2,), 0.5))
    A = torch.tensor([1.0, -1.0])
    weights = (A / 0.5).softmax(0)
    for shift in (0.0, 0.5):
        v = (weights * torch.tensor([-1.0, -3.0])).sum().reshape(1, 1).requires_grad_()
        RWR(temperature=0.5).loss(Fixed(v.expand(2, 1)), noised, A + shift).values.sum().backward()
        assert abs(float(v.grad)) < 1e-5


def test_gradient_against_finite_differences():
    noised = make_noised(batch=2)
    exact, numeric = finite_difference(
        lambda v: RWR(temperature=0.7).loss(Fixed(v), noised, torch.tensor([1.5, -0.5])).values, torch.randn_like(noised.x0)
    )
    torch.testing.assert_close(exact, numeric, rtol=1e-2, atol=1e-3)


def test_a_batch_may_be_split_and_permuted():
    noised, A = make_noised(), torch.tensor([1.0, -1.0, 0.5, 2.0])
    v = torch.randn_like(noised.x0)
    whole = RWR().loss(Fixed(v), noised, A).values
    for rows in (torch.tensor([2, 3]), torch.tensor([3, 1, 0, 2])):
        torch.testing.assert_close(RWR().loss(Fixed(v[rows]), part_of(noised, rows), A[rows]).values, whole[rows])


def test_bad_options():
    with pytest.raises(ValueError, match="temperature=0"):
        RWR(temperature=0)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_a_run(recipe, tmp_path, name):
    """Two prompts x two samples have A = +-sqrt(3) / 2 (variance 1 over the batch): the mean weight is cosh(.866) = 1.399."""
    _, (first, _) = short_run(recipe, tmp_path, "objective=rwr", "times.count=2", name=name)
    assert first["weight"] == pytest.approx(math.cosh(math.sqrt(3) / 2), rel=1e-3)
