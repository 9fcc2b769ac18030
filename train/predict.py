"""The denoiser as an objective sees it: `Predict` for one batch, with the policy, its prompts and its rewards behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowrl.batch import Point, Samples, Step
from flowrl.policy import Policy
from flowrl.reward_models.base import Reward
from flowrl.samplers.transitions import ODE


class PolicyPredict:
    """`Predict` of one batch. rewards: by name, with weights (K,), for objectives that climb their gradient.

    reference: which weights are the reference's, "base" for the model as it was.
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
    ):
        self.policy, self.batch, self.accelerator = policy, batch, accelerator
        self.texts = batch.texts
        self.reference_weights = "reference" if reference == "base" else reference
        self.reward_functions = rewards or {}
        self.weights = torch.ones(len(self.reward_functions)) if weights is None else weights
        noises = [s for s in batch.steps if not isinstance(s.transition, ODE)]
        stds = [float(torch.as_tensor(s.transition.std(s.t, s.t_next, s.t_max))) for s in noises]
        self.mean_std = sum(stds) / max(len(stds), 1)
        self._point: Point | None = None
        self._known: dict[tuple[str, bool], Tensor] = {}

    def __call__(self, at: Point) -> Tensor:
        return self._velocity(at, "policy", torch.is_grad_enabled())

    def reference(self, at: Point) -> Tensor:
        return self._velocity(at, self.reference_weights, False)

    def old(self, at: Point) -> Tensor:
        return self._velocity(at, "old", False)

    def _velocity(self, at: Point, weights: str, graph: bool) -> Tensor:
        if at is not self._point:
            self._point, self._known = at, {}
        if (weights, graph) not in self._known:
            with torch.set_grad_enabled(graph), self.policy.using(weights):
                v = self.policy.velocity(self.texts, at) if isinstance(at, Step) else self.policy.velocity(self.texts, at.x, at.t)
            self._known[weights, graph] = v
        return self._known[weights, graph]

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

    def rewards(self, x0: Tensor) -> Tensor:
        batch = self.batch
        images = self.policy.decode(x0, self.texts, batch_size=len(x0), with_graph=True)
        samples = Samples(batch.prompts, batch.seeds, batch.group, x0, images, references=batch.references, fps=batch.fps)
        return torch.stack([reward(samples).to(x0.device) for reward in self.reward_functions.values()], 1)

    def reward(self, x0: Tensor) -> Tensor:
        values = self.rewards(x0)
        return (values.nan_to_num(0.0) * self.weights.to(values)).sum(1)
