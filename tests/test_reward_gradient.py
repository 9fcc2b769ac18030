"""R0: gradients of rewards divided by their norms; and which of the rewards that ship have a gradient at all."""

from __future__ import annotations

import pytest
import torch

from flowrl import Policy
from flowrl.batch import Prompt
from flowrl.config import ConfigError
from flowrl.reward_models import EMBEDDED, load_reward
from flowrl.reward_models.base import traits_of
from flowrl.samplers import DDIM
from flowrl.samplers.flow import x0_from
from flowrl.train.objectives import R0, DRaFT
from flowrl.train.predict import PolicyPredict
from flowrl.train.scoring import Scoring
from tests.objectives import Fixed, finite_difference, make_nodes, short_run
from tests.test_draft import linear

# ------------------------------------------------------------------------------------------------ the method


def node(index=2):
    steps, _ = make_nodes(linear(0.4), [index])
    return steps[0]


def pull(reward, objective=None, index=2, a=0.4):
    """The gradient of the loss in the end of the chain, (B, 3, 2), of rewards of latents."""
    ends = []

    def keeping(x0):
        ends.append(x0)
        return reward(x0)

    given = Fixed(linear(torch.tensor(a, requires_grad=True)), reward=reward)
    objective = objective or R0(eta=0.0)
    x0 = objective.end(given, node(index), given(node(index)))
    values, r = objective.normalised(given, x0)
    return torch.autograd.grad(values.sum(), x0)[0], r


def bent(x0):
    return x0.sin().flatten(1).sum(1)


def other(x0):
    return (x0**2).flatten(1).mean(1)


