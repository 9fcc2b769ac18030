"""Euphonium: a rollout whose noisy steps lean towards a process reward r_phi(x, t), recorded as if they had not leant.

    mean = x - h v + g^2 h / 2 (score + grad_x r_phi / beta)        x' = mean + g sqrt(h) z

so a step's mean moves by std^2 / 2 grad r_phi / beta: half of Doob's drift, in its direction. With r_phi = 0 the rollout is
`Policy.rollout`, bit for bit. The recorded log-prob is that of the unguided step, as in the released code: the update then pulls
the policy towards the guided moves, so that sampling needs no guidance later. No importance weight corrects for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowrl.batch import Prompt, Samples
from flowrl.data import generators
from flowrl.samplers.scheduler import stochastic_step
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

    def shift(self, reward: ProcessReward, x: Tensor, t: float, prompts: Sequence[Prompt], std: Tensor) -> Tensor:
        """What is added to the mean of a step, (B, ...)."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            times = torch.full((len(x),), float(t), device=x.device)
            g = gradient(reward(leaf, times, [prompt.text for prompt in prompts]), leaf)
        if self.normalize:
            g = g / g.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, *[1] * (g.dim() - 1))
        return langevin_shift(std, g) / self.beta


def guided_rollout(
    policy: Policy,
    prompts: Sequence[str | Prompt],
    seeds: Sequence[int],
    *,
    process_reward: ProcessReward,
    guidance: Euphonium,
    transition: Transition,
    stochastic: Collection[int],
    init_seeds: Sequence[int] | None = None,
    group: Tensor | None = None,
    keep_velocity: bool = False,
    **call: Any,
) -> Samples:
    """`Policy.rollout` with leaning steps: same seeds, same noise, same records."""
    items = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    rngs = generators(seeds, offset=1)
    latents, node, steps = None, 0, []
    for index in sorted(stochastic):
        native, v, grid = policy.trunk(items, init_seeds or seeds, index, latents, node, **call)
        noise = randn_tensor(native.shape, generator=rngs, device=native.device, dtype=torch.float32)
        step = stochastic_step(grid, transition, native, v, index, index + 1, noise)
        if index >= round((len(grid.t) - 1) * (1 - guidance.last)):
            law = step.gaussian(v)
            lean = guidance.shift(process_reward, step.x, step.t, items, torch.as_tensor(law.std))
            step.native_next = (step.scale_next * (law.sample(noise) + lean)).to(native.dtype)
            step.log_prob = law.log_prob(step.x_next)
        step.v = v if keep_velocity else None
        steps.append(step)
        latents, node = step.native_next, index + 1
    ends = policy.rollout(items, seeds, init_seeds=init_seeds, latents=latents, start=node, **call)
    groups = torch.arange(len(items)) if group is None else group.to(torch.int64)
    return Samples(prompts=items, seeds=list(map(int, seeds)), group=groups, latents=ends.latents, steps=steps)
