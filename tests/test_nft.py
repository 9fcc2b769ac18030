"""DiffusionNFT's loss: hand arithmetic, where its minimum is, gradients, invariances, runs."""

from __future__ import annotations

import pytest
import torch

from flowrl.batch import Noised
from flowrl.train.objectives import NFT
from tests.objectives import Fixed, finite_difference, make_noised, part_of, short_run


def test_value_by_hand():
    """Latents (1, 3), noise 0, t = 1/2: x_t = (.5, 1.5), target (-1, -3). v_old = 0, v = (1, 1), beta = 1/2, A = 1 of A_max = 2.

    v+ = (.5, .5): x0+ = (.25, 1.25), off by (-.75, -1.75): mean square 1.8125, w = 1.25: 1.45. v- = (-.5, -.5):
    x0- = (.75, 1.75), off by (-.25, -1.25): .8125 / .75 = 1.083333. r = 3/4: L = 2 / .5 (.75 * 1.45 + .25 * 1.083333) =
    5.433333. With v_ref = 0 the pull is .1 * mean (1, 1)^2 = .1. v_old is off by (-.5, -1.5): with its w = 1 for both branches
    L = 4 (.75 * 1.8125 + .25 * .8125) = 6.25, and with w = 1/4 four times that.
    """
    noised = Noised(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), torch.tensor([0.5]))
    predict = Fixed(torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))
    loss = NFT(beta=0.5, kl=0.1, advantage_clip=2.0).loss(predict, noised, torch.tensor([1.0]))
    assert float(loss.values) == pytest.approx(5.433333, abs=1e-5)
    assert float(loss.penalty) == pytest.approx(0.1)
    assert float(loss.metrics["old_deviation"]) == 1 and float(loss.metrics["kl"]) == 1
    assert float(loss.metrics["error"]) == pytest.approx((4 + 16) / 2)
    assert predict.asked == ["reference", "old", "policy"]
    for weight, value in (("old", 6.25), ("velocity", 25.0)):
        of = NFT(beta=0.5, kl=0.1, advantage_clip=2.0, weight=weight).loss(predict, noised, torch.tensor([1.0]))
        assert float(of.values) == pytest.approx(value)


def test_on_policy_the_branches_are_equal_and_pull_apart():
    """v = v_old: whatever A is, the loss is the same (peers' users took that for a bug), and the gradient is that of
    -2 A t^2 / w <e, v>, opposite for opposite advantages."""
    noised = make_noised()
    v_old = torch.randn_like(noised.x0)
    gradients = {}
    for A in (3.0, -3.0, 0.0):
        v = v_old.clone().requires_grad_()
        loss = NFT(kl=0.0).loss(Fixed(v, None, v_old), noised, torch.full((4,), A))
        loss.values.sum().backward()
        gradients[A] = v.grad
        if A == 3.0:
            first = loss.values
        torch.testing.assert_close(loss.values, first)
    t = noised.t[:, None, None]
    e = noised.target - v_old
    w = (t * e).abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(gradients[3.0], -2 * 3.0 * t**2 / w * e / 6, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[3.0], -gradients[-3.0], rtol=1e-4, atol=1e-6)
    assert gradients[0.0].abs().max() < 1e-5


@pytest.mark.parametrize("weight", ["old", "velocity"])
@pytest.mark.parametrize("A", [2.0, -2.0])
def test_the_minimum_in_closed_form(A, weight):
    """With one w for both branches, d = v - v_old = A e / (A_max beta), also for what is to be left; all three weights have the
    same gradient at v_old, up to w."""
    noised = make_noised(t=0.6)
    v_old = torch.randn_like(noised.x0)
    e = noised.target - v_old

    def gradient(scale, weight):
        v = (v_old + scale * A * e).requires_grad_()
        NFT(beta=0.5, kl=0.0, weight=weight).loss(Fixed(v, None, v_old), noised, torch.full((4,), A)).values.sum().backward()
        return v.grad

    at_start = gradient(0.0, weight)
    assert gradient(1 / (5 * 0.5), weight).abs().max() < 1e-5 * at_start.abs().max()
    w = {"old": 1.0, "velocity": (0.6 * e).abs().mean((1, 2), keepdim=True) / 0.36}[weight]
    torch.testing.assert_close(gradient(0.0, "branch") * w, at_start, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("weight", "ends"), [("branch", (1.0, -1.0)), ("old", (0.1, -0.2))])
