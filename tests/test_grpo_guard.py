"""GRPO-Guard: the ratio is centred, of one scale, exact in few digits; hand arithmetic, gradients, a run of each family."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.batch import Step
from flowrl.samplers import CPS, DanceSDE, FlowSDE
from flowrl.train.objectives import GRPO, GRPOGuard
from tests.objectives import Fixed, finite_difference, make_step, short_run


def guarded(transition=None, batch=2, **where):
    """A recorded step that kept the velocity it was drawn from."""
    step, v, noise = make_step(transition, batch, **where)
    step.v = v
    return step, v, noise


def test_value_by_hand():
    """One latent, Dance with g = 1, t = 0.5, t' = 0.25: h = 0.25, s = 0.5, mean = -0.375 v from x = 0. Sampled from v = 0 with
    z = 1. Now v = -0.4: d = 0.15, log rho_n = d z = 0.15, rho_n = 1.16183 (the plain ratio is 1.29046). With epsilon 0.1, A = 2
    clips: -2 * 1.1 / 0.25 = -8.8; A = -2 does not: 2 * 1.16183 / 0.25 = 9.29467.
    """
    x, x_next = torch.zeros(2, 1), torch.full((2, 1), 0.5)
    old = DanceSDE(1.0).transition(x, torch.zeros(2, 1), 0.5, 0.25, 0.9).log_prob(x_next)
    step = Step(x, x_next, 0.5, 0.25, 0.9, old, 0, DanceSDE(1.0), v=torch.zeros(2, 1))
    loss = GRPOGuard(epsilon=0.1).loss(Fixed(torch.full((2, 1), -0.4)), step, torch.tensor([2.0, -2.0]))
    assert loss.metrics["ratio"].tolist() == pytest.approx([math.exp(0.15)] * 2, rel=1e-6)
    assert loss.values.tolist() == pytest.approx([-8.8, 8 * math.exp(0.15)], rel=1e-5)
    assert loss.metrics["clip_ratio"].tolist() == [1, 1]
    plain = GRPOGuard(epsilon=0.1, grad_reweight=False).loss(Fixed(torch.full((2, 1), -0.4)), step, torch.tensor([2.0, -2.0]))
    assert plain.values.tolist() == pytest.approx([-2.2, 2 * math.exp(0.15)], rel=1e-5)


@pytest.mark.parametrize("transition", [FlowSDE(0.7), DanceSDE(0.3), CPS(0.8)])
def test_it_is_the_plain_ratio_without_its_bias_times_the_noise(transition):
    """log rho_n = s (log rho + |d|^2 / (2 s^2)), with each sample's own bias: checked in fp64."""
    step, v, _ = guarded(transition, batch=3)
    moved = v + 0.1 * torch.randn_like(v) * torch.tensor([1.0, 2.0, 0.0])[:, None, None]
    ratio = GRPOGuard().loss(Fixed(moved), step, torch.ones(3)).metrics["ratio"]
    plain = GRPO().loss(Fixed(moved), step, torch.ones(3)).metrics["ratio"]
    s = float(transition.std(step.t, step.t_next, step.t_max))
    d = (step.gaussian(moved).mean - step.gaussian(v).mean).double().flatten(1)
    expected = s * (plain.double().log() + d.square().mean(1) / (2 * s**2))
    torch.testing.assert_close(ratio.double().log(), expected, rtol=1e-3, atol=1e-6)
    assert float(ratio[2]) == 1


def test_ratios_are_centred_and_of_one_scale():
    """4,000 samples of 16 latents, the policy 0.3 off in every mean. Plain: E[rho] = exp(-m (1 - 1/D)), m = 0.09 / (2 s^2), at
    every step below 1. Normalised: mean log-ratio 0 with variance 0.09 / D, whatever the step's noise."""
    generator = torch.Generator().manual_seed(0)
    spreads = {}
    for t in (0.9, 0.3):
        x, v, noise = (torch.randn(4000, 16, generator=generator) for _ in range(3))
        law = FlowSDE(0.7).transition(x, v, t, t - 0.1, 0.95)
        s = float(torch.as_tensor(law.std).reshape(-1)[0])
        x_next = law.sample(noise)
        step = Step(x, x_next, t, t - 0.1, 0.95, law.log_prob(x_next), 0, FlowSDE(0.7), v=v)
        moved = v + 0.3 / FlowSDE(0.7).velocity_jacobian(t, t - 0.1, 0.95)
        plain = GRPO().loss(Fixed(moved), step, torch.ones(4000)).metrics["ratio"]
        m = 0.09 / (2 * s**2)
        assert float(plain.mean()) == pytest.approx(math.exp(-m * (1 - 1 / 16)), rel=0.02)
        normed = GRPOGuard().loss(Fixed(moved), step, torch.ones(4000)).metrics["ratio"].log()
        assert abs(float(normed.mean())) < 4 * 0.3 / 4 / 4000**0.5
        assert float(normed.var()) == pytest.approx(0.09 / 16, rel=0.1)
        assert float(normed.exp().mean()) == pytest.approx(1, abs=0.01)
        spreads[t] = float(plain.log().std())
    assert spreads[0.3] > 2 * spreads[0.9], "plain ratios use up the clip range where there is little noise"


