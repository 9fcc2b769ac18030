"""ReFL, and what all objectives share that climb the gradient of a reward: cap, pull, frames, and rewards that have none."""

from __future__ import annotations

import pytest
import torch

from flowrl import Policy, Trainer, load_recipe
from flowrl.config import ConfigError
from flowrl.reward_models import load_reward
from flowrl.reward_models.base import RewardError, Traits
from flowrl.samplers.flow import x0_from
from flowrl.train.objectives import ReFL
from flowrl.train.predict import PolicyPredict
from tests.objectives import Fixed, finite_difference, make_nodes, short_run
from tests.pipelines import CALL, tiny

NODES = ("objective=refl", "steps=late", "steps.size=2")


def mean(x0):
    return x0.flatten(1).mean(1)


def node(v=None, index=2):
    """A node at t = 0.5 and a velocity there."""
    torch.manual_seed(3)
    v = torch.randn(2, 3, 2) if v is None else v
    (step,), final = make_nodes(v, [index])
    return step, v, final


def test_arithmetic():
    """x0_hat = x - 0.5 v. With r the mean of latents: r = mean x - 0.5 mean v, the loss is -r, or cap - r down to 0."""
    step, v, _ = node()
    r = mean(step.x) - 0.5 * mean(v)
    loss = ReFL().loss(Fixed(v, reward=mean), step, torch.zeros(2))
    assert loss.values.tolist() == pytest.approx((-r).tolist()) and loss.penalty is None
    assert loss.metrics["predicted_reward"].tolist() == pytest.approx(r.tolist())
    capped = ReFL(cap=float(r.mean())).loss(Fixed(v, reward=mean), step, torch.zeros(2))
    gap = abs(float(r[0] - r[1])) / 2
    assert sorted(capped.values.tolist()) == pytest.approx([0.0, gap], abs=1e-6)
    assert sorted(capped.metrics["capped"].tolist()) == [0.0, 1.0]


def test_gradient_by_hand_and_by_differences():
    """d(-mean(x - t v)) / dv = t / D: 0.5 / 6 in each of the 6 latents. A curved reward against finite differences."""
    step, v, _ = node()
    w = v.clone().requires_grad_()
    ReFL().loss(Fixed(w, reward=mean), step, torch.zeros(2)).total.sum().backward()
    torch.testing.assert_close(w.grad, torch.full_like(v, 0.5 / 6))

    def total(w):
        return ReFL(cap=4.0, kl=0.3).loss(Fixed(w, v, reward=lambda x0: x0.sin().flatten(1).sum(1)), step, torch.zeros(2)).total

    analytic, numeric = finite_difference(total, v + 0.1)
    torch.testing.assert_close(analytic, numeric, atol=2e-4, rtol=1e-3)


def test_a_sample_above_the_cap_is_left_alone():
    step, v, _ = node()
    r = mean(x0_from(step.x, v, step.t))
    w = v.clone().requires_grad_()
    ReFL(cap=float(r.mean())).loss(Fixed(w, reward=mean), step, torch.zeros(2)).total.sum().backward()
    above = int(r.argmax())
    assert not w.grad[above].any() and w.grad[1 - above].any()


def test_pull_and_advantages():
    """kl is the mean of (v - v_ref)^2, 0.04 here; advantages change nothing; no reference is asked for without kl."""
    step, v, _ = node()
    held = ReFL(kl=0.5).loss(Fixed(v + 0.2, v, reward=mean), step, torch.zeros(2))
    assert held.penalty.tolist() == pytest.approx([0.02] * 2, rel=1e-4) and held.metrics["kl"].tolist() == pytest.approx(
        [0.04] * 2
    )
    assert ReFL(kl=0.5).needs.reference and not ReFL().needs.reference and ReFL().needs.points == "nodes"
    values = [ReFL().loss(Fixed(v, reward=mean), step, A).values for A in (torch.zeros(2), torch.tensor([5.0, -3.0]))]
    assert torch.equal(*values)


def test_an_abstaining_reward_leaves_its_sample_alone():
    step, v, _ = node()
    w = v.clone().requires_grad_()
    absent = torch.tensor([False, True])
    loss = ReFL().loss(Fixed(w, reward=lambda x0: torch.where(absent, torch.nan, mean(x0))), step, torch.zeros(2))
    loss.values.sum().backward()
    assert w.grad[0].any() and loss.values[1] == 0 and not w.grad[1].any()