def test_where_descent_ends(weight, ends):
    """By gradient descent from v_old on one sample with A = .5 and one with A = -1, of A_max = 5, beta = 1: with the released
    weights at v+ = target and v- = target, d = +-e, however small A; with one w at A e / 5."""
    noised = make_noised(batch=2, t=0.6, shape=(64,))
    v_old = torch.randn_like(noised.x0)
    v = v_old.clone().requires_grad_()
    for step in range(200):
        (gradient,) = torch.autograd.grad(
            NFT(kl=0.0, weight=weight).loss(Fixed(v, None, v_old), noised, torch.tensor([0.5, -1.0])).values.sum(), v
        )
        v = (v - (8.0 if step < 100 else 0.5) * gradient).detach().requires_grad_()
    e = noised.target - v_old
    along = ((v.detach() - v_old) * e).sum(1) / e.square().sum(1)
    assert along.tolist() == pytest.approx(ends, abs=0.05)


def test_values_are_affine_in_the_advantage():
    """L(A) = n + A d to 1e-6 within the clip, which lets several rewards share one pass; and constant beyond it."""
    noised = make_noised()
    v, v_old = torch.randn_like(noised.x0), torch.randn_like(noised.x0)

    def at(A):
        return NFT(kl=0.0).loss(Fixed(v, None, v_old), noised, torch.full((4,), float(A))).values.double()

    n, d = at(0), at(1) - at(0)
    for A in (-5.0, -1.7, 0.3, 4.0, 5.0):
        torch.testing.assert_close(at(A), n + A * d, rtol=1e-6, atol=2e-6)
    assert torch.equal(at(9), at(5)) and torch.equal(at(-9), at(-5))
    assert NFT().needs.affine and not NFT(signal="positive").needs.affine


@pytest.mark.parametrize("weight", ["branch", "old", "velocity"])
def test_gradient_against_finite_differences(weight):
    """w+- are constants, of which differences must know nothing: here v_old is off by the same everywhere, and the mean of v is
    held, so that mean |.| does not move."""
    noised = make_noised(batch=2)
    v_old, v_ref, A = noised.target - 1.0, torch.randn_like(noised.x0), torch.tensor([1.5, -0.5])

    def value(v):
        v = v - v.mean((1, 2), keepdim=True) + v_old.mean((1, 2), keepdim=True) + 0.3
        return NFT(beta=0.5, kl=0.3, weight=weight).loss(Fixed(v, v_ref, v_old), noised, A).total

    exact, numeric = finite_difference(value, v_old + 0.3 * torch.rand_like(v_old))
    torch.testing.assert_close(exact, numeric, rtol=1e-2, atol=1e-3)


def test_a_batch_may_be_split_and_its_samples_permuted():
    noised = make_noised()
    v, v_ref, v_old = (torch.randn_like(noised.x0) for _ in range(3))
    A = torch.tensor([1.0, -1.0, 0.5, 2.0])
    whole = NFT().loss(Fixed(v, v_ref, v_old), noised, A).total
    for rows in (torch.tensor([2, 3]), torch.tensor([3, 1, 0, 2])):
        part = NFT().loss(Fixed(v[rows], v_ref[rows], v_old[rows]), part_of(noised, rows), A[rows]).total
        torch.testing.assert_close(part, whole[rows])


def test_signals():
    """positive: a bad sample counts as one of advantage 0; negative: a good one; binary: only the sign counts."""
    noised = make_noised()
    v, v_old = torch.randn_like(noised.x0), torch.randn_like(noised.x0)

    def values(signal, *A):
        return NFT(kl=0.0, signal=signal).loss(Fixed(v, None, v_old), noised, torch.tensor(A)).values

    assert torch.equal(values("positive", 2.0, -2.0, 0.0, -4.0), values("all", 2.0, 0.0, 0.0, 0.0))
    assert torch.equal(values("negative", 2.0, -2.0, 0.0, -4.0), values("all", 0.0, -2.0, 0.0, -4.0))
    assert torch.equal(values("binary", 2.0, -2.0, 0.0, 0.3), values("all", 1.0, -1.0, 0.0, 1.0))


def test_needs():
    assert NFT().needs.old and NFT().needs.reference and NFT().needs.points == "noised"
    assert not NFT(kl=0.0).needs.reference


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta": 0}, "beta=0"), ({"kl": -1}, "kl=-1"), ({"signal": "best"}, "choose one of all, positive")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        NFT(**options)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_a_run(recipe, tmp_path, name):
    """Samples come from `old`, so the first step has deviation 0 from it; with old_decay [0, .5, .5] the second step's is not."""
    _, (first, second) = short_run(
        recipe, tmp_path, "objective=nft", "times.count=2", "old_decay=[-1,0.5,0.5]", "learning_rate=1e-2", name=name
    )
    assert first["old_deviation"] == 0 == first["kl"]
    assert second["old_deviation"] > 0 and second["kl"] > second["old_deviation"]
