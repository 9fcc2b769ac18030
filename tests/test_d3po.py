"""D3PO: pairs of trajectories, value ln 2 at the start, direction, saturation; a run of each family."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.batch import Step
from flowrl.config import ConfigError
from flowrl.samplers import DanceSDE, FlowSDE
from flowrl.train import trainer as loop
from flowrl.train.objectives import D3PO
from tests.objectives import Fixed, finite_difference, make_step, short_run
from tests.test_trainer import make

PAIR = torch.tensor([1.0, -1.0])
RUN = ["objective=d3po", "num_generations=3", "batch_size=6"]


def test_value_by_hand():
    """One latent, Dance with g = 1, t = 0.5, t' = 0.25: s = 0.5, mean = -0.375 v from x = 0. Better: x' = 0.5, worse: x' = -0.5.
    Reference at v = 0, policy at v = -0.4 (mean 0.15): log rho = (0.25 - 0.1225) / 0.5 = 0.255 for the better one and
    (0.25 - 0.4225) / 0.5 = -0.345 for the worse. u = 2 * 0.6 = 1.2, L = log(1 + e^-1.2) = 0.26328. With clip 0.1 the logs are
    held at log 1.1 and log 0.9: u = 2 * 0.20067, L = 0.51257.
    """
    x, x_next = torch.zeros(2, 1), torch.tensor([[0.5], [-0.5]])
    step = Step(x, x_next, 0.5, 0.25, 0.9, torch.zeros(2), 0, DanceSDE(1.0))
    predict = Fixed(torch.full((2, 1), -0.4), torch.zeros(2, 1))
    loss = D3PO(beta=2.0).loss(predict, step, PAIR)
    assert loss.values.tolist() == pytest.approx([math.log1p(math.exp(-1.2))], rel=1e-5)
    assert float(loss.metrics["log_ratio_better"]) == pytest.approx(0.255, rel=1e-5)
    assert float(loss.metrics["log_ratio_worse"]) == pytest.approx(-0.345, rel=1e-5)
    assert loss.metrics["implicit_accuracy"].tolist() == [1]
    clipped = D3PO(beta=2.0, clip=0.1).loss(predict, step, PAIR)
    assert clipped.values.tolist() == pytest.approx([math.log1p(math.exp(-2 * math.log(1.1 / 0.9)))], rel=1e-5)


def test_at_the_start_and_swapped_labels():
    """ln 2 for every pair; the gradient is -beta / 2 (J z / (s D)) for the better sample, the opposite for the worse one, and
    changes sign with the labels."""
    step, v, noise = make_step(FlowSDE(0.7), batch=4)
    w = v.clone().requires_grad_()
    loss = D3PO(beta=30.0).loss(Fixed(w, v), step, PAIR.repeat(2))
    assert loss.values.tolist() == pytest.approx([math.log(2)] * 2) and loss.metrics["implicit_accuracy"].tolist() == [0.5, 0.5]
    (ours,) = torch.autograd.grad(loss.values.sum(), w)
    J, s = (f(step.t, step.t_next, step.t_max) for f in (FlowSDE(0.7).velocity_jacobian, FlowSDE(0.7).std))
    sign = torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None, None]
    torch.testing.assert_close(ours, sign * 30 / 2 * J * noise / (s * 6), rtol=1e-4, atol=1e-5)
    swapped = torch.tensor([1, 0, 3, 2])
    other = D3PO(beta=30.0).loss(Fixed(w[swapped], v[swapped]), step.select(swapped), PAIR.repeat(2)).values.sum()
    torch.testing.assert_close(torch.autograd.grad(other, w)[0], -ours, rtol=1e-4, atol=1e-6)


def test_beta_says_where_a_pair_stops_to_teach_and_a_clip_of_a_tenth_that_nothing_does():
    """The released beta and clip, 0.1 each: however far the policy went, the loss stays within 0.011 of ln 2. Ours falls."""
    step, v, noise = make_step(batch=2)
    J = step.transition.velocity_jacobian(step.t, step.t_next, step.t_max)
    far = v + torch.tensor([1.0, -1.0])[:, None, None] * noise / J  # means half a noise towards the better, away from the worse
    assert abs(float(D3PO(beta=0.1, clip=0.1).loss(Fixed(far, v), step, PAIR).values) - math.log(2)) < 0.011
    assert float(D3PO(beta=10.0).loss(Fixed(far, v), step, PAIR).values) < 0.01


def test_gradient_against_finite_differences():
    step, v, _ = make_step(batch=2)
    ours, numeric = finite_difference(lambda w: D3PO(beta=5.0).loss(Fixed(w, v - 0.1), step, PAIR).total, v + 0.05)
    torch.testing.assert_close(ours, numeric, rtol=2e-2, atol=1e-3)


def test_splitting_a_batch_between_pairs_changes_nothing():
    step, v, _ = make_step(batch=4)
    whole = D3PO(beta=5.0).loss(Fixed(v + 0.1, v), step, PAIR.repeat(2)).values
    for n, rows in enumerate((torch.tensor([0, 1]), torch.tensor([2, 3]))):
        part = D3PO(beta=5.0).loss(Fixed(v[rows] + 0.1, v[rows]), step.select(rows), PAIR).values
        assert torch.allclose(part, whole[n : n + 1], atol=1e-6)


@pytest.mark.parametrize(("name", "transition"), [("sd15", "ddim"), ("sd3", "flow_sde"), ("wan", "cps")])
def test_a_run_of_each_family(recipe, tmp_path, name, transition):
    """Of each group of three, from one start, the best and the worst; ln 2 at first."""
    _, rows = short_run(recipe, tmp_path, *RUN, f"transition={transition}", "branches=[3]", name=name, steps=1)
    assert rows[0]["rows"] == 4 and rows[0]["policy_loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_a_step_makes_the_same_pairs_better_ordered(recipe, tmp_path):
    trainer = make(recipe, tmp_path, *RUN, "learning_rate=1e-4", "objective.beta=100")
    batches, _, _, advantage, _ = trainer.collect(loop._Clock())
    first = trainer.update(batches, advantage)
    again = trainer.update(batches, advantage)
    assert first["implicit_accuracy"] == 0.5 and again["implicit_accuracy"] == 1
    assert again["policy_loss"] < first["policy_loss"]


def test_what_is_refused(recipe, tmp_path):
    for options in ({"beta": 0}, {"clip": -1}, {"clip": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            D3PO(**options)
    with pytest.raises(ConfigError, match="d3po needs a stochastic sampler"):
        make(recipe, tmp_path, *RUN, "transition={name: ddim, eta: 0}")
    with pytest.raises(ConfigError, match="this objective learns from its own samples"):
        make(recipe, tmp_path, *RUN, f"data={tmp_path}")
