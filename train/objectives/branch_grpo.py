"""BranchGRPO, arXiv 2509.06040: GRPO on the edges of a tree of trajectories, each depth with advantages of its own.

    R(edge) = mean of the rewards of the leaves behind it,    A(edge) = (R - mean) / std over the edges of one depth of a prompt
    L       = GRPO's, over all edges

An early edge stands for many leaves and its mean reward spreads less than theirs: normalised by itself, it counts as much as a
late one. Computed from the leaves' advantages, which are their rewards up to shift and scale (with several rewards: their
balanced sum). The loss is a mean over leaves; edges of one depth have equally many, so that is the mean over edges.

The noise of branches is the paper's, (xi_0 + s xi_b) / sqrt(1 + s^2) (recipe option `branch_spread`: s, paper 4); the released
code draws independent noise four times too wide for its own log-prob. Pruning, and soft node values, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowrl.batch import Loss, Step
from flowrl.train.advantages import group_mean_std, normalized
from flowrl.train.objectives.base import Needs, Predict
from flowrl.train.objectives.grpo import GRPO

if TYPE_CHECKING:
    from flowrl.config import Recipe


@dataclass(frozen=True)
class BranchGRPO(GRPO):
    """Options of BranchGRPO, those of GRPO. The recipe adds `branches`, as [2, 2, 2], and `branch_spread`."""

    @property
    def needs(self) -> Needs:
        return Needs(unit="group", reference=self.beta > 0)

    def check(self, recipe: Recipe, trained: Sequence[int]) -> None:
        """Raises ValueError for a recipe without a tree."""
        if len(recipe.branches) < 2:
            raise ValueError(
                f"branches={recipe.branches} is no tree: splits at two steps or more, as in branches=[2, 4], whose product "
                f"divides num_generations={recipe.num_generations}"
            )

    def loss(self, predict: Predict, step: Step, advantage: Tensor) -> Loss:
        """Loss per leaf (B,) at one recorded step. advantage: (B,) fp32, of the leaves."""
        edges = edge_advantages(advantage, step, next((s for s in predict.steps if s.index > step.index), None))
        return super().loss(predict, step, edges)


def edge_advantages(advantage: Tensor, step: Step, following: Step | None) -> Tensor:
    """(B,) for each leaf the advantage of its edge at this step. advantage: (B,) of the leaves of whole groups.

    following: the next recorded step, in whose states the edges end; None after the last one, where each leaf has its own.
    """
    assert step.group is not None
    shared = None if following is None else following.owner
    edge = torch.arange(len(advantage)) if shared is None else shared.cpu()
    value, _, _ = group_mean_std(advantage.cpu(), edge)
    first = torch.tensor([int((edge == e).nonzero()[0]) for e in range(int(edge.max()) + 1)])
    return normalized(value[first], step.group.cpu()[first])[edge].to(advantage)
