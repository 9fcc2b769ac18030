"""Sparse straight-through gradients and DRTune: kept nodes by themselves, equal to the joint backward pass."""

from __future__ import annotations

import pytest
import torch

from flowrl.reward_models.base import Traits
from flowrl.samplers.flow import x0_from
from flowrl.train.objectives import DRaFT, Sparse
from flowrl.train.predict import PolicyPredict
from tests.objectives import Fixed, finite_difference, make_nodes, short_run
from tests.test_draft import linear, total

NODES = ("objective=sparse", "steps=spread", "steps.size=2")


def curved(x0):
    return x0.sin().flatten(1).sum(1)


def separate(objective, given, steps, a):
    """The gradient that the loop gathers: the mean over nodes of each one's own backward pass."""
    for step in steps:
        loss = objective.loss(given, step, torch.zeros(2))
        (loss.values.sum() / len(steps)).backward()
    return a.grad


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 2], [1, 3], [2]])
def test_separate_passes_are_the_joint_one(kept):
    """By hand: y = - sum_i (t_i - t_next(i)) v(sg(x_i)), x = sg(x_n) + y - sg(y), backward of -r(x), all nodes in one graph."""
    steps, final = make_nodes(linear(0.4), kept)
    a = torch.tensor(0.4, requires_grad=True)
    times = [step.t for step in steps] + [0.0]
    y = -sum((t - after) * a * step.x for step, t, after in zip(steps, times[:-1], times[1:], strict=True))
    (joint,) = torch.autograd.grad(-curved(final + y - y.detach()).sum(), a)
    given = Fixed(linear(a), reward=curved, steps=steps, final=final)
    assert float(separate(Sparse(), given, steps, a)) == pytest.approx(float(joint), rel=1e-5) and float(joint) != 0


def test_all_nodes_and_a_velocity_without_x_is_full_backpropagation():
    """v_i = a_i, whatever x: the chain through all steps (DRaFT-n) and the sparse gradient agree for each weight."""
    torch.manual_seed(0)
    start = torch.randn(4)

    def by_time(a):
        return lambda at: a[int(4 * (1 - float(torch.as_tensor(at.t).flatten()[0])))] * torch.ones(2, 3, 2)

    steps, final = make_nodes(by_time(start), [0, 1, 2, 3])
    a, b = start.clone().requires_grad_(), start.clone().requires_grad_()
    DRaFT().loss(Fixed(by_time(b), reward=curved), steps[0], torch.zeros(2)).values.sum().backward()
    given = Fixed(by_time(a), reward=curved, steps=steps, final=final)
    torch.testing.assert_close(separate(Sparse(), given, steps, a), b.grad)
    assert b.grad.abs().min() > 1e-3


def test_gradient_against_finite_differences():
    """Of the reward of the whole chain, where the velocities do not depend on x: v_i = a_i^2 everywhere."""

    def end(a):
        return make_nodes(lambda at: a[int(4 * (1 - float(at.t[0])))] ** 2 * torch.ones(2, 3, 2), [0, 1, 2, 3])

    def value(a):
        if not torch.is_grad_enabled():
            return -curved(end(a)[1])
        steps, final = end(a.detach())
        given = Fixed(lambda at: a[int(4 * (1 - at.t))] ** 2 * torch.ones(2, 3, 2), reward=curved, steps=steps, final=final)
        return torch.stack([Sparse().loss(given, step, torch.zeros(2)).values / 4 for step in steps])

    torch.manual_seed(0)
    exact, numeric = finite_difference(value, torch.randn(4))
    torch.testing.assert_close(exact, numeric, rtol=1e-3, atol=1e-3)
    assert exact.abs().min() > 1e-2


def test_what_a_node_stands_for():
    """Nodes 0 and 2 of quarters: half the time each; by themselves a quarter and, the last one, all that is left."""
    steps, final = make_nodes(linear(0.4), [0, 2])
    given = Fixed(linear(0.4), steps=steps, final=final)
    assert [Sparse().span(given, step) for step in steps] == [0.5, 0.5]
    assert [Sparse(stands_for="itself").span(given, step) for step in steps] == [0.25, 0.5]


