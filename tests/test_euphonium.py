"""Euphonium: two clipped losses, advantages of each step by a process reward, leaning rollouts in the loop."""

from __future__ import annotations

import pytest
import torch

from flowrl.batch import Step
from flowrl.config import ConfigError
from flowrl.samplers import DanceSDE
from flowrl.train import trainer as loop
from flowrl.train.advantages import normalized
from flowrl.train.objectives import GRPO, Euphonium
from tests.objectives import Fixed, finite_difference, make_step, short_run
from tests.test_trainer import make

RUN = ["objective={name: euphonium, beta: 0.05, last: 0.6}", "transition={name: dance_sde, noise_level: 0.4}"]


class Mean:
    """How large the latents are on average, noisy or not; it has no opinion on prompts that speak of cats."""

    name = "mean"

    def __init__(self, abstains=()):
        self.abstains, self.asked = abstains, []

    def __call__(self, samples):
        return self.noisy(samples.latents.float().cpu(), torch.zeros(len(samples)), samples.texts)

    def noisy(self, x, t, prompts):
        self.asked.append((x.shape, t, torch.is_grad_enabled()))
        silent = torch.tensor([text in self.abstains for text in prompts], device=x.device)
        return x.flatten(1).mean(1).masked_fill(silent, torch.nan)


def test_value_by_hand():
    """One latent, Dance with g = 1, t = 0.5, t' = 0.25, x = 0, sampled from v = 0 at 0.5; v = -0.4 gives rho = 1.29046. A = 2 and
    A_process = -1: values 0.5 * (-2 * 1.2), penalty 3 * 1.29046; with A = -2 and A_process = 9 (held at 5): 0.5 * 2 * 1.29046 and
    3 * (-5 * 1.2)."""
    x, x_next = torch.zeros(2, 1), torch.full((2, 1), 0.5)
    old = DanceSDE(1.0).transition(x, torch.zeros(2, 1), 0.5, 0.25, 0.9).log_prob(x_next)
    step = Step(x, x_next, 0.5, 0.25, 0.9, old, 0, DanceSDE(1.0), process=torch.tensor([-1.0, 9.0]))
    objective = Euphonium(epsilon=0.2, outcome_weight=0.5, process_weight=3.0)
    loss = objective.loss(Fixed(torch.full((2, 1), -0.4)), step, torch.tensor([2.0, -2.0]))
    assert loss.values.tolist() == pytest.approx([-1.2, 1.29046], abs=1e-4)
    assert loss.penalty.tolist() == pytest.approx([3 * 1.29046, -18], abs=1e-3)
    assert torch.equal(loss.metrics["process_loss"], loss.penalty.detach())


def test_without_process_weight_it_is_grpo_and_pulls_add_up():
    step, v, _ = make_step()
    step.process = torch.tensor([1.0, -1.0])
    A, predict = torch.tensor([1.0, 2.0]), Fixed(v + 0.1, v)
    plain = GRPO(beta=0.2).loss(predict, step, A)
    ours = Euphonium(process_weight=0.0, kl=0.2).loss(predict, step, A)
    torch.testing.assert_close(ours.total, plain.total)
    both = Euphonium(process_weight=1.0, kl=0.2).loss(predict, step, A)
    torch.testing.assert_close(both.penalty, plain.penalty + GRPO().loss(predict, step, step.process).values)


def test_gradient_against_finite_differences():
    step, v, _ = make_step(batch=1)
    step.process = torch.tensor([-1.5])
    objective = Euphonium(epsilon=0.5, kl=0.3)
    ours, numeric = finite_difference(lambda w: objective.loss(Fixed(w, v - 0.1), step, torch.tensor([0.7])).total, v + 0.05)
    torch.testing.assert_close(ours, numeric, rtol=2e-2, atol=1e-3)


def test_splitting_a_batch_changes_nothing():
    step, v, _ = make_step(batch=4)
    step.process, A = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([1.0, -1.0, 0.5, 2.0])
    whole = Euphonium().loss(Fixed(v + 0.01), step, A).total
    for rows in (torch.tensor([0, 1]), torch.tensor([2, 3])):
        part = Euphonium().loss(Fixed(v[rows] + 0.01), step.select(rows), A[rows]).total
        assert torch.allclose(part, whole[rows], atol=1e-6)


