"""Every check fires on a run that is broken in just that way, names the cause, and leaves a healthy run as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flowrl import Policy, Trainer, load_recipe
from flowrl.train import trainer as loop
from flowrl.train.preflight import CheckFailed
from tests.pipelines import CALL, tiny


@pytest.fixture
def make(recipe, tmp_path):
    def make(*overrides: str, **options) -> Trainer:
        policy = Policy(tiny("sd3"), CALL["sd3"])
        return Trainer(load_recipe(recipe, [f"output_dir={tmp_path}/run", *overrides]), policy=policy, **options)

    return make


def denoiser(trainer: Trainer) -> torch.nn.Module:
    return trainer.policy.denoisers["transformer"]


def on_output(trainer: Trainer, change) -> None:
    """Change what the denoiser answers: change(velocity) -> velocity."""
    denoiser(trainer).register_forward_hook(lambda module, inputs, output: (change(output[0]),))


def test_checks_leave_a_healthy_run_as_it_was(make):
    """With and without checks the first step ends in the same weights, to the bit: nothing is left moved, and no gradient."""
    for options in ([], ["train=full", "objective.beta=0.1"]):
        with_checks, without = make(*options), make("checks=false", *options)
        with_checks.step()
        without.step()
        a, b = with_checks.policy.trainable(), without.policy.trainable()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_checks_can_be_switched_off_and_run_once(make):
    constant = {"r": lambda images, prompts: [1.0] * len(prompts)}
    make("checks=false", rewards=constant).step()
    trainer = make(rewards={"r": lambda images, prompts: images[:, 0, 0, 0] if trainer.progress.step == 0 else [1.0] * 4})
    trainer.step()
    trainer.step()


# ------------------------------------------------------------------------------------------------ samples and rewards


def test_a_group_that_is_split(make):
    trainer = make()
    rollout = trainer.rollout

    def split(step):
        batches = list(rollout(step))
        batches[0].group[-1] = 99
        return batches

    trainer.rollout = split
    with pytest.raises(CheckFailed, match="group 1 has 1 of 2 samples: a group crossed a process"):
        trainer.step()


def test_a_sampler_without_noise(make, monkeypatch):
    monkeypatch.setattr(loop, "sample_seed", lambda *numbers: 7)
    trainer = make(rewards={"r": lambda images, prompts: torch.arange(4.0)})
    with pytest.raises(CheckFailed, match="all samples of group 0 are identical: the sampler draws no noise"):
        trainer.step()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5] * 4, "reward 'mine' gave 0.5 to all 4 samples of the first rollout: it cannot teach anything"),
        ([None] * 4, r"reward 'mine' abstained \(NaN\) on every sample of step 1: does it fit these prompts?"),
    ],
)
def test_a_reward_that_says_nothing(make, values, message):
    with pytest.raises(CheckFailed, match=message):
        make(rewards={"mine": lambda images, prompts: values}).step()


def test_a_reward_that_falls_silent_later(make):
    """NaN everywhere stops a run in any step, not only in the first."""
    trainer = make(rewards={"r": lambda images, prompts: [None] * 4 if trainer.progress.step else images[:, 0, 0, 0]})
    trainer.step()
    with pytest.raises(CheckFailed, match=r"abstained \(NaN\) on every sample of step 2"):
        trainer.step()


def test_weights_that_diverged(make):
    """A learning rate of 1e30: the next rollout's pictures are NaN, which a reward would pass on as 'abstains'."""
    trainer = make("learning_rate=1e30")
    trainer.step()
    with pytest.raises(CheckFailed, match=r"4 of the 4 pictures of step 2 are not finite.*lower learning_rate"):
        trainer.step()


# ------------------------------------------------------------------------------------------------ steps


def test_no_step_is_trained(make):
    trainer = make()
    trainer.schedule = SimpleNamespace(steps=lambda *_: [])
    with pytest.raises(CheckFailed, match="no step was recorded"):
        trainer.step()


def test_the_last_step_is_trained(make):
    """Its standard deviation is 0 for CPS; FlowSDE's is not, and its log-probability explodes."""
    trainer = make("transition=flow_sde")
    trainer.schedule = SimpleNamespace(steps=lambda num_steps, seed, step: [num_steps - 1])
    with pytest.raises((CheckFailed, ValueError), match="last step"):
        trainer.step()


# ------------------------------------------------------------------------------------------------ replay


def test_a_denoiser_with_noise_of_its_own(make):
    """Dropout left on, or conditioning drawn at random: rollout and update differ."""
    trainer = make()
    on_output(trainer, lambda v: v + 1e-3 * torch.randn_like(v))
    with pytest.raises(CheckFailed, match=r"replaying step 0 gives a ratio .* away from 1 before any update"):
        trainer.step()


def test_a_reference_that_is_not_where_the_policy_starts(make):
    trainer = make("train=full", "objective.beta=0.1")
    for tensor in trainer.policy.snapshots["reference"].values():
        tensor.add_(0.01)
    with pytest.raises(CheckFailed, match=r"the reference's velocity differs from the policy's by .* KL does not start at 0"):
        trainer.step()


@pytest.mark.parametrize("objective", ["objective={name: grpo, beta: 0.1}", "objective=dgpo"])
def test_a_reference_that_is_the_policy_itself(make, objective):
    """The copy shares its memory with the weights that train: the KL would stay 0, DPO's loss ln 2, for ever."""
    trainer = make("train=full", objective)
    trainer.policy.snapshots["reference"] = {key: p.data for key, p in trainer.policy.trainable().items()}
    with pytest.raises(CheckFailed, match="changes the reference too: it is the policy itself, and holds nothing back"):
        trainer.step()


# ------------------------------------------------------------------------------------------------ gradient


def test_nothing_trains(make):
    trainer = make()
    denoiser(trainer).requires_grad_(False)
    with pytest.raises(CheckFailed, match="no parameter trains"):
        trainer.step()


def test_an_output_without_a_graph(make):
    trainer = make()
    on_output(trainer, torch.Tensor.detach)
    with pytest.raises(CheckFailed, match="the pipeline's output carries no graph"):
        trainer.step()


def test_weights_that_the_pipeline_does_not_call(make):
    """Trainable parameters beside the path from prompt to picture: something else carries the graph."""
    trainer = make()
    elsewhere = torch.zeros(1, requires_grad=True)
    parameters = list(trainer.policy.trainable().values())
    denoiser(trainer).disable_adapters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    on_output(trainer, lambda v: v + elsewhere)
    with pytest.raises(CheckFailed, match="no trainable parameter receives a gradient"):
        trainer.step()


def test_a_backward_pass_that_gives_nan(make):
    trainer = make()
    next(iter(trainer.policy.trainable().values())).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(CheckFailed, match="the test gradient is not finite"):
        trainer.step()
    trainer.recipe.attention_backend = "flash"
    with pytest.raises(CheckFailed, match="attention_backend=flash may lack a correct backward, try native"):
        trainer.step()


def test_a_gradient_that_becomes_nan_later(make):
    trainer = make("checks=false")
    next(iter(trainer.policy.trainable().values())).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(CheckFailed, match="the gradient of update 1 is not finite: lower learning_rate"):
        trainer.step()


def test_weights_that_do_not_matter(make):
    """A cache that answers with an old output while gradients still flow (feature caching): training would change nothing."""
    trainer = make()
    kept = {}

    def cached(v):
        first = kept.setdefault(v.shape, v.detach().clone())
        return first + (v - v.detach())

    on_output(trainer, cached)
    with pytest.raises(CheckFailed, match="changing the trainable weights does not change the output"):
        trainer.step()
