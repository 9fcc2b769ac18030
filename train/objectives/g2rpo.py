"""G2RPO (Granular-GRPO), arXiv 2510.01982: one noisy step from a state that the group shares, judged at several granularities.

    x'_i = mu(x_k) + s z_i,    x0_i^l = ODE from x'_i to the end over every l-th node of the grid,    l in strides
    A_i  = sum_l sum_r w_r (R_r(x0_i^l) - mean_group) / std_group
    L    = GRPO's with A_i

All that the samples of a group differ by is z_i, so that the advantage is that noise's alone; and an end that coarser steps would
have reached counts too, so that it is not the luck of one grid. The loop runs and scores the further ends (recipe option
`strides`) and sums the advantages of all. One model call with gradient serves a group: where the policy is still the one that
sampled, the gradient in v is -J / (s D) mean_i(A_i z_i), the advantage-weighted mean of the noises (derived; in the tests).

As in the paper, each iteration trains one step k of the grid from one start per group. It accumulates 8 steps into an update;
here an update has one, drawn anew from the window each time: the same average over updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowrl.train.objectives.grpo import GRPO

if TYPE_CHECKING:
    from flowrl.config import Recipe


@dataclass(frozen=True)
class G2RPO(GRPO):
    """Options of G2RPO, those of GRPO. The recipe adds steps.size=1, branches=[num_generations] and strides=[1, 2]."""

    def check(self, recipe: Recipe, trained: Sequence[int]) -> None:
        """Raises ValueError unless the group shares one state, in which it draws its only noise."""
        if len(trained) != 1 or recipe.branches != [recipe.num_generations]:
            raise ValueError(
                "a group draws its only noise in one shared state: set steps={name: window, size: 1} and "
                f"branches=[{recipe.num_generations}] (here: {len(trained)} noisy steps, branches={recipe.branches})"
            )
