"""CRD's loss: hand arithmetic, its kinship with NFT, centring inside the prompt, runs."""

from __future__ import annotations

import pytest
import torch

from flowrl.batch import Noised
from flowrl.train.objectives import CRD, NFT
from tests.objectives import Fixed, finite_difference, make_noised, part_of, short_run


def test_value_by_hand():
    """One group of two latents 1, noise 0: target -1. v = 1, 0: |v - v*|^2 / w = 4 / 2 = 2 and 1 / 1 = 1. v_old = 2: 9 / 3 = 3.

    R = 1, 2, less the mean 1.5: -.5, .5. A = 1, -1 of A_max = 2: r = .75, .25, less .5: .25, -.25. With beta = 1/2:
    (2 / .5) (.5 * -.5 - .25)^2 = 4 * .25 = 1, for both. Pull to v_ref = 0: .1 * 1 and 0; adaptive: 1e-4 + r (.1 - 1e-4) of it.
    """
    noised = Noised(torch.ones(2, 1), torch.zeros(2, 1), torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64))
    predict = Fixed(torch.tensor([[1.0], [0.0]]), torch.zeros(2, 1), torch.full((2, 1), 2.0))
    A = torch.tensor([1.0, -1.0])
    loss = CRD(beta=0.5, kl=0.1, advantage_clip=2.0).loss(predict, noised, A)
    assert loss.values.tolist() == pytest.approx([1, 1])
    assert loss.metrics["implicit_reward"].tolist() == pytest.approx([1, 2])
    assert loss.penalty.tolist() == pytest.approx([0.1, 0])
    adaptive = CRD(beta=0.5, kl=0.1, advantage_clip=2.0, adaptive_kl=True).loss(predict, noised, A)
    assert adaptive.penalty.tolist() == pytest.approx([1e-4 + 0.75 * (0.1 - 1e-4), 0])


def test_softmax_centres_by_hand():
    """r = 1, 0 at temperature 1 / ln 3: weights 3/4, 1/4 and 1/4, 3/4. R = 0 at the slow copy: the residues are r less .75 and
    less .25: (.0625 + .5625) / 2 = .3125 for the first, the same for the second; times A_max / beta = 5."""
    noised = make_noised(batch=2)
    v = torch.randn_like(noised.x0)
    objective = CRD(kl=0, centre="softmax", temperature=1 / 1.0986122887)
    loss = objective.loss(Fixed(v, None, v), noised, torch.tensor([5.0, -5.0]))
    assert loss.values.tolist() == pytest.approx([1.5625, 1.5625])


def test_on_policy_gradient_is_that_of_nft_over_t():
    """v = v_old, advantages that sum to 0 in each group: the gradient of A |v - v*|^2 / w, and 1 / t times NFT's."""
    noised = make_noised()
    v_old, A = torch.randn_like(noised.x0), torch.tensor([1.5, -1.5, 0.5, -0.5])

    def gradient(objective):
        v = v_old.clone().requires_grad_()
        objective.loss(Fixed(v, None, v_old), noised, A).values.sum().backward()
        return v.grad

    e = noised.target - v_old
    expected = -2 * A[:, None, None] * e / e.abs().mean((1, 2), keepdim=True) / 6
    torch.testing.assert_close(gradient(CRD(kl=0)), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient(CRD(kl=0)) * noised.t[:, None, None], gradient(NFT(kl=0)), rtol=1e-4, atol=1e-6)


def test_the_unknown_constant_of_a_prompt_is_taken_away():
    """Adding to the advantages of one prompt changes nothing (within the clip): also with weights of the mean that follow r."""
    noised = make_noised(batch=6, group_size=3)
    v, v_old = torch.randn_like(noised.x0), torch.randn_like(noised.x0)
    A = torch.tensor([1.0, -1.0, 0.5, 2.0, -2.0, 0.3])
    shift = torch.tensor([0.7, 0.7, 0.7, 0, 0, 0])
    for centre in ("uniform", "softmax"):
        values = [CRD(kl=0, centre=centre).loss(Fixed(v, None, v_old), noised, a).values for a in (A, A + shift)]
        torch.testing.assert_close(*values)


