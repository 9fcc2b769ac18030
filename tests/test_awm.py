"""AWM's loss: hand arithmetic, the gradient of A log p, off-policy clipping, runs."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.batch import Noised
from flowrl.train.objectives import AWM, NFT
from flowrl.train.objectives.awm import WEIGHTINGS
from tests.objectives import Fixed, finite_difference, make_noised, part_of, short_run


def test_value_by_hand():
    """Latents 1, noise 0: target -1. v = 1: m = 4; v_old = 0: m_old = 1; v_ref = 2. t = 1/2, weighting t, ratio old:

    lp = -2, lp_old = -.5, rho = exp(-1.5) = .22313. A = 5 and -5 of A_max = 5 are rescaled to 1 and -1. With epsilon .2:
    max(-.22313, -.8) = -.22313 and max(.22313, .8) = .8. Pull: .1 * 1 + .5 * 1 = .6.
    """
    noised = Noised(torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([0.5, 0.5]))
    predict = Fixed(torch.ones(2, 1), torch.full((2, 1), 2.0), torch.zeros(2, 1))
    objective = AWM(weighting="t", ratio="old", epsilon=0.2, beta=0.1, old_beta=0.5)
    loss = objective.loss(predict, noised, torch.tensor([5.0, -5.0]))
    assert loss.values.tolist() == pytest.approx([-math.exp(-1.5), 0.8])
    assert loss.penalty.tolist() == pytest.approx([0.6, 0.6])
    assert loss.metrics["clip_ratio"].tolist() == [1, 1]
    assert loss.metrics["kl"].tolist() == [1, 1] == loss.metrics["old_deviation"].tolist()


def test_weightings_by_hand():
    """m = 16, t = 1/2: m, t m, t^2 m, t sqrt m, 4 t m^(1/4); all 0 at m = 0, where the slope of the roots is finite."""
    m, t = torch.tensor([16.0]), torch.tensor([0.5])
    values = {name: float(W(m, t)) for name, W in WEIGHTINGS.items()}
    assert values == pytest.approx({"uniform": 16, "t": 8, "t2": 4, "huber": 2, "ghuber": 4}, abs=0.01)
    for W in WEIGHTINGS.values():
        zero = torch.zeros(1, requires_grad=True)
        value = W(zero, t)
        value.sum().backward()
        assert float(value.detach()) == 0 and zero.grad.isfinite().all() and float(zero.grad) > 0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_on_policy_ratio_and_gradient(weighting):
    """Its own ratio is 1 to the bit and the loss -A, wherever v is; the gradient is that of A W(m, t)."""
    noised = make_noised()
    A = torch.tensor([1.5, -0.5, 5.0, -9.0])
    v = torch.randn_like(noised.x0).requires_grad_()
    loss = AWM(weighting=weighting, beta=0, old_beta=0).loss(Fixed(v), noised, A)
    assert torch.equal(loss.metrics["ratio"], torch.ones(4))
    assert torch.equal(loss.values.detach(), -A.clamp(-5, 5) / 5)
    (gradient,) = torch.autograd.grad(loss.values.sum(), v)
    m = (v - noised.target).square().mean((1, 2))
    (expected,) = torch.autograd.grad((A.clamp(-5, 5) / 5 * WEIGHTINGS[weighting](m, noised.t)).sum(), v)
    torch.testing.assert_close(gradient, expected)


def test_it_pulls_as_nft_does_and_bends_the_other_way_for_bad_samples():
    """At v_old, the gradient of AWM (uniform, A whole) is 1 / w times NFT's own; along it, NFT's loss of a bad sample curves
    up, AWM's down: nothing but the KL terms ends its flight."""
    noised = make_noised(t=0.6)
    v_old = torch.randn_like(noised.x0)
    A = torch.tensor([2.0, -2.0, 1.0, -1.0])
    e = noised.target - v_old

    def gradient(objective, scale):
        v = (v_old + scale * A[:, None, None] * e).requires_grad_()
        objective.loss(Fixed(v, None, v_old), noised, A).values.sum().backward()
        return v.grad.flatten(1)

    awm = AWM(weighting="uniform", advantage_max=5.0, beta=0, old_beta=0)
    nft = NFT(kl=0, weight="velocity")
    torch.testing.assert_close(gradient(awm, 0), gradient(nft, 0), rtol=1e-4, atol=1e-6)
    curvatures = [((gradient(o, 0.1) - gradient(o, 0)) * (A[:, None, None] * e).flatten(1)).sum(1) for o in (awm, nft)]
    assert (curvatures[0].sign() == A.sign()).all() and (curvatures[1] > 0).all()


