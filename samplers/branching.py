"""Trees of trajectories: samples that share their past until noise parts them.

A branch point is a state in which several samples stand. It is computed once in the rollout, and its one model call with
gradient serves all its samples in the update (`Step.owner`). Every scheme is a choice of which noises are equal:

    shared start     equal initial noise in a group, independent noise after it: Flow-GRPO-Fast, MixGRPO
    one SDE step     the same with a single stochastic step: G2RPO's singular stochastic sampling, TempFlow-GRPO's branching
    tree             equal noise inside a branch until its next split: BranchGRPO, B2-DiffuRL
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowrl.batch import Prompt, Samples
from flowrl.data import generators
from flowrl.samplers.scheduler import stochastic_step
from flowrl.samplers.transitions import Transition

if TYPE_CHECKING:
    from flowrl.policy import Policy


def branched_rollout(
    policy: Policy,
    prompts: Sequence[str | Prompt],
    seeds: Sequence[int],
    *,
    init_seeds: Sequence[int],
    transition: Transition,
    stochastic: Sequence[int],
    noise_seeds: Sequence[Sequence[int]] | None = None,
    group: Tensor | None = None,
    keep_velocity: bool = False,
    stride: int = 1,
    **call: Any,
) -> Samples:
    """`Policy.rollout` for B samples of which some share their past; equal to it up to rounding where none do.

    Samples with the same prompt and init seed start from one state. noise_seeds: for each stochastic step, B seeds of its
    noise; samples in one state with one seed stay together. By default every sample has its own from the first stochastic
    step on. stride: after the last stochastic step, follow the ODE over every stride-th node (G2RPO's granularities).
    """
    items = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    rngs = generators(seeds, offset=1)
    owner = _number([(item.text, init) for item, init in zip(items, init_seeds, strict=True)])
    latents, node, steps = None, 0, []
    for k, index in enumerate(sorted(stochastic)):
        first = _first(owner)
        state, v, grid = policy.trunk([items[b] for b in first], [init_seeds[b] for b in first], index, latents, node, **call)
        if noise_seeds is None:
            noise = _draw(state, len(items), rngs)
        else:
            children = _number(list(zip(owner, noise_seeds[k], strict=True)))
            drawn = _draw(state, max(children) + 1, generators([noise_seeds[k][b] for b in _first(children)], offset=1))
            noise = drawn[children]
        step = stochastic_step(grid, transition, state, v, index, index + 1, noise, torch.tensor(owner))
        step.v = v if keep_velocity else None
        steps.append(step)
        owner = list(range(len(items))) if noise_seeds is None else children
        latents, node = step.native_next[_first(owner)], index + 1
    first = _first(owner)
    ends = policy.rollout(
        [items[b] for b in first], [seeds[b] for b in first], latents=latents, start=node, stride=stride, **call
    )
    groups = torch.arange(len(items)) if group is None else group.to(torch.int64)
    return Samples(prompts=items, seeds=list(map(int, seeds)), group=groups, latents=ends.latents[owner], steps=steps)


def _draw(like: Tensor, count: int, rngs: list[torch.Generator]) -> Tensor:
    """Standard normal noise, fp32, one generator per row."""
    return randn_tensor((count, *like.shape[1:]), generator=rngs, device=like.device, dtype=torch.float32)


def _number(keys: list[Any]) -> list[int]:
    """Number equal keys equally, in the order of their first appearance."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _first(numbers: list[int]) -> list[int]:
    """For each number, the first place where it stands."""
    return [numbers.index(number) for number in range(max(numbers) + 1)]
