"""Steering inside an unmodified pipeline: the model that methods see, made of a policy, prompts, seeds and a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowrl.batch import Prompt, Samples, Step
from flowrl.data import generators, sample_seed
from flowrl.samplers.steering.loop import Model
from flowrl.samplers.transitions import ODE

if TYPE_CHECKING:
    from flowrl.policy import Policy

#: Keeps the seeds of a population's own stream (resampling) apart from those of its particles.
OWN = 1 << 40


def particle_seed(seed: int, j: int) -> int:
    """The seed of particle j of a population: the population's own for j = 0."""
    return int(seed) if j == 0 else sample_seed(int(seed), j)


class PolicyModel(Model):
    """P populations, one per (prompt, seed). Each velocity is one call of the pipeline through the seam.

    Particle 0 of a population starts from the population's seed, as a plain rollout does, particle j from one derived from it.
    """

    def __init__(
        self,
        policy: Policy,
        items: Sequence[Prompt],
        seeds: Sequence[int],
        reward: Callable[[Samples], Tensor],
        batch_size: int = 64,
        **call: Any,
    ):
        self.grid = policy.grid(**call)
        super().__init__(self.grid.t, self.grid.t_max, [item.text for item in items])
        self.policy, self.scorer, self.batch_size, self.call = policy, reward, batch_size, call
        self.items, self.seeds, self.groups = list(items), [int(seed) for seed in seeds], list(range(len(items)))
        self.streams: list[list[torch.Generator]] = [[] for _ in self.items]
        self.dtype = torch.float32  # the loop's, once it has started
        self.own = generators([sample_seed(seed, OWN) for seed in self.seeds])

    def only(self, prompts: list[int]) -> PolicyModel:
        part = super().only(prompts)
        assert isinstance(part, PolicyModel)
        for name in ("items", "seeds", "groups", "streams", "own"):
            setattr(part, name, [getattr(self, name)[p] for p in prompts])
        return part

    def flow(self, state: Tensor, node: int) -> Tensor:
        return state.float() / self.grid.scale(self.t[node])

    def native(self, x: Tensor, node: int) -> Tensor:
        return (self.grid.scale(self.t[node]) * x).to(self.dtype)

    def draw_start(self, n: int) -> tuple[Tensor, Tensor]:
        seeds = [particle_seed(seed, j) for seed in self.seeds for j in range(n)]
        items = self._items(n)
        parts = [self.policy.trunk(items[rows], seeds[rows], 0, **self.call)[:2] for rows in self._rows(len(items))]
        state, v = (torch.cat(column) for column in zip(*parts, strict=True))
        self.dtype = state.dtype
        return self._unflat(state, n), self._unflat(v, n)

    def draw_noise(self, like: Tensor) -> Tensor:
        p, n = like.shape[:2]
        for stream, seed in zip(self.streams, self.seeds, strict=True):
            stream += generators([particle_seed(seed, j) for j in range(len(stream), n)], offset=1)
        streams = [generator for stream in self.streams for generator in stream[:n]]
        flat = (p * n, *like.shape[2:])
        return self._unflat(randn_tensor(flat, generator=streams, device=like.device, dtype=torch.float32), n)

    def draw_uniform(self, n: int) -> Tensor:
        return torch.stack([torch.rand(n, generator=generator, dtype=torch.float64) for generator in self.own])

    def predict(self, state: Tensor, node: int) -> Tensor:
        def call(items: list[Prompt], native: Tensor) -> Tensor:
            t, t_next = self.t[node], self.t[node + 1]
            return self.policy.velocity(
                items, Step(native, native, t, t_next, self.t_max, torch.empty(0), node, ODE()), **self.call
            )

        return self._batched(call, state)

    def predict_at(self, x: Tensor, t: float) -> Tensor:
        def call(items: list[Prompt], part: Tensor) -> Tensor:
            return self.policy.velocity(items, part, torch.full((len(part),), t, device=part.device), **self.call)

        return self._batched(call, x)

    def score(self, x0: Tensor) -> Tensor:
        samples = self.samples(self.native(x0, self.steps))
        return self._numbers(self.scorer(samples), x0)

    def score_noisy(self, x: Tensor, t: float) -> Tensor:
        noisy = getattr(self.scorer, "noisy", None)
        if noisy is None:
            return super().score_noisy(x, t)
        n = x.shape[1]
        states = x.flatten(0, 1)
        times = torch.full((len(states),), t, device=x.device)
        return self._numbers(noisy(states, times, [item.text for item in self.items for _ in range(n)]), x)

    def samples(self, state: Tensor) -> Samples:
        """Final states (P, n, ...) as samples with their pictures, population by population."""
        n = state.shape[1]
        flat = state.flatten(0, 1)
        items, graph = self._items(n), state.requires_grad
        images = self.policy.decode(flat, items, batch_size=self.batch_size, with_graph=graph, **self.call)
        return Samples(
            prompts=items,
            seeds=[particle_seed(seed, j) for seed in self.seeds for j in range(n)],
            group=torch.tensor([group for group in self.groups for _ in range(n)], dtype=torch.int64),
            latents=flat,
            images=images,
            fps=self.policy.facts.fps({**self.policy.call, **self.call}),
        )

    def _items(self, n: int) -> list[Prompt]:
        return [item for item in self.items for _ in range(n)]

    def _rows(self, count: int) -> list[slice]:
        return [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]

    def _unflat(self, flat: Tensor, n: int) -> Tensor:
        return flat.unflatten(0, (len(self.items), n))

    def _numbers(self, values: Tensor, like: Tensor) -> Tensor:
        return self._unflat(values.float().to(like.device), like.shape[1])

    def _batched(self, call: Callable[[list[Prompt], Tensor], Tensor], states: Tensor) -> Tensor:
        n = states.shape[1]
        items, flat = self._items(n), states.flatten(0, 1)
        return self._unflat(torch.cat([call(items[rows], flat[rows]) for rows in self._rows(len(flat))]), n)