def test_prompts_do_not_mix():
    """A group's loss is the same alone and beside others (a peer centres over the batch: one sample alone has no gradient there);
    its members may change places."""
    noised = make_noised(batch=6, group_size=3)
    v, v_ref, v_old = (torch.randn_like(noised.x0) for _ in range(3))
    A = torch.tensor([1.0, -1.0, 0.5, 2.0, -2.0, 0.3])
    for objective in (CRD(), CRD(centre="softmax", adaptive_kl=True)):
        whole = objective.loss(Fixed(v, v_ref, v_old), noised, A).total
        for rows in (torch.tensor([3, 4, 5]), torch.tensor([2, 0, 1, 5, 4, 3])):
            part = objective.loss(Fixed(v[rows], v_ref[rows], v_old[rows]), part_of(noised, rows), A[rows]).total
            torch.testing.assert_close(part, whole[rows])


def test_a_detached_uniform_centre_loses_nothing():
    """Residues of a group sum to 0, so the gradient that would go through the mean is 0: it may as well be a constant."""
    noised = make_noised(batch=3, group_size=3)
    v0, v_old, A = torch.randn_like(noised.x0), torch.randn_like(noised.x0), torch.tensor([1.0, -1.0, 0.5])
    v = v0.clone().requires_grad_()
    (ours,) = torch.autograd.grad(CRD(kl=0).loss(Fixed(v, None, v_old), noised, A).values.sum(), v)
    w, w_old = ((x.detach() - noised.target).abs().mean((1, 2)) for x in (v, v_old))
    R = (v_old - noised.target).square().mean((1, 2)) / w_old - (v - noised.target).square().mean((1, 2)) / w
    r = 0.5 + A / 10
    (through,) = torch.autograd.grad((5 * ((R - R.mean()) - (r - r.mean())).square()).sum(), v)
    torch.testing.assert_close(ours, through, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("centre", ["uniform", "softmax"])
def test_gradient_against_finite_differences(centre):
    """w is held by moving v only where its mean absolute error stays; the centre of R, a constant, by a group whose members move
    alike (uniform), or is no constant's business (its gradient is 0)."""
    noised = make_noised(batch=2)
    target, A = noised.target, torch.tensor([1.5, -0.5])
    v_old, v_ref = target - 1.0, torch.randn_like(target)
    centre_of_R: list[torch.Tensor] = []

    def value(v):
        v = v - v.mean((1, 2), keepdim=True) + target.mean((1, 2), keepdim=True) - 1.3
        if centre == "uniform":
            return CRD(beta=0.7, kl=0.3).loss(Fixed(v, v_ref, v_old), noised, A).total
        R = 1 - (v - target).square().mean((1, 2)) / 1.3
        weights = torch.stack([(s * (0.5 + A / 10) / 0.1).softmax(0) for s in (1, -1)])
        if not centre_of_R:
            centre_of_R.append((weights * R).sum(1, keepdim=True).detach())
        r = 0.5 + A / 10
        residues = 0.7 * (R - centre_of_R[0]) - (r - (weights * r).sum(1, keepdim=True))
        return 5 / 0.7 * residues.square().mean(0)

    v0 = target - 1.3 + 0.2 * torch.rand_like(target)
    exact, numeric = finite_difference(value, v0)
    torch.testing.assert_close(exact, numeric, rtol=1e-2, atol=1e-3)
    if centre == "softmax":  # and the objective is that function
        v = v0.clone().requires_grad_()
        held = v - v.mean((1, 2), keepdim=True) + target.mean((1, 2), keepdim=True) - 1.3
        values = CRD(beta=0.7, kl=0, centre="softmax").loss(Fixed(held, None, v_old), noised, A).values
        (ours,) = torch.autograd.grad(values.sum(), v)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta": 0}, "beta=0"), ({"kl": -1}, "kl=-1"), ({"centre": "hard"}, "choose one of uniform, softmax")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CRD(**options)


@pytest.mark.parametrize(("name", "guidance"), [("sd15", None), ("sd3", 4.5), ("wan", None)])
def test_a_run(recipe, tmp_path, name, guidance):
    """The implicit reward is 0 at the start, then it is not. A guided reference is not where the policy starts."""
    options = [] if guidance is None else [f"objective.kl_guidance={guidance}"]
    _, (first, second) = short_run(
        recipe, tmp_path, "objective=crd", "times.count=2", "learning_rate=1e-2", "old_decay=[-1,0.5,0.5]", *options, name=name
    )
    assert first["implicit_reward"] == 0 and second["implicit_reward"] != 0
    assert (first["kl"] == 0) == (guidance is None)
