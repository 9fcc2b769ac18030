"""Euphonium: a rollout whose noisy steps lean towards a process reward r_phi(x, t), recorded as if they had not leant.

    mean = x - h v + g^2 h / 2 (score + grad_x r_phi / beta)        x' = mean + g sqrt(h) z

so a step's mean moves by std^2 / 2 grad r_phi / beta: half of Doob's drift, in its direction. With r_phi = 0 the rollout is
`Policy.rollout`, bit for bit. The recorded log-prob is that of the unguided step, as in the released code: the update then pulls
the policy towards the guided moves, so that sampling needs no guidance later. No importance weight corrects for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowrl.batch import Prompt, Samples
from flowrl.samplers.branching import branched_rollout
from flowrl.samplers.scheduler import Grid
from flowrl.samplers.steering.guidance import gradient
from flowrl.samplers.steering.loop import check_positive
from flowrl.samplers.steering.tilt import langevin_shift
from flowrl.samplers.transitions import Transition

if TYPE_CHECKING:
    from flowrl.policy import Policy

#: A process reward: (x (B, ...) in flow coordinates, t (B,), prompts) -> (B,), differentiable in x; `noisy` of a reward.
ProcessReward = Callable[[Tensor, Tensor, list[str]], Tensor]


@dataclass(frozen=True)
class Euphonium:
    """How much a rollout leans, and where."""

    beta: float = 3.125  #: KL weight: the smaller, the stronger. Released run: 3.125 with noise level 0.25.
    last: float = 0.25  #: Part of the denoising steps, counted from the end, that are guided. Released run: 12 to 15 of 16.
    normalize: bool = False  #: Divide the gradient of a sample by its norm.

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        if not 0 < self.last <= 1:
            raise ValueError(f"last={self.last} is a part of the steps, in (0, 1]: try 0.25")

    def lean(
        self,
        reward: ProcessReward,
        transition: Transition,
        grid: Grid,
        index: int,
        native: Tensor,
        prompts: Sequence[Prompt],
    ) -> Tensor | None:
        """What the steps from states (U, ...) at node `index` lean by, (U, ...) in flow coordinates; None for not at all."""
        if index < round((len(grid.t) - 1) * (1 - self.last)):
            return None
        t = grid.t[index]
        with torch.enable_grad():
            x = (native.detach().float() / grid.scale(t)).requires_grad_()
            values = reward(x, torch.full((len(x),), t, device=x.device), [prompt.text for prompt in prompts])
            g = gradient(values, x)
        rows = (-1, *[1] * (g.dim() - 1))
        g = g.where(~values.detach().isnan().reshape(rows), 0.0)  # who abstains does not lean
        if self.normalize:
            g = g / g.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(rows)
        return langevin_shift(transition.std(t, grid.t[index + 1], grid.t_max).to(g), g) / self.beta


def guided_rollout(
    policy: Policy,
    prompts: Sequence[str | Prompt],
    seeds: Sequence[int],
    *,
    process_reward: ProcessReward,
    guidance: Euphonium,
    transition: Transition,
    stochastic: Sequence[int],
    init_seeds: Sequence[int] | None = None,
    **call: Any,
) -> Samples:
    """`Policy.rollout`, or `branched_rollout` with all it takes, with leaning steps: same seeds, same noise, same records."""
    return branched_rollout(
        policy,
        prompts,
        seeds,
        init_seeds=init_seeds or seeds,
        transition=transition,
        stochastic=stochastic,
        lean=partial(guidance.lean, process_reward, transition),
        **call,
    )