def test_all_steps_pull_equally():
    """For Flow-SDE the gradient of L in v is A (1 + a^2 / 2) z / D at every step; without the weight it is h times that."""
    for t, t_next in ((0.9, 0.8), (0.7, 0.4), (0.2, 0.15)):
        step, v, noise = guarded(FlowSDE(0.7), t=t, t_next=t_next)
        w = v.clone().requires_grad_()
        GRPOGuard().loss(Fixed(w), step, torch.tensor([1.0, -2.0])).values.sum().backward()
        expected = torch.tensor([1.0, -2.0])[:, None, None] * (1 + 0.49 / 2) * noise / 6
        torch.testing.assert_close(w.grad, expected, rtol=1e-4, atol=1e-4)


def test_small_moves_keep_their_digits():
    """A move of 1e-6 of the mean: the ratio is 1 + 1e-6 <z> up to the rounding of numbers near 1, 1.2e-7."""
    step, _, noise = guarded(CPS(0.8), batch=8)
    step.v = torch.zeros_like(noise)
    step.native_next = step.gaussian(step.v).sample(noise)
    moved = torch.full_like(noise, 1e-6 / float(CPS(0.8).velocity_jacobian(step.t, step.t_next, step.t_max)))
    ratio = GRPOGuard().loss(Fixed(moved), step, torch.ones(8)).metrics["ratio"].double() - 1
    assert (ratio - 1e-6 * noise.double().flatten(1).mean(1)).abs().max() < 1.5e-7


def test_gradient_against_finite_differences():
    step, v, _ = guarded(batch=1)
    objective, v_ref = GRPOGuard(epsilon=0.5, beta=0.3), v - 0.1
    ours, numeric = finite_difference(
        lambda w: objective.loss(Fixed(w, v_ref), step, torch.tensor([0.7])).total, v + 0.05, step=1e-2
    )
    torch.testing.assert_close(ours, numeric, rtol=2e-2, atol=1e-3)


def test_on_policy_the_ratio_is_one_and_a_split_changes_nothing():
    step, v, _ = guarded(batch=4)
    A = torch.tensor([1.0, -1.0, 0.5, 9.0])
    loss = GRPOGuard().loss(Fixed(v), step, A)
    h = step.t - step.t_next
    assert torch.equal(loss.metrics["ratio"], torch.ones(4))
    assert loss.values.tolist() == pytest.approx([-1 / h, 1 / h, -0.5 / h, -5 / h], rel=1e-5), "advantages are clipped at 5"
    whole = GRPOGuard().loss(Fixed(v + 0.01), step, A).values
    halves = [
        GRPOGuard().loss(Fixed(v[rows] + 0.01), step.select(rows), A[rows]).values
        for rows in (torch.tensor([0, 1]), torch.tensor([2, 3]))
    ]
    assert torch.allclose(whole, torch.cat(halves), atol=1e-6)


@pytest.mark.parametrize(("name", "transition"), [("sd15", "ddim"), ("sd3", "flow_sde"), ("wan", "cps")])
def test_a_run_of_each_family(recipe, tmp_path, name, transition):
    """The first update's ratios are 1 to the bit, the second's are not."""
    options = ["objective=grpo_guard", f"transition={transition}", "updates_per_step=2"]
    trainer, rows = short_run(recipe, tmp_path, *options, name=name, steps=1)
    assert all(step.v is not None for step in next(trainer.rollout(3)).steps)
    assert rows[0]["ratio_deviation"] > 0 and rows[0]["grad_norm"] > 0


def test_what_is_refused():
    for options in ({"epsilon": 0}, {"beta": -1}, {"advantage_clip": 0}):
        with pytest.raises(ValueError, match="must be"):
            GRPOGuard(**options)
