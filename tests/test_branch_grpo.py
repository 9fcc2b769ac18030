"""BranchGRPO: advantages of edges by depth, and trees in the loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowrl.config import ConfigError
from flowrl.train.advantages import normalized
from flowrl.train.objectives import GRPO, BranchGRPO
from flowrl.train.objectives.branch_grpo import edge_advantages
from tests.objectives import Fixed, make_step, short_run
from tests.test_trainer import make

TREE = ["objective=branch_grpo", "branches=[2, 2]", "num_generations=4", "batch_size=8"]


def tree():
    """Two prompts with four leaves each: one start, two states after the first step, four after the second."""
    first, _, _ = make_step(batch=8)
    group = torch.tensor([0] * 4 + [1] * 4)
    first.owner, first.group = torch.tensor([0] * 4 + [1] * 4), group
    second = replace(first, index=first.index + 1, owner=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), group=group)
    return first, second


def test_by_hand():
    """Leaves 3, 1, 0, -4 of the first prompt: edges at the first step are worth 2 and -2, so +-1 / sqrt(2) of their deviation
    (sample) from 0, while the leaves keep the z-scores of 3, 1, 0, -4. A prompt whose edges are level at the first step (1, -1
    and -1, 1) has advantage 0 there, and its leaves do not."""
    first, second = tree()
    leaves = torch.tensor([3.0, 1.0, 0.0, -4.0, 1.0, -1.0, -1.0, 1.0])
    r = 2**-0.5
    assert edge_advantages(leaves, first, second).tolist() == pytest.approx([r, r, -r, -r, 0, 0, 0, 0], abs=1e-6)
    late = edge_advantages(leaves, second, None)
    torch.testing.assert_close(late, normalized(leaves, first.group))
    assert late[:4].tolist() == pytest.approx([v / (26 / 3) ** 0.5 for v in (3.0, 1.0, 0.0, -4.0)], rel=1e-5)


def test_shift_and_scale_of_the_rewards_do_not_matter():
    first, second = tree()
    leaves = torch.randn(8, generator=torch.Generator().manual_seed(0))
    for step, following in ((first, second), (second, None)):
        ours = edge_advantages(leaves, step, following)
        torch.testing.assert_close(edge_advantages(3 * leaves + 7, step, following), ours, rtol=1e-4, atol=1e-5)


def test_the_loss_is_grpos_with_the_edges_advantages():
    first, second = tree()
    leaves, v = torch.randn(8), torch.randn(8, 3, 2)
    predict = Fixed(v)
    predict.steps = [first, second]
    expected = GRPO().loss(predict, first, edge_advantages(leaves, first, second)).values
    assert torch.equal(BranchGRPO().loss(predict, first, leaves).values, expected)
    assert not torch.allclose(GRPO().loss(predict, first, leaves).values, expected)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_a_run_of_each_family(recipe, tmp_path, name):
    """Leaves of one edge get one advantage, those of a step sum to zero; edges of the first step differ by the branch alone."""
    trainer, rows = short_run(recipe, tmp_path, *TREE, "branch_spread=4", name=name, steps=1)
    assert rows[0]["clip_ratio"] == 0 and rows[0]["grad_norm"] > 0
    (batch,) = trainer.rollout(5)
    first, second = batch.steps
    assert first.owner.tolist() == [0] * 4 + [1] * 4 and second.owner.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    A = edge_advantages(torch.randn(8), first, second).reshape(2, 2, 2)
    assert torch.equal(A[:, :, 0], A[:, :, 1]) and A.sum((1, 2)).abs().max() < 1e-5
    assert all(torch.equal(*first.native_next[pair : pair + 2]) for pair in (0, 2, 4, 6))


def test_recipes_without_a_tree(recipe, tmp_path):
    for wrong in ("branches=[]", "branches=[4]"):
        with pytest.raises(ConfigError, match=r"branch_grpo: branches=.* is no tree: splits at two steps or more"):
            make(recipe, tmp_path, *TREE, wrong)
    with pytest.raises(ConfigError, match="a batch holds whole groups"):
        make(recipe, tmp_path, *TREE, "batch_size=2")