def test_drtune():
    """The guess from the last node, x - t a x, is what is scored; by hand with r the sum: dL/da = 1/4 sum x_0 + 1/2 sum x_2."""
    steps, final = make_nodes(linear(0.4), [0, 2])
    a = torch.tensor(0.4, requires_grad=True)
    objective = Sparse(picture="guess", stands_for="itself")
    given = Fixed(linear(a), reward=total, steps=steps, final=final)
    loss = objective.loss(given, steps[0], torch.zeros(2))
    guess = x0_from(steps[1].x, 0.4 * steps[1].x, 0.5)
    torch.testing.assert_close(loss.metrics["predicted_reward"], total(guess))
    given.kept.clear()
    gradient = separate(objective, given, steps, a)
    assert float(gradient) == pytest.approx(float(steps[0].x.sum() / 4 + steps[1].x.sum() / 2), rel=1e-5)


def test_above_the_cap_nothing_pulls_and_metrics_are_of_the_reward():
    steps, final = make_nodes(linear(0.4), [0, 2])
    r = total(final)
    a = torch.tensor(0.4, requires_grad=True)
    given = Fixed(linear(a), linear(0.3), reward=total, steps=steps, final=final)
    loss = Sparse(cap=float(r.min()) - 1, kl=0.5).loss(given, steps[0], torch.zeros(2))
    assert not loss.values.any() and loss.metrics["capped"].tolist() == [1, 1]
    torch.testing.assert_close(loss.metrics["predicted_reward"], r)
    torch.testing.assert_close(loss.penalty, 0.5 * 0.01 * steps[0].x.square().flatten(1).mean(1))


@pytest.mark.parametrize(
    ("options", "message"), [({"picture": "x"}, "choose one of real"), ({"stands_for": "x"}, "choose one of next")]
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Sparse(**options)


# ------------------------------------------------------------------------------------------------ on real pipelines


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_runs(recipe, tmp_path, name):
    """The reward of the real picture, asked for once per batch with gradient, however many nodes there are."""
    asked = []

    def bright(images, prompts):
        asked.append(torch.is_grad_enabled())
        return images.flatten(1).mean(1)

    bright.traits = Traits(differentiable=True)
    options = ["rewards.brightness=null", "rewards.bright=1", "checks=false", *NODES]
    _, rows = short_run(recipe, tmp_path, *options, name=name, rewards={"bright": bright})
    assert asked == [False, True] * 2
    assert rows[0]["predicted_reward"] == pytest.approx(rows[0]["reward"], abs=1e-6)


def test_the_loop_gathers_the_joint_gradient(recipe, tmp_path):
    """Through denoiser, decoder and brightness: two nodes in one graph by hand, and the trainer's own update."""
    trainer, _ = short_run(recipe, tmp_path, *NODES)
    (batch,) = trainer.rollout(3)
    policy = trainer.policy
    x0 = batch.latents.float()
    times = [step.t for step in batch.steps] + [0.0]
    parts = zip(batch.steps, times[:-1], times[1:], strict=True)
    y = -sum((t - after) * policy.velocity(batch.texts, step) for step, t, after in parts)
    images = policy.decode(x0 + y - y.detach(), batch.texts, with_graph=True)
    (-images.flatten(1).mean(1)).mean().backward()
    expected = {key: p.grad.clone() for key, p in policy.trainable().items() if p.grad is not None and p.grad.any()}
    for p in policy.trainable().values():
        p.grad = None
    trainer.apply = lambda: 0.0
    trainer.update([batch], torch.zeros(4))
    assert len(batch.steps) == 2 and expected
    for key, gradient in expected.items():
        found = policy.trainable()[key].grad
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    assert PolicyPredict(policy, batch).steps is batch.steps
