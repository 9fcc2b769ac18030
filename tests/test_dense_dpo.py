"""The dense reward view: Plackett-Luce by hand, ties, discount; a run of each family."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from flowrl.config import ConfigError
from flowrl.samplers import DanceSDE
from flowrl.train.objectives import DenseDPO
from flowrl.train.objectives.dense_dpo import order_agreement, plackett_luce
from tests.objectives import Fixed, finite_difference, make_step, short_run
from tests.test_trainer import make

RUN = ["objective={name: dense_dpo, clip: 0.05}", "num_generations=3", "batch_size=6"]


def group_of(batch, size, **where):
    step, v, noise = make_step(batch=batch, **where)
    step.group = torch.arange(batch) // size
    return step, v, noise


def asked(v, v_ref, *steps):
    predict = Fixed(v, v_ref)
    predict.steps = list(steps)
    return predict


def test_plackett_luce_by_hand():
    """Strengths e^z = 1, 2, 3 and the order 2, 3, 1: P = 2/6 * 3/4 = 1/4, however the samples stand. Pairs ordered alike by z:
    (2, 1) and (3, 1) of three."""
    z, A = torch.tensor([[1.0, 2.0, 3.0]]).log(), torch.tensor([[-1.0, 1.0, 0.0]])
    assert plackett_luce(z, A).tolist() == pytest.approx([math.log(4)], rel=1e-6)
    assert plackett_luce(z[:, [2, 0, 1]], A[:, [2, 0, 1]]).tolist() == pytest.approx([math.log(4)], rel=1e-6)
    assert order_agreement(z, A).tolist() == pytest.approx([2 / 3])
    assert plackett_luce(torch.zeros(1, 5), torch.arange(5.0)[None]).tolist() == pytest.approx([math.log(120)], rel=1e-6)


def test_ties_do_not_compete():
    """Two equal ones above a third: each beats that one with probability 2/3 and 3/4 of strengths 2, 3, 1; nothing between
    them. All equal: loss and gradient 0."""
    z = torch.tensor([[2.0, 3.0, 1.0]]).log().requires_grad_()
    assert plackett_luce(z, torch.tensor([[1.0, 1.0, 0.0]])).tolist() == pytest.approx([math.log(3 / 2 * 4 / 3)], rel=1e-6)
    flat = plackett_luce(z, torch.zeros(1, 3))
    assert flat.tolist() == [0]
    assert not torch.autograd.grad(flat.sum(), z)[0].any()
    assert order_agreement(z.detach(), torch.zeros(1, 3)).tolist() == [0.5]


def test_value_and_gradient_at_the_start():
    """ln 3! and ln 3! for two groups of three. The gradient in z of the best is -(1 - 1/3), of the middle one 1/3 - 1/2, of the
    worst 1/3 + 1/2; times C for log p, whose own gradient is J z / (s D)."""
    step, v, noise = group_of(6, 3)
    w = v.clone().requires_grad_()
    A = torch.tensor([0.0, 1.0, -1.0, 3.0, 2.0, 1.0])
    loss = DenseDPO(scale=2.0, clip=0).loss(asked(w, v, step), step, A)
    assert loss.values.tolist() == pytest.approx([math.log(6)] * 2, rel=1e-6)
    assert loss.metrics["implicit_accuracy"].tolist() == [0.5, 0.5]
    (ours,) = torch.autograd.grad(loss.values.sum(), w)
    best, middle, worst = 1 / 3 - 1, 1 / 3 - 1 / 2, 1 / 3 + 1 / 2
    by_rank = torch.tensor([middle, best, worst, best, middle, worst])
    J, s = (f(step.t, step.t_next, step.t_max) for f in (DanceSDE(0.5).velocity_jacobian, DanceSDE(0.5).std))
    torch.testing.assert_close(ours, 2.0 * by_rank[:, None, None] * J * noise / (s * 6), rtol=1e-4, atol=1e-5)


def test_only_the_order_of_rewards_counts():
    """Shift and scale of the advantages, and where the samples of a group stand, change nothing; another order does."""
    step, v, _ = group_of(4, 4)
    v_ref, A = v - 0.1, torch.tensor([0.3, -1.0, 2.0, 0.5])

    def value(A, order=(0, 1, 2, 3)):
        rows = torch.tensor(order)
        return float(DenseDPO(clip=0).loss(asked((v + 0.1)[rows], v_ref[rows], step), step.select(rows), A[rows]).values)

    assert value(A) == value(5 * A + 7) == pytest.approx(value(A, (2, 0, 3, 1)), rel=1e-6)
    assert value(A) != value(-A)


def test_discount_has_mean_one_over_the_trained_steps():
    """gamma = 0.5 at positions 1, 2, 4: weights proportional to 8, 4, 1, so 24/13, 12/13 and 3/13 of the value."""
    step, v, _ = group_of(3, 3)
    steps = [replace(step, index=index) for index in (1, 2, 4)]
    predict, A = asked(v, v, *steps), torch.tensor([0.0, 1.0, 2.0])
    values = [float(DenseDPO(gamma=0.5).loss(predict, at, A).values) for at in steps]
    assert values == pytest.approx([math.log(6) * weight / 13 for weight in (24, 12, 3)], rel=1e-5)


def test_the_clip_stops_what_has_moved_by_more_than_d():
    step, v, _ = group_of(2, 2)
    w = (v + 0.1).requires_grad_()
    (free,) = torch.autograd.grad(DenseDPO(clip=10.0).loss(asked(w, v, step), step, torch.tensor([1.0, 0.0])).values.sum(), w)
    (held,) = torch.autograd.grad(DenseDPO(clip=1e-6).loss(asked(w, v, step), step, torch.tensor([1.0, 0.0])).values.sum(), w)
    assert free.any() and not held.any()


def test_gradient_against_finite_differences():
    step, v, _ = group_of(3, 3)
    objective, A = DenseDPO(scale=3.0, clip=0), torch.tensor([0.0, 2.0, 1.0])
    ours, numeric = finite_difference(lambda w: objective.loss(asked(w, v - 0.1, step), step, A).total, v + 0.05)
    torch.testing.assert_close(ours, numeric, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("name", "transition"), [("sd15", "ddim"), ("sd3", "flow_sde"), ("wan", "cps")])
def test_a_run_of_each_family(recipe, tmp_path, name, transition):
    """Both groups have ln 3! at first, discounted to mean 1 over the two trained steps."""
    _, rows = short_run(recipe, tmp_path, *RUN, f"transition={transition}", name=name, steps=1)
    assert rows[0]["policy_loss"] == pytest.approx(math.log(6), rel=1e-3)


def test_what_is_refused(recipe, tmp_path):
    for options in ({"gamma": 0}, {"gamma": 1.5}, {"scale": 0}, {"clip": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            DenseDPO(**options)
    with pytest.raises(ConfigError, match="a batch holds whole groups"):
        make(recipe, tmp_path, *RUN, "batch_size=2")
    with pytest.raises(ConfigError, match="dense_dpo needs a stochastic sampler"):
        make(recipe, tmp_path, *RUN, "transition={name: flow_sde, noise_level: 0}")
