"""Trees of trajectories: samples that share their past until noise parts them.

A branch point is a state in which several samples stand. It is computed once in the rollout, and its one model call with
gradient serves all its samples in the update (`Step.owner`). Every scheme is a choice of which noises are equal:

    one start per group       Flow-GRPO-Fast, MixGRPO (arXiv 2507.21802)
    and one stochastic step   G2RPO's singular stochastic sampling, TempFlow-GRPO's branches; with stride, G2RPO's granularities
    several starts per group  B2-DiffuRL's branch sets
    equal until the next split, splits at several steps       BranchGRPO (arXiv 2509.06040)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowrl.batch import Prompt, Samples
from flowrl.conditions import condition_of, key_of
from flowrl.data import generators, sample_seed
from flowrl.samplers.scheduler import Grid, stochastic_step
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
    spread: float | None = None,
    stride: int = 1,
    lean: Callable[[Grid, int, Tensor, list[Prompt]], Tensor | None] | None = None,
    group: Tensor | None = None,
    keep_velocity: bool = False,
    **call: Any,
) -> Samples:
    """`Policy.rollout` for B samples of which some share their past. Equal to it, up to rounding, with the same seeds.

    Samples with the same prompt and init seed start from one state. noise_seeds: for each stochastic step, B seeds of its
    noise; samples in one state with one seed stay together. By default each sample has its own noise from `seeds`.
    spread: None, or s: noises of samples that part from one state are correlated, see `correlated`.
    stride: after the last stochastic step the ODE visits every stride-th node of the grid only.
    lean: of (grid, index, states (U, ...), their prompts), what each state's step leans by, see `stochastic_step`.
    """
    items = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    rngs = generators(seeds, offset=1)
    pictures = [key_of(condition_of(item, policy.facts)) for item in items]
    owner = _number([(item.text, picture, init) for item, picture, init in zip(items, pictures, init_seeds, strict=True)])
    latents, node, steps = None, 0, []
    for k, index in enumerate(sorted(stochastic)):
        first = _first(owner)
        state, v, grid = policy.trunk([items[b] for b in first], [init_seeds[b] for b in first], index, latents, node, **call)
        own = list(range(len(items))) if noise_seeds is None else _number(list(zip(owner, noise_seeds[k], strict=True)))
        heads = _first(own)
        noise = _draw(state, rngs if noise_seeds is None else generators([noise_seeds[k][b] for b in heads], offset=1))
        if spread is not None:
            parents = torch.tensor([owner[b] for b in heads])
            trunk_seeds = [sample_seed(init_seeds[b], seeds[b], index) for b in first]
            noise = correlated(noise, _draw(state, generators(trunk_seeds, offset=1))[parents], spread)
        shift = None if lean is None else lean(grid, index, state, [items[b] for b in first])
        sharing = torch.tensor(owner) if len(first) < len(items) else None
        step = stochastic_step(grid, transition, state, v, index, index + 1, noise[own], sharing, shift)
        step.v = v if keep_velocity else None
        steps.append(step)
        owner, latents, node = own, step.native_next[heads], index + 1
    first = _first(owner)
    ends = policy.rollout(
        [items[b] for b in first], [init_seeds[b] for b in first], latents=latents, start=node, stride=stride, **call
    )
    groups = torch.arange(len(items)) if group is None else group.to(torch.int64)
    starts = torch.tensor([int(seed) for seed in init_seeds])
    return Samples(items, list(map(int, seeds)), groups, ends.latents[owner], steps=steps, fps=ends.fps, start=starts)


def correlated(own: Tensor, shared: Tensor, spread: float) -> Tensor:
    """BranchGRPO's noise of branches: (shared + s own) / sqrt(1 + s^2). own, shared: (B, ...) standard normal.

    Each is standard normal, so that every leaf keeps the sampler's law; two branches have correlation 1 / (1 + s^2).
    """
    return (shared + spread * own) / math.sqrt(1 + spread**2)


def tree_seeds(
    keys: Sequence[tuple[int, ...]], members: Sequence[int], branches: Sequence[int], num_steps: int
) -> tuple[list[int], list[list[int]] | None]:
    """Init seeds (B) and noise seeds (num_steps, B) of a tree. keys: what names each sample's group; members: its place there.

    branches: how many branches part at the first stochastic steps, one number per step; after them every leaf has its own
    noise. None for the noise seeds of a tree with one split: those are the samples' own.
    """
    if len(branches) > num_steps:
        raise ValueError(f"branches={list(branches)} split at {len(branches)} steps, of {num_steps} stochastic ones")
    leaves = math.prod(branches)
    init = [sample_seed(*key, g // leaves) for key, g in zip(keys, members, strict=True)]
    if len(branches) == 1:
        return init, None
    below = [math.prod(branches[k + 1 :]) for k in range(num_steps)]
    return init, [[sample_seed(*key, k, g // below[k]) for key, g in zip(keys, members, strict=True)] for k in range(num_steps)]


def _draw(like: Tensor, rngs: list[torch.Generator]) -> Tensor:
    """Standard normal noise, fp32, one generator per row."""
    return randn_tensor((len(rngs), *like.shape[1:]), generator=rngs, device=like.device, dtype=torch.float32)


def _number(keys: list[Hashable]) -> list[int]:
    """Number equal keys equally, in the order of their first appearance."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _first(numbers: list[int]) -> list[int]:
    """For each number, the first place where it stands."""
    return [numbers.index(number) for number in range(max(numbers) + 1)]
