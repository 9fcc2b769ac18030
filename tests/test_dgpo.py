"""DGPO's loss: hand arithmetic, the released gradient, groups, clipping, runs."""

from __future__ import annotations

import math
from itertools import groupby

import pytest
import torch

from flowrl import Policy, Trainer, load_recipe
from flowrl.batch import Noised
from flowrl.config import ConfigError
from flowrl.train.objectives import DGPO
from tests.objectives import Fixed, finite_difference, make_noised, part_of, short_run
from tests.pipelines import CALL, tiny


def test_value_by_hand():
    """Two groups of two latents 1, noise 0: target -1. v = 0, 1, -1, -1: m = 1, 4, 0, 0. v_ref = 0: m_ref = 1. A = 1, -1, 2, 0:

    s = beta / 2 (1 * 0 - 1 * 3) = -1.5 beta, and beta / 2 * 2 * -1 = -beta. With beta = 2: log(1 + e^-3) / 2 = .024294 and
    log(1 + e^-2) / 2 = .063464. The pulls are .1 * (0 + 1) / 2 and .1 * 1.
    """
    noised = Noised(torch.ones(4, 1), torch.zeros(4, 1), torch.full((4,), 0.5), torch.tensor([7, 7, 3, 3]))
    predict = Fixed(torch.tensor([[0.0], [1.0], [-1.0], [-1.0]]), torch.zeros(4, 1))
    loss = DGPO(beta=2.0, kl=0.1).loss(predict, noised, torch.tensor([1.0, -1.0, 2.0, 0.0]))
    assert loss.values.tolist() == pytest.approx([math.log(1 + math.exp(-3)) / 2, math.log(1 + math.exp(-2)) / 2])
    assert loss.penalty.tolist() == pytest.approx([0.05, 0.1])
    assert loss.metrics["group_weight"].tolist() == pytest.approx([1 / (1 + math.exp(3)), 1 / (1 + math.exp(2))])


def test_at_the_reference():
    """ln 2 / beta for every group, and half the gradient of mean A m."""
    noised = make_noised()
    v_ref, A = torch.randn_like(noised.x0), torch.tensor([1.0, -1.0, 0.5, -2.0])
    v = v_ref.clone().requires_grad_()
    loss = DGPO(beta=50.0).loss(Fixed(v, v_ref), noised, A)
    assert loss.values.tolist() == pytest.approx([math.log(2) / 50] * 2)
    (gradient,) = torch.autograd.grad(loss.values.mean(), v)
    (expected,) = torch.autograd.grad((A * (v - noised.target).square().mean((1, 2))).mean() / 2, v)
    torch.testing.assert_close(gradient, expected)


def test_the_gradient_is_the_released_one():
    """mean over samples of sg[sigma(s_g)] A_i m_i, off the reference, whatever beta is."""
    noised = make_noised(batch=6, group_size=3)
    v_ref, v0 = torch.randn_like(noised.x0), torch.randn_like(noised.x0)
    A = torch.tensor([1.0, -1.0, 0.5, 2.0, -6.0, 0.3])
    for beta in (0.1, 3.0):
        v = v0.clone().requires_grad_()
        (ours,) = torch.autograd.grad(DGPO(beta=beta).loss(Fixed(v, v_ref), noised, A).values.mean(), v)
        m, m_ref = ((w - noised.target).square().mean((1, 2)) for w in (v, v_ref))
        clipped = A.clamp(-5, 5)
        s = (beta * clipped * (m - m_ref)).reshape(2, 3).mean(1).detach().repeat_interleave(3)
        (released,) = torch.autograd.grad((s.sigmoid() * clipped * m).mean(), v)
        torch.testing.assert_close(ours, released, rtol=1e-4, atol=1e-6)


def test_a_learnt_group_stops_to_teach():
    """Good samples nearer, bad ones further than by the reference: the weight of the group falls from 1/2 towards 0."""
    noised = make_noised(batch=4, group_size=4)
    v_ref, A = torch.randn_like(noised.x0), torch.tensor([1.0, -1.0, 1.0, -1.0])
    weights = []
    for step in (0.0, 0.1, 0.3, -0.3):
        v = v_ref + step * A[:, None, None] * (noised.target - v_ref)
        weights.append(float(DGPO(beta=20.0).loss(Fixed(v, v_ref), noised, A).metrics["group_weight"]))
    assert weights[0] == 0.5 and 0.5 > weights[1] > weights[2] and weights[3] > 0.5


