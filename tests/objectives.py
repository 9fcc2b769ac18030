"""What the tests of objectives share: a predictor with given velocities, points to ask it at, finite differences, a short run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowrl import Policy, Trainer, load_recipe
from flowrl.batch import Noised, Point, State, Step
from flowrl.samplers import ODE, DanceSDE
from tests.pipelines import CALL, DENOISER, GUIDED, tiny

#: A velocity (B, ...), or one that depends on where it is asked for.
Given = Tensor | Callable[[Any], Tensor]


class Fixed:
    """A predictor with given velocities of the policy, the reference and the slow copy; it fails where it has none to give.

    reward: of final latents (B, ...) -> (B,) or (B, K), for objectives that climb a gradient. asked: whose velocities, in turn.
    """

    def __init__(
        self,
        v: Given,
        v_ref: Given | None = None,
        v_old: Given | None = None,
        *,
        mean_std: float = 1.0,
        grid: Sequence[float] = (1.0, 0.75, 0.5, 0.25, 0.0),
        reward: Callable[[Tensor], Tensor] | None = None,
        steps: Sequence[Step] = (),
        final: Tensor | None = None,
    ):
        self.given: dict[str, Given | None] = {"policy": v, "reference": v_ref, "old": v_old}
        self.mean_std, self.grid, self.reward_of = mean_std, list(grid), reward
        self.steps, self.final, self.rng = steps, final, torch.Generator().manual_seed(0)
        self.asked: list[str] = []
        self.kept: dict[str, Any] = {}

    def __call__(self, at: Point) -> Tensor:
        return self._answer("policy", at)

    def reference(self, at: Point, **call: Any) -> Tensor:
        return self._answer("reference", at).detach()

    def old(self, at: Point) -> Tensor:
        return self._answer("old", at).detach()

    def _answer(self, weights: str, at: Point) -> Tensor:
        self.asked.append(weights)
        v = self.given[weights]
        assert v is not None, f"asked for the velocity of {weights}, which this test did not give"
        v = v(at) if callable(v) else v
        return v if torch.is_grad_enabled() else v.detach()

    def mean(self, values: Tensor) -> Tensor:
        return values.detach().float().mean()

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.rng)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self.kept:
            self.kept[name] = compute()
        return self.kept[name]

    def pictures(self, x0: Tensor, frames: int | None = None) -> Tensor:
        return x0 if frames is None else x0[:, :frames]

    def scores(self, x0: Tensor, images: Tensor | None) -> Tensor:
        assert self.reward_of is not None and images is not None, "this test gave no reward"
        values = self.reward_of(images)
        return values if values.ndim == 2 else values[:, None]

    def weighted(self, scores: Tensor) -> Tensor:
        return scores.nan_to_num(0.0).sum(1)

    def rewards(self, x0: Tensor, frames: int | None = None) -> Tensor:
        return self.scores(x0, self.pictures(x0, frames))

    def reward(self, x0: Tensor, frames: int | None = None) -> Tensor:
        return self.weighted(self.rewards(x0, frames))


def make_step(transition=None, batch=2, seed=0, t=0.8, t_next=0.6):
    """A recorded step of (batch, 3, 2) latents, the velocity that it was sampled from, and its noise."""
    transition = transition or DanceSDE(0.5)
    torch.manual_seed(seed)
    x, v, noise = torch.randn(batch, 3, 2), torch.randn(batch, 3, 2), torch.randn(batch, 3, 2)
    gaussian = transition.transition(x, v, t, t_next, 0.95)
    x_next = gaussian.sample(noise)
    step = Step(x, x_next, t, t_next, 0.95, gaussian.log_prob(x_next), 1, transition)
    return step, v, noise


def make_nodes(
    velocity: Given, kept: Sequence[int], grid: Sequence[float] = (1.0, 0.75, 0.5, 0.25, 0.0), batch=2, seed=0
) -> tuple[list[Step], Tensor]:
    """The recorded nodes of an ODE rollout of (batch, 3, 2) latents under a given velocity, and where it ends."""
    torch.manual_seed(seed)
    x, steps = torch.randn(batch, 3, 2), []
    with torch.no_grad():
        for i, (t, t_next) in enumerate(itertools.pairwise(grid)):
            v = velocity(State(x, torch.full((batch,), t))) if callable(velocity) else velocity
            x_next = x - (t - t_next) * v
            if i in kept:
                steps.append(Step(x, x_next, t, t_next, grid[1], torch.zeros(batch), i, ODE()))
            x = x_next
    return steps, x


def make_noised(batch=4, group_size=2, seed=0, t: float | Sequence[float] | None = None, shape=(3, 2)) -> Noised:
    """Noised latents (batch, *shape) in groups of `group_size`; t: one time, one per sample, or, without, one per group."""
    torch.manual_seed(seed)
    x0, noise = torch.randn(batch, *shape), torch.randn(batch, *shape)
    group = torch.arange(batch) // group_size
    times = torch.rand(batch)[group] * 0.8 + 0.1 if t is None else torch.as_tensor(t, dtype=torch.float32).expand(batch)
    return Noised(x0, noise, times.clone(), group)


def part_of(noised: Noised, rows: Tensor) -> Noised:
    """Some of the rows, in this order."""
    assert noised.group is not None
    return Noised(noised.x0[rows], noised.noise[rows], noised.t[rows], noised.group[rows])


def finite_difference(value: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-2) -> tuple[Tensor, Tensor]:
    """The gradient of value(at).sum() as autograd has it, and by central differences, both shaped like `at` and fp64.

    value: of an fp32 tensor. Their agreement is limited by fp32: with values of order 1 expect about 1e-7 / step.
    """
    w = at.detach().float().clone().requires_grad_()
    value(w).double().sum().backward()
    assert w.grad is not None
    numeric = torch.zeros_like(w, dtype=torch.float64)
    for i in range(at.numel()):
        moved = torch.zeros(at.numel()).index_fill_(0, torch.tensor([i]), step).reshape(at.shape)
        with torch.no_grad():
            up, down = (value(at.detach().float() + sign * moved).double().sum() for sign in (1, -1))
        numeric.view(-1)[i] = (up - down) / (2 * step)
    return w.grad.double(), numeric


def short_run(recipe, tmp_path, *overrides: str, name="sd3", guided=False, steps=2, **options) -> tuple[Trainer, list[dict]]:
    """A trainer of the tiny pipeline `name` after a few steps, and each step's metrics.

    Fails unless the run changed LoRA weights of the denoiser and nothing else, and all weights and metrics are finite.
    """
    policy = Policy(tiny(name), {**CALL[name], **(GUIDED[name] if guided else {})})
    trainer = Trainer(load_recipe(recipe, [f"output_dir={tmp_path}/run", *overrides]), policy=policy, **options)
    before = weights_of(policy)
    rows = [trainer.step() for _ in range(steps)]
    after = weights_of(policy)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all("lora_" in key and key.startswith(DENOISER[name]) for key in changed)
    assert all(value.isfinite().all() for value in after.values())
    assert all(math.isfinite(value) for row in rows for value in row.values()), rows
    return trainer, rows


def weights_of(policy: Policy) -> dict[str, Tensor]:
    """All weights of the policy's denoisers, copied."""
    return {f"{part}.{key}": p.detach().clone() for part, m in policy.denoisers.items() for key, p in m.named_parameters()}