@pytest.mark.parametrize(
    ("options", "message"), [({"kl": -1.0}, "kl=-1.0: must be zero or positive"), ({"frames": 0}, "frames=0: must be positive")]
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ReFL(**options)


# ------------------------------------------------------------------------------------------------ on real pipelines


@pytest.mark.parametrize(("name", "guided"), [("sd15", False), ("sd3", True), ("wan", False)])
def test_runs(recipe, tmp_path, name, guided):
    """UNet, transformer with guidance, clips. The predicted picture's reward is near the real one's from so late a node, and
    climbing brightness for two steps makes the same pictures brighter."""
    trainer, rows = short_run(
        recipe,
        tmp_path,
        *NODES,
        "learning_rate=0.01",
        *(["objective.frames=2"] if name == "wan" else []),
        name=name,
        guided=guided,
    )
    assert rows[0]["predicted_reward"] == pytest.approx(rows[0]["reward"], abs=0.1)
    policy = trainer.policy
    drawn = {}
    for weights in ("policy", "reference"):
        with policy.using(weights):
            drawn[weights] = policy.decode(policy.rollout(["a cat"] * 4, range(4))).mean()
    assert drawn["policy"] > drawn["reference"]


def test_the_gradient_is_that_of_the_whole_pipeline(recipe, tmp_path):
    """By hand, through denoiser, guess, decoder and brightness, and the same from one batch of 4 or two of 2."""
    found = []
    for size in (4, 2):
        policy = Policy(tiny("sd3"), CALL["sd3"])
        options = [f"output_dir={tmp_path}/{size}", *NODES, "steps.kind=fixed", f"batch_size={size}", "checks=false"]
        trainer = Trainer(load_recipe(recipe, options), policy=policy)
        batches = list(trainer.rollout(0))
        if size == 4:
            (batch,) = batches
            (step,) = batch.steps
            v = policy.velocity(batch.texts, step)
            images = policy.decode(x0_from(step.x, v, step.t), batch.texts, with_graph=True)
            (-images.flatten(1).mean(1)).mean().backward()
            found.append(taken(policy))
        trainer.apply = lambda: 0.0
        trainer.update(batches, torch.zeros(4))
        found.append(taken(policy))
    assert len(found) == 3
    for key, gradient in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[key], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def taken(policy):
    """The gradients that are not 0 (LoRA's A has none while B is 0), and none any more."""
    gradients = {key: p.grad.clone() for key, p in policy.trainable().items() if p.grad is not None and p.grad.any()}
    assert gradients
    for p in policy.trainable().values():
        p.grad = None
    return gradients


def test_rewards_without_a_gradient_are_refused(recipe, tmp_path):
    """Before any weight is loaded, by name; and one that lies about it when it is asked."""
    options = [f"output_dir={tmp_path}/run", f"model={tmp_path}/nowhere", *NODES]
    with pytest.raises(
        ConfigError, match="refl climbs the gradient of its rewards; jpeg_size has none: train on those that have"
    ):
        Trainer(load_recipe(recipe, [*options, "rewards.jpeg_size=1"]))
    with pytest.raises(FileNotFoundError):
        Trainer(load_recipe(recipe, options))

    def cut(images, prompts):
        return [float(image.detach().mean()) for image in images]

    cut.traits = Traits(differentiable=True)
    policy = Policy(tiny("sd3"), CALL["sd3"])
    trainer = Trainer(load_recipe(recipe, [f"output_dir={tmp_path}/run", *NODES]), rewards={"cut": cut}, policy=policy)
    with pytest.raises(RewardError, match="'cut' says that it is differentiable, but its values carry no graph"):
        trainer.step()


def test_a_reward_that_abstains_wholly_changes_nothing(recipe, tmp_path):
    """One that can give no gradient now, as a reward of latents that has fallen behind: no error, no step."""

    def silent(images, prompts):
        return [float("nan")] * len(images) if images.requires_grad else [float(image.mean()) for image in images]

    silent.traits = Traits(differentiable=True)
    options = [f"output_dir={tmp_path}/run", *NODES, "checks=false", "weight_decay=0"]
    trainer = Trainer(load_recipe(recipe, options), rewards={"silent": silent}, policy=Policy(tiny("sd3"), CALL["sd3"]))
    before = {name: p.detach().clone() for name, p in trainer.policy.trainable().items()}
    assert trainer.step()["grad_norm"] == 0
    assert all(torch.equal(before[name], p) for name, p in trainer.policy.trainable().items())


def test_frames_are_of_clips(recipe, tmp_path):
    """On pictures they are refused; of a clip of 5, two frames in their order, and others for another batch."""
    with pytest.raises(ValueError, match="frames=2: this model draws pictures"):
        short_run(recipe, tmp_path, *NODES, "objective.frames=2", "checks=false")
    policy = Policy(tiny("wan"), CALL["wan"])
    batch = policy.rollout(["a cat"], [1], num_inference_steps=2)

    def first(images, prompts):
        return images.flatten(1).mean(1)

    seen = []
    for seed in range(6):
        batch.seeds = [seed]
        predict = PolicyPredict(policy, batch, rewards={"r": load_reward(first)})
        with torch.no_grad():
            whole, some = predict.pictures(batch.latents), predict.pictures(batch.latents, frames=2)
        seen.append([next(f for f in range(5) if torch.equal(whole[0, f], image)) for image in some[0]])
    assert all(a < b for a, b in seen) and len({tuple(pair) for pair in seen}) > 2


def test_steps_near_the_end_are_for_gradients_only(recipe, tmp_path):
    with pytest.raises(ConfigError, match="steps=late names nodes for the gradient of a reward.*grpo wants window"):
        Trainer(load_recipe(recipe, [f"output_dir={tmp_path}/run", "steps=late"]))