def test_gradient_against_finite_differences():
    noised = make_noised()
    v, v_ref, A = torch.randn_like(noised.x0), torch.randn_like(noised.x0), torch.tensor([1.5, -0.5, 1.0, 0.2])
    exact, numeric = finite_difference(lambda w: DGPO(beta=1.5, kl=0.3).loss(Fixed(w, v_ref), noised, A).total, v)
    torch.testing.assert_close(exact, numeric, rtol=1e-2, atol=1e-4)


def test_clipping():
    """Against the slow copy: a good sample that got much nearer, and a bad one that got much further, have no gradient left."""
    noised = make_noised(batch=4, group_size=4, t=0.5)
    v_old = torch.randn_like(noised.x0)
    moved = torch.tensor([0.5, -0.5, -0.5, 0.5])[:, None, None]
    v = (v_old + moved * (noised.target - v_old)).requires_grad_()
    loss = DGPO(epsilon=0.05).loss(Fixed(v, v_old, v_old), noised, torch.tensor([1.0, 1.0, -1.0, -1.0]))
    assert loss.metrics["clip_ratio"].tolist() == [1, 0, 1, 0]
    loss.values.sum().backward()
    assert [bool(g.any()) for g in v.grad] == [False, True, False, True]
    assert DGPO(epsilon=0.05).needs.old and not DGPO().needs.old


def test_groups_may_be_split_and_permuted_but_belong_together():
    noised = make_noised(batch=6, group_size=3)
    v, v_ref = torch.randn_like(noised.x0), torch.randn_like(noised.x0)
    A = torch.tensor([1.0, -1.0, 0.5, 2.0, -2.0, 0.3])
    whole = DGPO().loss(Fixed(v, v_ref), noised, A).total
    for rows, groups in (([3, 4, 5], [1]), ([2, 0, 1, 5, 4, 3], [0, 1])):
        rows = torch.tensor(rows)
        part = DGPO().loss(Fixed(v[rows], v_ref[rows]), part_of(noised, rows), A[rows]).total
        torch.testing.assert_close(part, whole[groups])


@pytest.mark.parametrize(("options", "message"), [({"beta": 0}, "beta=0"), ({"epsilon": -1}, "epsilon=-1")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DGPO(**options)


@pytest.mark.parametrize("shared", [True, False])
def test_a_group_shares_its_time_and_perhaps_its_noise(recipe, tmp_path, shared):
    """Two prompts x 2: per point one time and, if asked, one noise for each prompt, and others for the next."""
    options = [f"output_dir={tmp_path}/run", "objective=dgpo", f"objective.shared_noise={shared}".lower(), "times.name=uniform"]
    trainer = Trainer(load_recipe(recipe, options), policy=Policy(tiny("sd3"), CALL["sd3"]))
    (batch,) = trainer.rollout(0)
    for point, _ in trainer.points(batch):
        same = [torch.equal(point.noise[0], point.noise[1]), torch.equal(point.noise[2], point.noise[3])]
        assert same == [shared, shared] and not torch.equal(point.noise[0], point.noise[2])
        assert len(list(groupby(point.t.tolist()))) == 2 and not torch.equal(point.x[0], point.x[1])


def test_groups_do_not_cross_batches(recipe, tmp_path):
    with pytest.raises(ConfigError, match="a batch holds whole groups; use a multiple of 4"):
        Trainer(load_recipe(recipe, ["objective=dgpo", "num_generations=4", "batch_size=2", f"output_dir={tmp_path}"]))


@pytest.mark.parametrize(("name", "epsilon"), [("sd15", 0), ("sd3", 0.05), ("wan", 0)])
def test_a_run(recipe, tmp_path, name, epsilon):
    """ln 2 / beta at the reference, off it after an update."""
    _, (first, second) = short_run(
        recipe, tmp_path, "objective=dgpo", f"objective.epsilon={epsilon}", "times.count=2", "learning_rate=1e-2", name=name
    )
    assert first["policy_loss"] == pytest.approx(math.log(2) / 100) and first["kl"] == 0
    assert second["policy_loss"] != first["policy_loss"] and second["kl"] > 0