def test_off_policy_clipping_stops_the_gradient_on_one_side_only():
    """v nearer to the target than v_old: ratio > 1 + epsilon. Good samples have got what they may; bad ones still push back."""
    noised = make_noised(batch=2, t=0.5)
    v_old = torch.randn_like(noised.x0)
    v = (v_old + 0.5 * (noised.target - v_old)).requires_grad_()
    loss = AWM(weighting="uniform", ratio="old", epsilon=0.01, beta=0, old_beta=0).loss(
        Fixed(v, None, v_old), noised, torch.tensor([1.0, -1.0])
    )
    assert (loss.metrics["ratio"] > 1.01).all()
    loss.values.sum().backward()
    assert v.grad[0].abs().max() == 0 and v.grad[1].abs().max() > 0


@pytest.mark.parametrize("weighting", ["t2", "ghuber"])
def test_gradient_against_finite_differences(weighting):
    noised = make_noised(batch=2)
    v, v_ref, v_old = (torch.randn_like(noised.x0) for _ in range(3))
    objective = AWM(weighting=weighting, ratio="old", epsilon=9.0, beta=0.3, old_beta=0.7)
    exact, numeric = finite_difference(
        lambda w: objective.loss(Fixed(w, v_ref, v_old), noised, torch.tensor([1.5, -0.5])).total, v
    )
    torch.testing.assert_close(exact, numeric, rtol=1e-2, atol=1e-4)


def test_values_are_linear_in_the_advantage_and_a_batch_may_be_split():
    noised = make_noised()
    v, v_old = torch.randn_like(noised.x0), torch.randn_like(noised.x0)
    A = torch.tensor([1.0, -1.0, 0.5, 2.0])

    def gradient(A, rows):
        w = v[rows].clone().requires_grad_()
        AWM(beta=0).loss(Fixed(w, None, v_old[rows]), part_of(noised, rows), A[rows]).values.sum().backward()
        return w.grad

    every = torch.arange(4)
    torch.testing.assert_close(gradient(3 * A - 1, every), 3 * gradient(A, every) - gradient(torch.ones(4), every))
    torch.testing.assert_close(gradient(A, every[2:]), gradient(A, every)[2:])
    assert AWM().needs.affine and not AWM(ratio="old").needs.affine


def test_only_what_is_needed_is_asked_for():
    noised = make_noised()
    predict = Fixed(torch.randn_like(noised.x0))
    assert AWM(beta=0, old_beta=0).loss(predict, noised, torch.ones(4)).penalty.tolist() == [0] * 4
    assert not AWM(beta=0, old_beta=0).needs.old and AWM(old_beta=0, ratio="old").needs.old and AWM().needs.reference


@pytest.mark.parametrize(
    ("options", "message"),
    [({"epsilon": 0}, "epsilon=0"), ({"old_beta": -1}, "old_beta=-1"), ({"weighting": "snr"}, "choose one of uniform, t, t2")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AWM(**options)


@pytest.mark.parametrize(("name", "ratio"), [("sd15", "own"), ("sd3", "old"), ("wan", "own")])
def test_a_run(recipe, tmp_path, name, ratio):
    """With two updates per step the second one's ratio to the copy that sampled is off 1; its own is 1 to the bit."""
    _, rows = short_run(
        recipe, tmp_path, "objective=awm", f"objective.ratio={ratio}", "times.count=2", "updates_per_step=2",
        "batch_size=2", "learning_rate=1e-2", name=name,
    )  # fmt: skip
    assert (rows[0]["ratio"] != 1) == (ratio == "old") and rows[0]["old_deviation"] > 0