def test_each_reward_pulls_with_norm_one():
    """-g / |g| for one reward; -(g1 / |g1| + g2 / |g2|) for two, however large either is: a thousand times the second changes
    nothing, and the sum of rewards would have become the second alone."""
    x0 = R0(eta=0.0).end(Fixed(linear(0.4)), node(), linear(0.4)(node()))
    unit = {}
    for reward in (bent, other):
        x = x0.detach().requires_grad_()
        (g,) = torch.autograd.grad(reward(x).sum(), x)
        unit[reward] = g / g.flatten(1).norm(dim=1).reshape(-1, 1, 1)
    torch.testing.assert_close(pull(bent)[0], -unit[bent])
    for scale in (1.0, 1000.0):
        both, r = pull(lambda x0, scale=scale: torch.stack([bent(x0), scale * other(x0)], 1))
        torch.testing.assert_close(both, -(unit[bent] + unit[other]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(r, bent(x0) + scale * other(x0))


def test_gradient_against_finite_differences():
    """With one reward: that of the reward at the end of the chain in the weight a of v = a x, over the norm that the reward's own
    gradient has there. Two samples: each over its own norm."""
    step = node()
    x0 = (step.x * (1 - 0.4 / 4) ** 2).requires_grad_()
    (g,) = torch.autograd.grad(bent(x0).sum(), x0)
    norm = g.flatten(1).norm(dim=1)

    def value(a):
        if not torch.is_grad_enabled():
            return -bent(step.x * (1 - a / 4) ** 2) / norm
        return R0(eta=0.0).loss(Fixed(linear(a), reward=bent), step, torch.zeros(2)).values

    exact, numeric = finite_difference(value, torch.tensor([0.4]))
    torch.testing.assert_close(exact, numeric, rtol=1e-3, atol=1e-4)
    assert float(exact.abs()) > 1e-2


def test_cap_and_abstention():
    """A sample above the cap does not move; where one reward abstains the other pulls alone."""
    _, r = pull(bent)
    capped, _ = pull(bent, R0(eta=0.0, cap=float(r.mean())))
    assert not capped[int(r.argmax())].any() and capped[int(r.argmin())].flatten().norm() == pytest.approx(1.0, rel=1e-4)
    absent = torch.tensor([False, True])
    alone, _ = pull(lambda x0: torch.stack([bent(x0), torch.where(absent, torch.nan, other(x0))], 1))
    torch.testing.assert_close(alone[1], pull(bent)[0][1])
    assert not torch.allclose(alone[0], pull(bent)[0][0])


def test_without_noise_the_chain_is_drafts_and_with_it_ddims():
    """eta = 0: the ODE. Else each step is DDIM's with one eta for the batch: by hand with the generator's own draws."""
    step, v = node(1), linear(0.4)
    plain = R0(eta=0.0).end(Fixed(v), step, v(step))
    torch.testing.assert_close(plain, DRaFT().end(Fixed(v), step, v(step)))
    noisy = R0(eta=1.0).end(Fixed(v), step, v(step))
    rng = torch.Generator().manual_seed(0)
    eta, x = float(torch.rand((), generator=rng)), step.x
    for t, t_next in ((0.75, 0.5), (0.5, 0.25), (0.25, 0.0)):
        x = DDIM(eta).transition(x, 0.4 * x, t, t_next, 0.75).sample(torch.randn(x.shape, generator=rng))
    torch.testing.assert_close(noisy, x)
    assert not torch.allclose(noisy, plain, atol=1e-2)


def test_intermediate_guess():
    """R0+ adds the same loss at x - t v of the node itself: with one reward, two unit vectors by the chain rule."""
    step = node(2)
    a = torch.tensor(0.4, requires_grad=True)
    plus = R0(eta=0.0, intermediate=0.5).loss(Fixed(linear(a), reward=bent), step, torch.zeros(2))
    (gradient,) = torch.autograd.grad(plus.values.sum(), a)
    expected = 0.0
    for weight, end in ((1.0, lambda b: step.x * (1 - b / 4) ** 2), (0.5, lambda b: x0_from(step.x, b * step.x, step.t))):
        b = torch.tensor(0.4, requires_grad=True)
        x0 = end(b)
        (g,) = torch.autograd.grad(bent(x0).sum(), x0, retain_graph=True)
        unit = g / g.flatten(1).norm(dim=1).reshape(-1, 1, 1)
        expected -= weight * float(torch.autograd.grad((unit * x0).sum(), b)[0])
    assert float(gradient) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("options", "message"), [({"eta": 1.5}, "eta=1.5"), ({"intermediate": -1.0}, "intermediate=-1.0")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        R0(**options)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_runs(recipe, tmp_path, name):
    """Held by a pull that starts at 0; what is logged is the reward, and not the surrogate."""
    options = ["objective={name: r0, kl: 0.1, intermediate: 0.5}", "steps={name: late, size: 3}"]
    _, rows = short_run(recipe, tmp_path, *options, name=name)
    assert rows[0]["kl"] < 1e-12 < rows[1]["kl"]
    assert rows[0]["policy_loss"] == -rows[0]["predicted_reward"] and 0 < rows[0]["predicted_reward"] < 1


# ------------------------------------------------------------------------------------------------ rewards that ship


GATE = "gate of='{name: tiny_preference, shape: {sigmoid: {center: 15.8, scale: 1.17}}}' by=tiny_artifact"
PAIR = "ensemble of='[tiny_preference, tiny_preference_1]' reduce=min"
SUM = "tree of='{tiny_clip: 1, tiny_transport: 2}'"


def drawn_by(model, *prompts):
    policy = Policy.load(model)
    return policy, policy.rollout([Prompt(prompt) for prompt in prompts], [1, 2], num_inference_steps=4)


@pytest.fixture(scope="module")
def drawn():
    return drawn_by("tiny-sd3", "a red circle", "two blue squares")


@pytest.fixture(scope="module")
def drawn_clips():
    return drawn_by("tiny-wan", "a red circle moving left", "a blue square growing")


@pytest.mark.parametrize("spec", [*EMBEDDED, GATE, PAIR, SUM, "brightness"])
def test_embedded_rewards_have_the_gradient_that_they_promise(request, spec):
    """It reaches the latents of each sample, and its length is what a small step along it gains, by central differences; it does
    so after the loop has scored the same samples without graph, and what the loop gets has none."""
    policy, batch = request.getfixturevalue("drawn_clips" if spec.startswith("tiny_video") else "drawn")
    reward = load_reward(spec)
    assert traits_of(reward).differentiable
    batch.images = policy.decode(batch)
    with Scoring({"r": reward}) as scoring:
        scoring.submit(batch)
        scored = scoring.finish(batch)
    assert not scored.requires_grad
    predict = PolicyPredict(policy, batch, rewards={"r": reward})
    x0 = predict.final.requires_grad_()
    r = predict.reward(x0)
    torch.testing.assert_close(r.detach(), scored[:, 0], rtol=1e-3, atol=1e-4)
    (g,) = torch.autograd.grad(r.sum(), x0)
    norm = g.flatten(1).norm(dim=1)
    assert g.isfinite().all() and (norm > 0).all()
    with torch.no_grad():
        step = 0.003 * g / norm.reshape(-1, *[1] * (g.ndim - 1))
        gained = (predict.reward(x0 + step) - predict.reward(x0 - step)) / 0.006
    torch.testing.assert_close(gained, norm, rtol=0.15, atol=2e-3)


@pytest.mark.parametrize("spec", ["tiny_strict", "tiny_dense", "tiny_clean", "jpeg_size", "vendi", "mmd"])
def test_rewards_that_have_none_say_so(spec):
    assert not traits_of(load_reward(spec)).differentiable


def test_a_sample_of_which_a_reward_abstains_gets_no_gradient_from_it(drawn):
    """NaN times anything stays NaN in a backward pass; the other reward's gradient arrives alone."""
    policy, batch = drawn

    def sometimes(images, prompts):
        return images.flatten(1).mean(1) * torch.tensor([1.0, torch.nan])

    def always(images, prompts):
        return images.square().flatten(1).mean(1)

    gradients = []
    for functions in ([sometimes, always], [always]):
        predict = PolicyPredict(policy, batch, rewards={f.__name__: load_reward(f) for f in functions})
        x0 = predict.final.requires_grad_()
        gradients.append(torch.autograd.grad(predict.reward(x0).sum(), x0)[0])
    assert gradients[0].isfinite().all() and not torch.allclose(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1])


def test_a_part_without_a_gradient_is_refused(recipe, tmp_path):
    spec = "rewards.both={name: tree, weight: 1, of: {tiny_preference: 1, tiny_strict: 1}}"
    with pytest.raises(ConfigError, match="r0 climbs the gradient of its rewards; both has none"):
        short_run(recipe, tmp_path, "objective=r0", "steps=late", spec)
