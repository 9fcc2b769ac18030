"""DRaFT: the gradient of a reward through the last steps of the sampler, and through re-noised copies."""

from __future__ import annotations

import pytest
import torch

from flowrl.batch import Noised
from flowrl.train.objectives import DRaFT, DRaFTLV, ReFL
from flowrl.train.objectives.climb import unroll
from flowrl.train.predict import PolicyPredict
from tests.objectives import Fixed, finite_difference, make_nodes, short_run

CHAIN = ("objective=draft", "steps=late", "steps.kind=fixed")


def total(x0):
    return x0.flatten(1).sum(1)


def linear(a):
    """v = a x, with graph to a number and to x."""
    return lambda at: a * at.x


@pytest.mark.parametrize(("start", "power"), [(3, 1), (2, 2), (0, 4)])
def test_the_chain_by_hand(start, power):
    """v = a x, quarters: K steps end at x (1 - a / 4)^K. For a = 0.4 and r the sum dL/da = K / 4 0.9^(K - 1) sum x."""
    (step,), final = make_nodes(linear(0.4), [start])
    a = torch.tensor(0.4, requires_grad=True)
    loss = DRaFT().loss(Fixed(linear(a), reward=total), step, torch.zeros(2))
    torch.testing.assert_close(loss.values, -total(final))
    torch.testing.assert_close(loss.values, -total(step.x) * 0.9**power)
    (gradient,) = torch.autograd.grad(loss.values.sum(), a)
    assert float(gradient) == pytest.approx(power / 4 * 0.9 ** (power - 1) * float(step.x.sum()), rel=1e-5)


def test_gradient_against_differences():
    """A velocity that is curved in x and in its weights, a curved reward, three steps."""
    (step,), _ = make_nodes(linear(0.4), [1])

    def loss(w):
        given = Fixed(
            lambda at: (w * at.x).tanh() + at.t[:, None, None] if not hasattr(at, "index") else (w * at.x).tanh() + at.t
        )
        given.reward_of = lambda x0: x0.cos().flatten(1).sum(1)
        return DRaFT(cap=9.0).loss(given, step, torch.zeros(2)).values

    analytic, numeric = finite_difference(loss, torch.full((3, 2), 0.7))
    torch.testing.assert_close(analytic, numeric, atol=1e-3, rtol=1e-3)


def test_one_step_is_refl_at_the_last_node():
    (step,), _ = make_nodes(linear(0.4), [3])
    gradients = []
    for objective in (DRaFT(cap=3.0), ReFL(cap=3.0)):
        a = torch.tensor(0.4, requires_grad=True)
        objective.loss(Fixed(linear(a), reward=total), step, torch.zeros(2)).values.sum().backward()
        gradients.append(float(a.grad))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-6) and gradients[0] != 0


def test_low_variance_copies():
    """x_t = (1 - t) x0 + t eps, x0_hat = x_t - t a x_t: r = (1 - a t) sum x_t; x0 carries no gradient; two copies, averaged by
    the loop, have half the variance of one in the gradient -t sum x_t."""
    torch.manual_seed(0)
    x0, t = torch.randn(4000, 3, 2), torch.full((4000,), 0.3)
    slopes = []
    for _ in range(2):
        noised = Noised(x0, torch.randn_like(x0), t)
        a = torch.full((4000, 1, 1), 0.5, requires_grad=True)
        loss = DRaFTLV().loss(Fixed(linear(a), reward=total), noised, torch.zeros(4000))
        torch.testing.assert_close(loss.values, -(1 - 0.5 * 0.3) * total(noised.x))
        loss.values.sum().backward()
        torch.testing.assert_close(a.grad.flatten(), 0.3 * total(noised.x), rtol=1e-4, atol=1e-5)
        slopes.append(a.grad.flatten() - 0.3 * 0.7 * total(x0))
    one, two = slopes[0].var(), torch.stack(slopes).mean(0).var()
    assert float(two / one) == pytest.approx(0.5, abs=0.05)
    assert DRaFTLV(kl=0.1).needs.points == "noised" and DRaFTLV(kl=0.1).needs.reference and DRaFTLV().needs.differentiable


# ------------------------------------------------------------------------------------------------ on real pipelines


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_runs(recipe, tmp_path, name):
    """Two of three steps: what is scored with graph is what the rollout drew (for diffusion models nearly: their grid ends
    before 0); recomputing each step for the gradient changes nothing."""
    trainer, rows = short_run(recipe, tmp_path, *CHAIN, "steps.size=2", "objective.checkpoint=true", name=name)
    assert rows[0]["predicted_reward"] == pytest.approx(rows[0]["reward"], abs=0.03 if name == "sd15" else 1e-4)
    batch = next(trainer.rollout(0))
    (step,) = batch.steps
    assert step.index == 1
    found = []
    for save in (False, True):
        predict = PolicyPredict(trainer.policy, batch)
        x0 = unroll(predict, step, predict(step), save=save)
        if name != "sd15":
            torch.testing.assert_close(x0, batch.latents, atol=1e-4, rtol=1e-4)
        x0.square().mean().backward()
        found.append({key: p.grad for key, p in trainer.policy.trainable().items() if p.grad is not None})
        for p in trainer.policy.trainable().values():
            p.grad = None
    assert any(g.any() for g in found[0].values())
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_low_variance_runs(recipe, tmp_path, name):
    """The final latents are noised to the recipe's times, twice; the metric says where."""
    options = ["objective=draft_lv", "times={name: uniform, count: 2, low: 0.2, high: 0.4}"]
    trainer, rows = short_run(recipe, tmp_path, *options, name=name)
    (batch,) = trainer.rollout(5)
    points = [point for point, _ in trainer.points(batch)]
    assert not batch.steps and len(points) == 2 and all(0.2 <= float(t) <= 0.4 for point in points for t in point.t)
    assert {name for name in rows[0] if name.startswith("predicted_reward/")} <= {f"predicted_reward/t0.{d}" for d in (2, 3, 4)}
