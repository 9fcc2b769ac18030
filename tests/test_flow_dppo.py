"""Flow-DPPO: what the divergence stops and what it does not; hand arithmetic, gradients, a run of each family."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.batch import Step
from flowrl.samplers import CPS, DanceSDE, FlowSDE
from flowrl.train.objectives import FlowDPPO
from tests.objectives import Fixed, finite_difference, make_step, short_run


def kept(transition=None, batch=2):
    step, v, noise = make_step(transition, batch)
    step.v = v
    return step, v, noise


def test_value_by_hand():
    """One latent, Dance with g = 1, t = 0.5, t' = 0.25: s = 0.5, mean = -0.375 v from x = 0. Sampled from v = 0 with z = 1; now
    v = -0.4, so that d = 0.15, m = 0.0225 / 0.5 = 0.045 and rho = 1.29046. Beyond delta = 0.04 a positive A leaves further and
    counts 0, a negative one leads back: 2 * 1.29046. With delta = 0.05 both count.
    """
    x, x_next = torch.zeros(2, 1), torch.full((2, 1), 0.5)
    old = DanceSDE(1.0).transition(x, torch.zeros(2, 1), 0.5, 0.25, 0.9).log_prob(x_next)
    step = Step(x, x_next, 0.5, 0.25, 0.9, old, 0, DanceSDE(1.0), v=torch.zeros(2, 1))
    A = torch.tensor([2.0, -2.0])
    loss = FlowDPPO(delta=0.04).loss(Fixed(torch.full((2, 1), -0.4)), step, A)
    assert loss.metrics["divergence"].tolist() == pytest.approx([0.045] * 2, rel=1e-5)
    assert loss.values.tolist() == pytest.approx([0, 2 * 1.29046], abs=1e-4)
    assert loss.metrics["clip_ratio"].tolist() == [1, 0]
    free = FlowDPPO(delta=0.05).loss(Fixed(torch.full((2, 1), -0.4)), step, A)
    assert free.values.tolist() == pytest.approx([-2 * 1.29046, 2 * 1.29046], abs=1e-4)


@pytest.mark.parametrize("transition", [FlowSDE(0.7), CPS(0.8)])
def test_the_mask_knows_direction_and_distance(transition):
    """Two moves, towards the sampled state and away from it, both beyond delta: of each, only the sign of A that leads back has
    a gradient. The same moves within delta: all have."""
    step, v, noise = kept(transition, batch=4)
    J = transition.velocity_jacobian(step.t, step.t_next, step.t_max)
    side = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None, None]
    A = torch.tensor([1.0, -1.0, 1.0, -1.0])
    moved = (v + 0.05 * side * noise / J).requires_grad_()
    for delta, alive in ((1e-6, [False, True, True, False]), (1.0, [True] * 4)):
        (gradient,) = torch.autograd.grad(FlowDPPO(delta=delta).loss(Fixed(moved), step, A).values.sum(), moved)
        assert (gradient.flatten(1).abs().sum(1) > 0).tolist() == alive


def test_it_goes_by_the_divergence_where_the_ratio_is_noise():
    """One move, the same for all: the divergence is the same number for every sample, while single ratios lie on both sides of
    any clip. Of 2,000 samples either none or all that lead away are stopped."""
    generator = torch.Generator().manual_seed(0)
    x, v, noise = (torch.randn(2000, 6, generator=generator) for _ in range(3))
    law = DanceSDE(0.5).transition(x, v, 0.8, 0.6, 0.95)
    x_next = law.sample(noise)
    step = Step(x, x_next, 0.8, 0.6, 0.95, law.log_prob(x_next), 0, DanceSDE(0.5), v=v)
    moved, A = v + 0.1, torch.ones(2000)
    m = FlowDPPO().loss(Fixed(moved), step, A).metrics["divergence"]
    s = float(torch.as_tensor(law.std).reshape(-1)[0])
    d = 0.1 * float(DanceSDE(0.5).velocity_jacobian(0.8, 0.6, 0.95))
    assert m.tolist() == pytest.approx([d**2 / (2 * s**2)] * 2000, rel=1e-3)
    within = FlowDPPO(delta=1.01 * float(m.max())).loss(Fixed(moved), step, A).metrics["clip_ratio"]
    beyond = FlowDPPO(delta=0.99 * float(m.min())).loss(Fixed(moved), step, A).metrics
    assert within.sum() == 0
    assert torch.equal(beyond["clip_ratio"] > 0, beyond["ratio"] > 1)
    assert 0.3 < float(beyond["clip_ratio"].mean()) < 0.7


def test_on_policy_value_and_gradient():
    """Ratio exactly 1, divergence 0, loss -A, gradient -A J z / (s D), as GRPO's."""
    step, v, noise = kept(FlowSDE(0.7))
    A, w = torch.tensor([1.5, -0.5]), v.clone().requires_grad_()
    loss = FlowDPPO().loss(Fixed(w), step, A)
    assert torch.equal(loss.values.detach(), -A) and not loss.metrics["divergence"].any()
    loss.values.sum().backward()
    J, s = (f(step.t, step.t_next, step.t_max) for f in (FlowSDE(0.7).velocity_jacobian, FlowSDE(0.7).std))
    assert torch.allclose(w.grad, -A[:, None, None] * J * noise / (s * 6), atol=1e-5)


def test_gradient_against_finite_differences():
    step, v, _ = kept(batch=1)
    objective = FlowDPPO(delta=10.0, beta=0.3)
    ours, numeric = finite_difference(lambda w: objective.loss(Fixed(w, v - 0.1), step, torch.tensor([0.7])).total, v + 0.05)
    torch.testing.assert_close(ours, numeric, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("name", "transition"), [("sd15", "ddim"), ("sd3", "flow_sde"), ("wan", "cps")])
def test_a_run_of_each_family(recipe, tmp_path, name, transition):
    """Two updates per rollout: the first sees divergence 0, the second does not."""
    options = ["objective={name: flow_dppo, delta: 1.0e-9}", f"transition={transition}", "updates_per_step=2"]
    _, rows = short_run(recipe, tmp_path, *options, name=name, steps=1)
    assert rows[0]["divergence"] > 0 and math.isfinite(rows[0]["clip_ratio"])
    assert 0 < rows[0]["clip_ratio"] <= 0.5, "only of the second update"


def test_what_is_refused():
    for options in ({"delta": 0}, {"beta": -1}, {"advantage_clip": 0}):
        with pytest.raises(ValueError, match="must be"):
            FlowDPPO(**options)
