"""Checks that stop a broken run before its first update, each with the cause named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowrl.batch import Point, Samples

if TYPE_CHECKING:
    from flowrl.train.predict import PolicyPredict
    from flowrl.train.trainer import Trainer


class CheckFailed(RuntimeError):
    """A run that cannot work; the message names the cause."""


def check_run(trainer: Trainer, batches: list[Samples], scores: Tensor) -> None:
    """Run every check on the first rollout. Raises CheckFailed. Leaves weights and gradients as they were."""
    needs = trainer.objective.needs
    if trainer.data is None:
        check_groups(batches, trainer.recipe.num_generations)
        check_rewards(scores, list(trainer.rewards))
    if needs.trajectory:
        check_steps(batches[0], trainer.recipe.num_inference_steps)
        check_replay(trainer, batches[0])
    point, _ = next(trainer.points(batches[0]))
    predict = trainer.predict(batches[0])
    if needs.reference and trainer.recipe.lora is None:
        check_reference(predict, point)
    check_gradient(trainer, predict, point)
    check_weights_matter(trainer, predict, point)


def check_groups(batches: list[Samples], num_generations: int) -> None:
    """Every group is complete in this process, and its members differ."""
    group = torch.cat([batch.group for batch in batches])
    ids, counts = group.unique(return_counts=True)
    if not bool((counts == num_generations).all()):
        raise CheckFailed(
            f"group {int(ids[counts != num_generations][0])} has {int(counts[counts != num_generations][0])} of "
            f"{num_generations} samples: a group crossed a process"
        )
    latents = torch.cat([batch.latents.flatten(1) for batch in batches])
    for i in ids[:2]:
        members = latents[group == i]
        if bool((members[0] == members[1:]).all()):
            raise CheckFailed(f"all samples of group {int(i)} are identical: the sampler draws no noise")


def check_pictures(samples: Samples, step: int) -> None:
    """Every decoded picture is finite: a reward would answer NaN to the others, which means that it abstains. Every step."""
    assert samples.images is not None
    broken = [i for i, image in enumerate(samples.images) if not bool(image.isfinite().all())]
    if broken:
        raise CheckFailed(
            f"{len(broken)} of the {len(samples)} pictures of step {step} are not finite, first for "
            f"{samples.texts[broken[0]]!r}: the weights have diverged (lower learning_rate), "
            "or the type cannot hold the model's values (try bfloat16 or float32)"
        )


def check_rewards(scores: Tensor, names: list[str]) -> None:
    """Every reward is finite somewhere and not one constant."""
    for k, name in enumerate(names):
        values = scores[:, k][~scores[:, k].isnan()]
        if len(values) == 0:
            raise CheckFailed(f"reward {name!r} abstained (NaN) on every sample: does it fit these prompts?")
        if len(values) > 1 and float(values.max() - values.min()) == 0:
            raise CheckFailed(
                f"reward {name!r} gave {float(values[0]):.4g} to all {len(values)} samples of the first rollout: "
                "it cannot teach anything"
            )


def check_steps(batch: Samples, num_inference_steps: int) -> None:
    """There are recorded steps, and the last one of the schedule is not among them."""
    indices = [step.index for step in batch.steps]
    if not indices:
        raise CheckFailed("no step was recorded: the schedule names no stochastic step, or the pipeline skipped it")
    if max(indices) >= num_inference_steps - 1:
        raise CheckFailed("the last step is among the trained ones; it is deterministic and its log-probability explodes")


def check_replay(trainer: Trainer, batch: Samples) -> None:
    """Replaying the rollout gives the same velocity, so the ratio is 1, and the reference is where the policy starts."""
    policy = trainer.policy
    exact = policy.autocast_dtype is None and trainer.recipe.dtype == "float32" and policy.device.type == "cpu"
    with torch.no_grad():
        for step in batch.steps:
            v = policy.velocity(batch.prompts, step)
            ratio = (step.gaussian(v).log_prob(step.x_next) - step.log_prob).exp()
            worst = float((ratio - 1).abs().max())
            if worst > (0 if exact else 1e-5):
                raise CheckFailed(
                    f"replaying step {step.index} gives a ratio {worst:.2g} away from 1 before any update: "
                    "rollout and update do not compute the same (other batch size, attention backend, dropout, "
                    "or a pipeline that draws its conditioning at random?)"
                )


def check_reference(predict: PolicyPredict, point: Point) -> None:
    """The reference is where the policy starts, at an update's every objective: the KL is 0, DPO's loss is ln 2."""
    with torch.no_grad():
        difference = float((predict(point) - predict.reference(point)).abs().max())
    if difference > 1e-5:
        raise CheckFailed(
            f"the reference's velocity differs from the policy's by {difference:.2g} before any update: "
            "the KL does not start at 0"
        )


def check_gradient(trainer: Trainer, predict: PolicyPredict, point: Point) -> None:
    """A test loss reaches trainable parameters, forward and backward, with finite gradients; nothing else gets any."""
    policy = trainer.policy
    trainable = policy.trainable()
    if not trainable:
        raise CheckFailed("no parameter trains")
    predict.forget()
    v = predict(point)
    if not v.requires_grad:
        raise CheckFailed("the pipeline's output carries no graph: its call runs under no_grad")
    v.float().square().mean().backward()
    gradients = [p.grad for p in trainable.values() if p.grad is not None]
    alive = any(bool(g.any()) for g in gradients)
    finite = all(bool(g.isfinite().all()) for g in gradients)
    for p in trainable.values():
        p.grad = None
    if not alive:
        raise CheckFailed("no trainable parameter receives a gradient: are they part of the denoiser that the pipeline calls?")
    if not finite:
        backend = trainer.recipe.attention_backend
        raise CheckFailed(
            "the test gradient is not finite"
            + (f": attention_backend={backend} may lack a correct backward, try native" if backend else "")
        )


def check_weights_matter(trainer: Trainer, predict: PolicyPredict, point: Point) -> None:
    """Moving the trainable weights moves the output (a LoRA that is not wired in would train nothing), and not the reference."""
    needs = trainer.objective.needs
    parameters = trainer.policy.trainable()
    own = {name: p.detach().clone() for name, p in parameters.items()}

    def outputs() -> tuple[Tensor, Tensor | None]:
        predict.forget()
        return predict(point), predict.reference(point) if needs.reference else None

    with torch.no_grad():
        before, reference = outputs()
        generator = torch.Generator().manual_seed(0)
        for p in parameters.values():
            p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.05)
        after, moved = outputs()
        for name, p in parameters.items():
            p.copy_(own[name])
    predict.forget()
    if bool((before == after).all()):
        raise CheckFailed("changing the trainable weights does not change the output: the adapters are not active")
    if reference is not None and moved is not None and not torch.equal(reference, moved):
        raise CheckFailed(
            "changing the trainable weights changes the reference too: it is the policy itself, and holds nothing back"
        )
