"""Flow-GRPO's loss: hand arithmetic, gradients, invariances."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.batch import Step
from flowrl.samplers import CPS, DanceSDE, FlowSDE
from flowrl.train.objectives import GRPO
from flowrl.train.objectives.grpo import divergence
from tests.objectives import Fixed, make_step


def test_value_by_hand():
    """One latent, Dance with g = 1, t = 0.5, t' = 0.25: h = 0.25, std = 0.5, and mean = x - h v - (h / 2t)(x + v / 2) with x = 0

    is -0.25 v - 0.125 v = -0.375 v. Sampled from v = 0 with z = 1: x' = 0.5. Now v = -0.4 puts the mean at 0.15:
    log rho = (0.5^2 - 0.35^2) / (2 * 0.25) = 0.255, rho = 1.29046. With epsilon 0.2 and A = 2 the clipped side counts:
    -2 * 1.2 = -2.4; with A = -2 the unclipped one: 2.58092.
    """
    transition = DanceSDE(1.0)
    x, x_next = torch.zeros(2, 1), torch.full((2, 1), 0.5)
    old = transition.transition(x, torch.zeros(2, 1), 0.5, 0.25, 0.9).log_prob(x_next)
    step = Step(x, x_next, 0.5, 0.25, 0.9, old, 0, transition)
    loss = GRPO(epsilon=0.2).loss(Fixed(torch.full((2, 1), -0.4)), step, torch.tensor([2.0, -2.0]))
    assert loss.metrics["ratio"].tolist() == pytest.approx([1.29046] * 2, abs=1e-5)
    assert loss.values.tolist() == pytest.approx([-2.4, 2 * 1.29046], abs=1e-4)
    assert loss.metrics["clip_ratio"].tolist() == [1, 1]


@pytest.mark.parametrize("transition", [FlowSDE(0.7), DanceSDE(0.3), CPS(0.8)])
def test_on_policy_value_and_gradient(transition):
    """Where the policy is still the one that sampled: ratio exactly 1, loss -A, gradient -A J z / (s D)."""
    step, v, noise = make_step(transition)
    A = torch.tensor([1.5, -0.5])
    v = v.clone().requires_grad_()
    loss = GRPO().loss(Fixed(v), step, A)
    assert torch.equal(loss.metrics["ratio"], torch.ones(2))
    assert torch.equal(loss.values.detach(), -A)
    loss.values.sum().backward()
    J = transition.velocity_jacobian(step.t, step.t_next, step.t_max)
    s = transition.std(step.t, step.t_next, step.t_max)
    expected = -A[:, None, None] * J * noise / (s * 6)
    assert torch.allclose(v.grad, expected, atol=1e-5)


def test_gradient_against_finite_differences():
    step, v, _ = make_step(batch=1)
    objective, A = GRPO(epsilon=0.5, beta=0.3), torch.tensor([0.7])
    v0 = (v + 0.05).double()
    v_ref = v - 0.1

    def value(w):
        return objective.loss(Fixed(w.float(), v_ref), step, A).total.sum()

    w = v0.clone().requires_grad_()
    value(w).backward()
    for index in [(0, 0, 0), (0, 2, 1)]:
        d = torch.zeros_like(v0)
        d[index] = 1e-2
        numeric = (value(v0 + d) - value(v0 - d)) / 2e-2
        assert float(w.grad[index]) == pytest.approx(float(numeric), rel=2e-2, abs=1e-4)


def test_clipping_stops_the_gradient_on_one_side_only():
    step, v, noise = make_step(batch=2)
    J = step.transition.velocity_jacobian(step.t, step.t_next, step.t_max)
    towards = (v + 0.05 * noise / J).requires_grad_()  # moves the mean towards the sampled state: ratio > 1
    loss = GRPO(epsilon=1e-6).loss(Fixed(towards), step, torch.tensor([1.0, -1.0]))
    assert (loss.metrics["ratio"] > 1 + 1e-6).all()
    loss.values.sum().backward()
    assert towards.grad[0].abs().max() == 0
    assert towards.grad[1].abs().max() > 0


def test_advantages_are_clipped():
    step, v, _ = make_step()
    assert GRPO(advantage_clip=5.0).loss(Fixed(v), step, torch.tensor([100.0, -100.0])).values.tolist() == [-5, 5]


def test_squared_error_log_prob_scales_the_log_ratio():
    """log rho' = 2 s^2 log rho, so that it is the plain difference of squared errors."""
    step, v, _ = make_step(CPS(0.8))
    moved = v + 0.1
    plain = GRPO().loss(Fixed(moved), step, torch.ones(2)).metrics["ratio"].log()
    squared = GRPO(log_prob="squared_error").loss(Fixed(moved), step, torch.ones(2)).metrics["ratio"].log()
    old, new = step.gaussian(v).mean, step.gaussian(moved).mean
    direct = (step.x_next - old).square().flatten(1).mean(1) - (step.x_next - new).square().flatten(1).mean(1)
    s = step.transition.std(step.t, step.t_next, step.t_max)
    assert torch.allclose(squared, direct, atol=1e-6)
    assert torch.allclose(squared, 2 * s**2 * plain, atol=1e-6)


