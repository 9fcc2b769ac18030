"""G2RPO: advantages of several granularities, one model call with gradient per group, what the recipe must say."""

from __future__ import annotations

import pytest
import torch

from flowrl.config import ConfigError
from flowrl.reward_models import load_reward
from flowrl.samplers import FlowSDE
from flowrl.train import trainer as loop
from flowrl.train.advantages import advantages
from flowrl.train.objectives import G2RPO, GRPO
from tests.objectives import Fixed, make_step, short_run
from tests.test_trainer import make

SHARED = ["objective=g2rpo", "steps={name: window, size: 1, high: 3}", "num_inference_steps=5"]
SHARED += ["num_generations=4", "branches=[4]", "batch_size=8"]


def test_on_policy_the_gradient_is_the_advantage_weighted_mean_of_the_noises():
    """Four samples from one state: one v (1, 3, 2) serves all, its gradient is -J / (s D) mean(A_i z_i); the loss is GRPO's."""
    torch.manual_seed(0)
    step, _, _ = make_step(FlowSDE(0.7), batch=1)
    v, noise, A = torch.randn(1, 3, 2), torch.randn(4, 3, 2), torch.tensor([1.0, -2.0, 0.5, 0.5])
    step.owner = torch.zeros(4, dtype=torch.int64)
    law = step.gaussian(step.per_sample(v))
    step.native_next = law.sample(noise)
    step.log_prob = law.log_prob(step.x_next)
    w = v.clone().requires_grad_()
    loss = G2RPO().loss(Fixed(lambda at: at.per_sample(w)), step, A)
    assert torch.equal(loss.values.detach(), -A)
    loss.values.mean().backward()
    J, s = (f(step.t, step.t_next, step.t_max) for f in (FlowSDE(0.7).velocity_jacobian, FlowSDE(0.7).std))
    expected = -J / (s * 6) * (A[:, None, None] * noise).mean(0, keepdim=True)
    torch.testing.assert_close(w.grad, expected, rtol=1e-4, atol=1e-5)
    moved = Fixed(lambda at: at.per_sample(v + 0.1))
    assert torch.equal(G2RPO().loss(moved, step, A).values, GRPO().loss(moved, step, A).values)


def test_advantages_of_all_granularities_are_summed(recipe, tmp_path):
    """By hand: every sample's noisy state, taken to the end over every node and over every second one by Euler's steps; both
    ends decoded, scored, normalised in their group, and added."""
    trainer = make(recipe, tmp_path, *SHARED, "strides=[1, 2]", "aggregation=sum_then_normalize", "seed=3")
    batches, samples, scores, advantage, metrics = trainer.collect(loop._Clock())
    (batch,), bright = batches, load_reward("brightness")
    policy, (step,) = trainer.policy, batches[0].steps
    total = torch.zeros(8)
    for stride in (1, 2):
        state, node, grid = step.native_next, step.index + 1, policy.grid()
        while node < 5:
            following = min(node + stride, 5)
            _, v, _ = policy.trunk(batch.prompts, batch.seeds, node, state, start=node)
            state, node = grid.ode_step(state, v, node, following), following
        batch.images = policy.decode(state, batch.texts)
        values = bright(batch)
        total += advantages(values[:, None], batch.group)
        name = "reward" if stride == 1 else "reward/stride2"
        assert metrics[name] == pytest.approx(float(values.mean()), rel=1e-4)
    torch.testing.assert_close(advantage, total, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(advantage, advantages(scores, samples.group), atol=0.05), "the second granularity has a say"


def test_three_strides_from_the_last_noisy_step(recipe, tmp_path):
    """A stride longer than what is left is one step to the end; the recorded samples are those of stride 1."""
    one, three = (make(recipe, tmp_path / str(n), *SHARED, f"strides={n}", "seed=3") for n in ([1], [1, 2, 9]))
    a, b = one.collect(loop._Clock()), three.collect(loop._Clock())
    assert torch.equal(a[1].latents, b[1].latents) and torch.equal(a[2], b[2])
    assert {"reward/stride2", "reward/stride9"} <= {*b[4]} and not torch.equal(a[3], b[3])
    (batch,) = b[0]
    state, node = batch.steps[0].native_next, batch.steps[0].index + 1
    _, v, _ = three.policy.trunk(batch.prompts, batch.seeds, node, state, start=node)
    jump = three.policy.grid().ode_step(state, v, node, 5)
    torch.testing.assert_close(three.end(batch, 9).latents, jump, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_one_forward_with_gradient_serves_a_group(recipe, tmp_path, name):
    """Two groups of four, judged twice: in the update the denoiser sees two states, once."""
    seen = []

    def note(module, args, kwargs):
        if torch.is_grad_enabled():
            seen.append(len(kwargs.get("hidden_states", args[0] if args else None)))

    trainer = make(recipe, tmp_path / "watched", *SHARED, "strides=[1, 2]", "checks=false", name=name)
    next(iter(trainer.policy.denoisers.values())).register_forward_pre_hook(note, with_kwargs=True)
    trainer.step()
    assert seen == [2]
    short_run(recipe, tmp_path, *SHARED, "strides=[1, 2]", name=name, steps=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["branches=[]"], r"branches=\[4\] \(here: 1 noisy steps, branches=\[\]"),
        (["branches=[2]"], "a group draws its only noise in one shared state"),
        (["steps.size=2"], "here: 2 noisy steps"),
        (["transition.noise_level=0"], "needs a stochastic sampler"),
    ],
)
def test_recipes_that_are_not_g2rpo(recipe, tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        make(recipe, tmp_path, *SHARED, *wrong)


@pytest.mark.parametrize("strides", ["[]", "[2]", "[1, 1]", "[1, 0]", "[1, 1.5]"])
def test_strides_that_make_no_sense(recipe, tmp_path, strides):
    with pytest.raises(ConfigError, match="the first of them 1"):
        make(recipe, tmp_path, *SHARED, f"strides={strides}")


@pytest.mark.parametrize("option", ["branches=[2]", "strides=[1, 2]"])
def test_branches_and_strides_want_noisy_steps(recipe, tmp_path, option):
    """Methods that noise final latents have no steps to branch at."""
    with pytest.raises(ConfigError, match=f"{option.split('=')[0]}=.*nft does not train on noisy steps.*leave"):
        make(recipe, tmp_path, "objective=nft", option)
