"""InPO: the inversion against a flow in closed form, its noise in place of drawn noise, short runs."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.batch import Noised
from flowrl.train.objectives import DPO, InPO
from flowrl.train.objectives.inpo import inverted
from tests.objectives import Fixed, make_noised, short_run

SIGNS = torch.tensor([1.0, -1.0])


def gaussian_flow(s: float):
    """The exact velocity of data N(0, s^2): E[noise - x0 | x_t] = x (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2)."""

    def velocity(at):
        t = at.t.reshape(-1, 1)
        return at.x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)

    return velocity


def test_inversion_of_a_gaussian():
    """Along the exact flow x_t = x0 sigma_t / s with sigma_t^2 = (1 - t)^2 s^2 + t^2, so noise = x0 (sigma_t / s - 1 + t) / t.
    The Euler inversion comes to it at first order, and noise is finite for small t."""
    s, t = 0.7, torch.tensor([0.9, 0.5, 0.02])
    x0 = torch.tensor([[1.0], [-0.4], [0.3]])
    noised = Noised(x0, torch.zeros(3, 1), t)
    sigma = ((1 - t) ** 2 * s**2 + t**2).sqrt()[:, None]
    exact = x0 * (sigma / s - 1 + t[:, None]) / t[:, None]
    errors = [(inverted(Fixed(gaussian_flow(s)), noised, steps).noise - exact).abs() for steps in (20, 40, 400)]
    assert errors[2].max() < 5e-3
    assert (errors[0][:2] / errors[1][:2]).flatten().tolist() == pytest.approx([2, 2], rel=0.2)
    result = inverted(Fixed(gaussian_flow(s)), noised, 400)
    assert torch.allclose(result.x, x0 * sigma / s, atol=5e-3) and torch.equal(result.x0, x0) and torch.equal(result.t, t)


def test_the_target_is_the_mean_velocity_of_the_way():
    """Two steps by hand at t = .6 with v = x + s: v_0 = x0 + .001 (times start at .001), x = x0 + .3 v_0, v_1 = x + .3."""
    noised = Noised(torch.tensor([[1.0]]), torch.zeros(1, 1), torch.tensor([0.6]))
    result = inverted(Fixed(lambda at: at.x + at.t.reshape(-1, 1)), noised, 2)
    first = 1.001
    second = 1 + 0.3 * first + 0.3
    assert float(result.target) == pytest.approx((first + second) / 2, abs=1e-6)
    assert float(result.x) == pytest.approx(1 + 0.3 * (first + second), abs=1e-6)


def test_the_loss_is_dpos_at_the_inverted_latents():
    """Whatever noise it is handed; without a gradient through the inversion; each picture has a noise of its own."""
    noised = make_noised(4, t=0.6)
    torch.manual_seed(1)
    weight = torch.tensor(0.3, requires_grad=True)
    predict = Fixed(lambda at: weight * at.x, lambda at: 0.5 * at.x)
    A = SIGNS.repeat(2)
    ours = InPO(beta=3.0, inversion_steps=3).loss(predict, noised, A)
    at = inverted(predict, noised, 3)
    expected = DPO(beta=3.0).loss(predict, at, A)
    assert torch.equal(ours.values, expected.values) and not at.noise.requires_grad
    (a,), (b,) = (torch.autograd.grad(loss.values.sum(), weight) for loss in (ours, expected))
    assert torch.equal(a, b) and a != 0
    other = Noised(noised.x0, torch.randn(4, 3, 2), noised.t, noised.group)
    assert torch.equal(InPO(beta=3.0, inversion_steps=3).loss(predict, other, A).values, ours.values)
    assert not torch.equal(at.noise[0], at.noise[1]) and not InPO().needs.shared_noise


def test_at_the_start():
    noised = make_noised(2, t=0.4)
    predict = Fixed(lambda at: torch.sin(at.x), lambda at: torch.sin(at.x))
    loss = InPO().loss(predict, noised, SIGNS)
    assert float(loss.values) == pytest.approx(math.log(2)) and loss.metrics["implicit_accuracy"].tolist() == [0.5]


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_a_run_of_each_family(recipe, tmp_path, name):
    """Online, with times down to .05, where the inversion starts near the picture itself."""
    options = ["objective=inpo", "objective.inversion_steps=2", "objective.beta=100", "times=uniform", "times.low=0.05"]
    _, rows = short_run(recipe, tmp_path, *options, "times.count=2", "learning_rate=1e-2", name=name)
    assert rows[0]["policy_loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[1]["margin"] != 0


def test_bad_options():
    with pytest.raises(ValueError, match="inversion_steps=0: must be positive"):
        InPO(inversion_steps=0)
    with pytest.raises(ValueError, match="beta=0: must be positive"):
        InPO(beta=0)