def test_step_weight_is_relative_noise():
    step, v, _ = make_step()
    s = float(step.transition.std(step.t, step.t_next, step.t_max))
    weighted = GRPO(step_weight="std").loss(Fixed(v, mean_std=2 * s), step, torch.ones(2)).values
    assert weighted.tolist() == pytest.approx([-0.5, -0.5])


def test_divergences():
    """velocity: mean dv^2. exact: J^2 mean dv^2 / (2 s^2). flow_grpo: the same times h. All 0 at the reference, with gradient."""
    step, v, _ = make_step(FlowSDE(0.7))
    v_ref = v + 0.2
    h = step.t - step.t_next
    J = step.transition.velocity_jacobian(step.t, step.t_next, step.t_max)
    s = step.transition.std(step.t, step.t_next, step.t_max)
    exact = J**2 * 0.04 / (2 * s**2)
    assert divergence("velocity", step, v, v_ref).tolist() == pytest.approx([0.04] * 2, rel=1e-4)
    assert divergence("exact", step, v, v_ref).tolist() == pytest.approx([float(exact)] * 2, rel=1e-3)
    assert divergence("flow_grpo", step, v, v_ref).tolist() == pytest.approx([float(exact) * h] * 2, rel=1e-3)
    # the reference's own formula for Flow-GRPO: h (1 + a^2 / 2)^2 (1 - t) / (2 a^2 t) mean dv^2
    by_formula = h * (1 + 0.49 / 2) ** 2 * (1 - step.t) / (2 * 0.49 * step.t) * 0.04
    assert float(exact) == pytest.approx(by_formula, rel=1e-4)
    for kind in ("velocity", "exact", "flow_grpo"):
        w = (v + 0.1).requires_grad_()
        assert divergence(kind, step, v, v).abs().max() == 0
        divergence(kind, step, w, v).sum().backward()
        assert w.grad.abs().max() > 0


def test_without_beta_no_reference_is_asked_for():
    step, v, _ = make_step()
    assert not GRPO().needs.reference
    assert GRPO(beta=0.1).needs.reference
    assert "kl" not in GRPO().loss(Fixed(v, None), step, torch.ones(2)).metrics


def test_splitting_a_batch_changes_nothing():
    step, v, _ = make_step(batch=4)
    A = torch.tensor([1.0, -1.0, 0.5, 2.0])
    whole = GRPO(beta=0.1).loss(Fixed(v + 0.01, v), step, A).total
    parts = []
    for half in (slice(0, 2), slice(2, 4)):
        states = step.native[half], step.native_next[half]
        part = Step(*states, step.t, step.t_next, step.t_max, step.log_prob[half], 1, step.transition)
        parts.append(GRPO(beta=0.1).loss(Fixed(v[half] + 0.01, v[half]), part, A[half]).total)
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"epsilon": 0}, "epsilon=0"), ({"beta": -1}, "beta=-1"), ({"kl": "rubbish"}, "choose one of velocity")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GRPO(**options)


def test_ratio_is_the_dth_root():
    """Mean over D = 6 latents: log rho is a sixth of the true log-ratio."""
    step, v, _ = make_step(batch=1)
    moved = v + 0.3
    ratio = GRPO().loss(Fixed(moved), step, torch.ones(1)).metrics["ratio"]
    s = step.transition.std(step.t, step.t_next, step.t_max)
    old, new = (torch.distributions.Normal(step.gaussian(w).mean, s).log_prob(step.x_next).sum() for w in (v, moved))
    assert float(ratio) == pytest.approx(math.exp(float(new - old) / 6), rel=1e-4)
