"""Reward-weighted regression: hand arithmetic, its optimum, invariances, runs on samples and on data."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.batch import Noised, Prompt, Samples
from flowrl.train.objectives import RWR
from tests.objectives import Fixed, finite_difference, make_noised, part_of, short_run


def samples(group):
    n = len(group)
    return Samples([Prompt("a")] * n, list(range(n)), torch.tensor(group), torch.zeros(n, 2))


def test_value_by_hand():
    """Latents 1, noise 0: target -1. v = 1, 0: m = 4, 1, times the weights 1.5 and 0.5; a pull of 2 x (1, 4)."""
    noised = Noised(torch.ones(2, 1), torch.zeros(2, 1), torch.full((2,), 0.5))
    w, v = torch.tensor([1.5, 0.5]), torch.tensor([[1.0], [0.0]])
    loss = RWR().loss(Fixed(v), noised, w)
    assert loss.values.tolist() == [6, 0.5] and loss.metrics["weight"].tolist() == [1.5, 0.5]
    assert not RWR().needs.old and not RWR().needs.reference and loss.penalty is None
    held = RWR(kl=2.0).loss(Fixed(v, torch.tensor([[2.0], [2.0]])), noised, w)
    assert held.penalty is not None and held.penalty.tolist() == [2, 8] and RWR(kl=2.0).needs.reference


def test_weights_by_hand():
    """A = 1, -1 at temperature 2: e^.5 / cosh .5 and e^-.5 / cosh .5. A = 9, 0 clipped at 5: e^2.5, 1 over their mean. A group
    without a difference is left out, a sample by itself weighs 1; where groups are interleaved rows stay in their order."""
    rows, w = RWR(temperature=2.0).choose(samples([7, 3, 7, 3, 5, 5, 8]), torch.tensor([1.0, 9.0, -1.0, 0.0, 0.4, 0.4, 1.0]))
    assert rows.tolist() == [0, 1, 2, 3, 6]
    own, other = math.cosh(0.5), (math.exp(2.5) + 1) / 2
    assert w.tolist() == pytest.approx([math.exp(0.5) / own, math.exp(2.5) / other, math.exp(-0.5) / own, 1 / other, 1])


def test_weights_of_a_group():
    """Of mean 1, whatever is added to A; permuted with the samples; only the best counts at a low temperature, all at a high."""
    A = torch.tensor([1.2, -0.3, 0.1, -1.0])
    of = samples([0, 0, 0, 0])
    w = RWR().choose(of, A)[1]
    assert float(w.mean()) == pytest.approx(1)
    torch.testing.assert_close(RWR().choose(of, A + 2)[1], w)
    torch.testing.assert_close(RWR().choose(of, A.flip(0))[1], w.flip(0))
    rows, w = RWR(temperature=0.005).choose(of, A)
    assert rows.tolist() == [0, 1, 2, 3] and w.tolist() == pytest.approx([4, 0, 0, 0])
    assert RWR(temperature=1e4).choose(of, A)[1].tolist() == pytest.approx([1, 1, 1, 1], abs=1e-3)


def test_its_minimum_is_the_weighted_mean_of_targets():
    """One velocity for two samples in the same place: v* = sum w target / sum w with w = exp(A / temperature)."""
    noised = Noised(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1), torch.full((2,), 0.5))
    A = torch.tensor([1.0, -1.0])
    objective = RWR(temperature=0.5)
    v = ((A / 0.5).softmax(0) * torch.tensor([-1.0, -3.0])).sum().reshape(1, 1).requires_grad_()
    objective.loss(Fixed(v.expand(2, 1)), noised, objective.choose(samples([0, 0]), A)[1]).values.sum().backward()
    assert abs(float(v.grad)) < 1e-5


def test_gradient_against_finite_differences():
    noised = make_noised(batch=2)
    exact, numeric = finite_difference(
        lambda v: RWR().loss(Fixed(v), noised, torch.tensor([1.5, 0.5])).values, torch.randn_like(noised.x0)
    )
    torch.testing.assert_close(exact, numeric, rtol=1e-2, atol=1e-3)


def test_a_batch_may_be_split_and_permuted():
    noised, w = make_noised(), torch.tensor([1.0, 0.2, 0.5, 2.3])
    v = torch.randn_like(noised.x0)
    whole = RWR().loss(Fixed(v), noised, w).values
    for rows in (torch.tensor([2, 3]), torch.tensor([3, 1, 0, 2])):
        torch.testing.assert_close(RWR().loss(Fixed(v[rows]), part_of(noised, rows), w[rows]).values, whole[rows])


def test_bad_options():
    with pytest.raises(ValueError, match="temperature=0"):
        RWR(temperature=0)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_a_run(recipe, tmp_path, name):
    """Two prompts x two samples: all of them, of mean weight 1."""
    _, (first, _) = short_run(recipe, tmp_path, "objective=rwr", "times.count=2", name=name)
    assert first["weight"] == pytest.approx(1.0) and first["rows"] == 4
