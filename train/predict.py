"""The denoiser as an objective sees it: `Predict` for one batch, with the policy, its prompts and its rewards behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowrl.batch import Point, Samples, Step
from flowrl.data import generators, sample_seed
from flowrl.policy import Policy
from flowrl.reward_models.base import Reward, RewardError, check_needs, failing_as, traits_of
from flowrl.samplers.transitions import ODE

T = TypeVar("T")


class PolicyPredict:
    """`Predict` of one batch. rewards: by name, with weights (K,), for objectives that climb their gradient.

    reference: which weights are the reference's, "base" for the model as it was. look: is shown each velocity of the policy that
    carries a graph. context: of `Policy.decode`.
    """

    def __init__(
        self,
        policy: Policy,
        batch: Samples,
        *,
        reference: str = "base",
        rewards: dict[str, Reward] | None = None,
        weights: Tensor | None = None,
        accelerator: Any = None,
        look: Callable[[Point, Tensor], None] | None = None,
        context: int | None = None,
    ):
        self.policy, self.batch, self.accelerator, self.look, self.context = policy, batch, accelerator, look, context
        self.reference_weights = "reference" if reference == "base" else reference
        self.reward_functions = rewards or {}
        self.weights = torch.ones(len(self.reward_functions)) if weights is None else weights
        noises = [s for s in batch.steps if not isinstance(s.transition, ODE)]
        stds = [float(torch.as_tensor(s.transition.std(s.t, s.t_next, s.t_max))) for s in noises]
        self.mean_std = sum(stds) / max(len(stds), 1)
        self._point: Point | None = None
        self._known: dict[tuple[str, bool, str], Tensor] = {}
        self._kept: dict[str, Any] = {}

    def __call__(self, at: Point) -> Tensor:
        return self._velocity(at, "policy", torch.is_grad_enabled())

    def reference(self, at: Point, **call: Any) -> Tensor:
        return self._velocity(at, self.reference_weights, False, **call)

    def old(self, at: Point) -> Tensor:
        if torch.is_grad_enabled() and self._on_policy:  # one pass serves both
            return self(at).detach()
        return self._velocity(at, "old", False)

    @cached_property
    def _on_policy(self) -> bool:
        return self.policy.holds("old")

    def _velocity(self, at: Point, weights: str, graph: bool, **call: Any) -> Tensor:
        if at is not self._point:
            self._point, self._known = at, {}
        key = (weights, graph, repr(sorted(call.items())))
        if key not in self._known:
            state = (at,) if isinstance(at, Step) else (at.x, at.t)
            with torch.set_grad_enabled(graph), self.policy.using(weights):
                self._known[key] = self.policy.velocity(self.batch.prompts, *state, **call)
            if self.look is not None and graph and weights == "policy":
                self.look(at, self._known[key])
        return self._known[key]

    def forget(self) -> None:
        """Drop what is remembered of the last point, and with it its graph."""
        self._point, self._known = None, {}

    @property
    def grid(self) -> Sequence[float]:
        return self.policy.times

    def mean(self, values: Tensor) -> Tensor:
        sums = torch.stack([values.detach().float().sum(), torch.tensor(float(values.numel()), device=values.device)])
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, "sum")
        return sums[0] / sums[1].clamp(min=1)

    @property
    def steps(self) -> Sequence[Step]:
        return self.batch.steps

    @property
    def final(self) -> Tensor:
        return self.batch.latents.float()

    @cached_property
    def rng(self) -> torch.Generator:
        return generators([sample_seed(self.batch.seeds[0], 1)])[0]

    @cached_property
    def _rngs(self) -> list[torch.Generator]:
        return generators([sample_seed(seed, 2) for seed in self.batch.seeds])

    def noise(self, like: Tensor) -> Tensor:
        return randn_tensor(like.shape, generator=self._rngs, device=like.device, dtype=torch.float32)

    def once(self, name: str, compute: Callable[[], T]) -> T:
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]

    def pictures(self, x0: Tensor, frames: int | None = None) -> Tensor | None:
        if all(traits_of(reward).needs == ("latents",) for reward in self.reward_functions.values()):
            return None
        options: dict[str, Any] = {"with_graph": torch.is_grad_enabled(), "context": self.context}
        decode = partial(self.policy.decode, x0, self.batch.prompts, len(x0), **options)
        if frames is None:
            return decode()
        if not self.policy.facts.draws_clips:
            raise ValueError(f"frames={frames}: this model draws pictures, not clips; leave it unset")
        whole = None if self.policy.num_frames else decode()  # where the pipeline decides, its clips tell
        count = self.policy.num_frames if whole is None else whole.shape[1]
        kept = torch.randperm(count or 0, generator=self.rng)[:frames].sort().values.tolist()
        return decode(frames=kept) if whole is None else whole[:, kept]

    def scores(self, x0: Tensor, images: Tensor | None) -> Tensor:
        batch = self.batch
        whole = images is None or images.ndim != 5 or images.shape[1] == (self.policy.num_frames or images.shape[1])
        fps = batch.fps if whole else None  # of a few frames there is no rate
        climbed = torch.is_grad_enabled() and (x0.requires_grad or (images is not None and images.requires_grad))
        columns = []
        for name, reward in self.reward_functions.items():
            latents, seen = x0.view_as(x0), None if images is None else images.view_as(images)
            samples = Samples(batch.prompts, batch.seeds, batch.group, latents, seen, references=batch.references, fps=fps)
            with failing_as(name):
                check_needs(reward, samples, name)
                values = reward(samples)
            if climbed and not values.requires_grad and bool(values.isnan().all()):  # all abstain: a gradient of 0
                values = values.to(x0.device) + 0 * (latents if seen is None or latents.requires_grad else seen).flatten(1).sum(1)
            elif climbed and not values.requires_grad:
                raise RewardError(
                    f"reward {name!r} says that it is differentiable, but its values carry no graph: does it leave torch, or "
                    "call detach, item or no_grad? Let the graph through, or say differentiable=False in its traits"
                )
            if climbed and bool(values.isnan().any()):  # 0 times what is not a number is none, and would spoil every weight
                for tensor in (latents, seen):
                    if tensor is not None and tensor.requires_grad:
                        tensor.register_hook(partial(_rows_of, keep=~values.detach().isnan()))
            columns.append(values.to(x0.device))
        return torch.stack(columns, 1) if columns else x0.new_zeros(len(x0), 0)

    def weighted(self, scores: Tensor) -> Tensor:
        return (scores.nan_to_num(0.0) * self.weights.to(scores)).sum(1)

    def rewards(self, x0: Tensor, frames: int | None = None) -> Tensor:
        return self.scores(x0, self.pictures(x0, frames))

    def reward(self, x0: Tensor, frames: int | None = None) -> Tensor:
        return self.weighted(self.rewards(x0, frames))


def _rows_of(gradient: Tensor, keep: Tensor) -> Tensor:
    """The gradient (B, ...) of the samples to keep (B,), and 0 for the others."""
    return torch.where(keep.to(gradient.device).reshape(-1, *[1] * (gradient.ndim - 1)), gradient, 0.0)
