"""B2-DiffuRL: which branches are kept, with what weight, and that training begins at the end of the trajectory."""

from __future__ import annotations

import pytest
import torch

from flowrl.batch import Prompt, Samples
from flowrl.train.objectives import GRPO, B2DiffuRL
from tests.objectives import Fixed, make_step, short_run
from tests.test_trainer import make

SETS = ["objective=b2diffurl", "steps={name: backward, size: 1, every: 1}", "branches=[3]"]
SETS += ["num_generations=6", "batch_size=12", "transition={name: ddim, eta: 1.0}", "num_inference_steps=4"]


def samples(group, start=None):
    n = len(group)
    start = None if start is None else torch.tensor(start)
    return Samples([Prompt("a")] * n, list(range(n)), torch.tensor(group), torch.randn(n, 4), start=start)


def test_what_is_kept_by_hand():
    """Sets of three. [0.2, 1.3, -0.9]: best 1.3 and worst -0.9. [0.4, 0.4, -0.5]: only the worst, at the threshold.
    [0.6, 0.7, 0.8]: only the best, as even the worst is good. [0, 0.1, -0.1]: none. beta1 = 2 and beta2 = 0.5 weigh them."""
    A = torch.tensor([0.2, 1.3, -0.9, 0.4, 0.4, -0.5, 0.6, 0.7, 0.8, 0.0, 0.1, -0.1])
    batch = samples([0] * 6 + [1] * 6, [7] * 3 + [8] * 3 + [7] * 3 + [9] * 3)
    rows, values = B2DiffuRL().choose(batch, A)
    assert rows.tolist() == [1, 2, 5, 8] and values.tolist() == pytest.approx([1.3, -0.9, -0.5, 0.8])
    rows, values = B2DiffuRL(beta1=2.0, beta2=0.5).choose(batch, A)
    assert rows.tolist() == [1, 2, 5, 8] and values.tolist() == pytest.approx([2.6, -0.45, -0.25, 1.6])
    rows, _ = B2DiffuRL(threshold=0.7).choose(batch, A)
    assert rows.tolist() == [1, 2, 8]
    rows, values = B2DiffuRL(threshold=5.0).choose(batch, A)
    assert rows.dtype == torch.int64 and len(rows) == len(values) == 0


def test_sets_are_of_one_prompt_and_one_start():
    """Equal starts under two prompts are two sets; without branches a prompt's group is the set."""
    A = torch.tensor([1.0, -1.0, 2.0, -2.0])
    assert B2DiffuRL().choose(samples([0, 0, 1, 1], [5, 5, 5, 5]), A)[0].tolist() == [0, 1, 2, 3]
    assert B2DiffuRL().choose(samples([0, 0, 0, 0], [5, 5, 6, 6]), A)[0].tolist() == [0, 1, 2, 3]
    assert B2DiffuRL().choose(samples([0, 0, 0, 0]), A)[0].tolist() == [2, 3]


def test_the_loss_is_grpos():
    step, v, _ = make_step()
    A = torch.tensor([1.0, -1.0])
    assert torch.equal(
        B2DiffuRL(epsilon=1e-4).loss(Fixed(v + 0.1), step, A).values, GRPO(epsilon=1e-4).loss(Fixed(v + 0.1), step, A).values
    )


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_a_run_of_each_family(recipe, tmp_path, name):
    """Two prompts, two starts each, three branches: at most two of each set are trained on, at first on the last noisy step,
    then on two; the branches of a set part where training begins."""
    trainer, rows = short_run(recipe, tmp_path, *SETS, "objective.threshold=0.3", name=name, steps=1)
    assert 0 < rows[0]["rows"] <= 8
    for step, indices in ((0, [2]), (1, [1, 2]), (9, [0, 1, 2])):
        (batch,) = trainer.rollout(step)
        assert [recorded.index for recorded in batch.steps] == indices
        assert len(batch.steps[0].native) == 4 and batch.start.unique(return_counts=True)[1].tolist() == [3, 3, 3, 3]


def test_the_gradient_is_the_mean_over_what_was_kept(recipe, tmp_path):
    """Of one step with the advantages given: the rows' own losses, averaged over the rows, from one batch or from two."""
    A = torch.tensor([1.0, 0.0, -1.0, 0.2, 0.0, -0.2, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = []

    def gradient(trainer):
        found.append(torch.cat([p.grad.flatten() for p in trainer.policy.trainable().values() if p.grad is not None]))
        for p in trainer.policy.trainable().values():
            p.grad = None
        return 0.0

    for size in (12, 6):
        trainer = make(recipe, tmp_path / str(size), *SETS, f"batch_size={size}")
        trainer.apply = lambda t=trainer: gradient(t)
        batches = list(trainer.rollout(0))
        assert trainer.update(batches, A)["rows"] == 3
        if size == 12:
            part = batches[0].select([0, 2, 6])
            trainer.objective.loss(trainer.predict(part), part.steps[0], A[[0, 2, 6]]).values.mean().backward()
            gradient(trainer)
    for other in found[1:]:  # the last noisy step divides rounding by its little noise
        assert (other - found[0]).norm() < 1e-2 * found[0].norm()


def test_a_step_in_which_nothing_is_kept_changes_nothing(recipe, tmp_path):
    trainer = make(recipe, tmp_path, *SETS, "objective.threshold=100")
    before = {key: p.detach().clone() for key, p in trainer.policy.trainable().items()}
    assert trainer.step()["rows"] == 0
    assert all(torch.equal(before[key], p) for key, p in trainer.policy.trainable().items())


def test_what_is_refused():
    for options in ({"threshold": 0}, {"beta1": -1}, {"epsilon": 0}, {"beta": -1}):
        with pytest.raises(ValueError, match="must be"):
            B2DiffuRL(**options)