def test_advantages_of_each_step(recipe, tmp_path):
    """By hand: the process reward of where each step led, normalised in the group at that step, whatever the batches are; who
    abstains has 0. The reward is asked at the next node's time, without a graph."""
    for size in (8, 2):
        reward = Mean(abstains=["blue"])
        trainer = make(
            recipe, tmp_path / str(size), *RUN, "num_generations=4", f"batch_size={size}", rewards={"mean": reward},
            prompts=["a red circle", "blue"],
        )  # fmt: skip
        batches, samples, _, _, metrics = trainer.collect(loop._Clock())
        means = []
        for k in range(2):
            raw = torch.cat([batch.steps[k].x_next.flatten(1).mean(1) for batch in batches])
            raw[torch.tensor([text == "blue" for text in samples.texts])] = torch.nan
            means.append(float(raw.nanmean()))
            process = torch.cat([batch.steps[k].process for batch in batches])
            torch.testing.assert_close(process, normalized(raw, samples.group).nan_to_num(0.0))
            assert process.abs().sum() > 1 and not process[raw.isnan()].any()
        asked = [t for shape, t, graph in reward.asked if not graph and len(shape) == 4 and shape[0] == size and t[0] > 0]
        assert {round(float(t[0]), 5) for t in asked} == {round(step.t_next, 5) for step in batches[0].steps}
        assert metrics["process_reward"] == pytest.approx(sum(means) / 2, rel=1e-4)


def test_a_guided_rollout_leans_where_it_should(recipe, tmp_path):
    """last=0.6 of three steps: step 1 leans, step 0 does not. The mean of the latents rises against the same rollout with
    guide=false; log-probs are of the law without the lean; who abstains does not lean."""
    batches = []
    for guide in ("true", "false"):
        trainer = make(
            recipe, tmp_path / guide, *RUN, f"objective.guide={guide}", "objective.beta=0.01",
            rewards={"mean": Mean(abstains=["blue"])}, prompts=["a red circle", "blue"],
        )  # fmt: skip
        batches += trainer.rollout(0)
    leaning, plain = batches
    red = torch.tensor([text != "blue" for text in plain.texts])
    assert torch.equal(leaning.steps[0].native_next, plain.steps[0].native_next)
    moved = leaning.steps[1].x_next - plain.steps[1].x_next
    step = plain.steps[1]
    expected = float(step.transition.std(step.t, step.t_next, step.t_max)) ** 2 / 2 / 0.01 / moved[0].numel()
    torch.testing.assert_close(moved[red], torch.full_like(moved[red], expected), rtol=1e-3, atol=1e-5)
    assert not moved[~red].any() and torch.equal(leaning.latents[~red], plain.latents[~red])
    law = leaning.steps[1].gaussian(trainer.policy.velocity(leaning.texts, leaning.steps[1]).detach())
    torch.testing.assert_close(leaning.steps[1].log_prob, law.log_prob(leaning.steps[1].x_next))


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_a_run_of_each_family(recipe, tmp_path, name):
    """With a weight of 0 in the pictures' reward, and groups that start from one noise."""
    rewards = {"brightness": loop.load_rewards({"brightness": 1.0})["brightness"][0], "mean": Mean()}
    options = ["rewards.mean=0", "branches=[2]", "steps={name: all_but_last}"]
    trainer, rows = short_run(recipe, tmp_path, *RUN, *options, name=name, steps=1, rewards=rewards)
    assert rows[0]["process_loss"] == pytest.approx(0, abs=1e-5) and rows[0]["ratio_deviation"] == 0
    assert rows[0]["reward"] == pytest.approx(rows[0]["rewards/brightness/mean"], rel=1e-5)
    (batch,) = trainer.rollout(1)
    assert len(batch.steps[0].native) == 2, "the group shares its first state"


def test_dense_credit_trains_where_pictures_have_none(recipe, tmp_path):
    """All pictures score alike: the outcome says nothing, the steps do, and the weights move."""
    flat = {"flat": lambda images, prompts: [0.0] * len(images), "mean": Mean()}
    trainer = make(recipe, tmp_path, *RUN, "rewards.mean=0", "checks=false", rewards=flat)
    before = {key: p.detach().clone() for key, p in trainer.policy.trainable().items()}
    metrics = trainer.step()
    assert metrics["policy_loss"] == 0 and metrics["grad_norm"] > 0
    assert any(not torch.equal(before[key], p) for key, p in trainer.policy.trainable().items())


def test_what_is_refused(recipe, tmp_path):
    for options in ({"epsilon": 0}, {"beta": 0}, {"process_weight": -1}, {"kl": -1}, {"last": 0}, {"last": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            Euphonium(**options)
    with pytest.raises(ConfigError, match=r"wants a reward of noisy states, and none of brightness is one.*tiny_latent=0"):
        make(recipe, tmp_path, *RUN, f"model={tmp_path}/nowhere")
    with pytest.raises(ConfigError, match="euphonium needs a stochastic sampler"):
        make(recipe, tmp_path, *RUN, "transition.noise_level=0")
