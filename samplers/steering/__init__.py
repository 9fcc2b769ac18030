"""Steering at inference time: a generator as it is, a reward, and more computation.

result = steer(policy, prompts, reward, FK(particles=8), seeds=[0])
result.samples         one sample per prompt and seed, decoded
result.report          what it cost, and what the weights did
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowrl.batch import Prompt, Samples
from flowrl.samplers.steering.children import Doob
from flowrl.samplers.steering.euphonium import Euphonium, guided_rollout
from flowrl.samplers.steering.genealogy import genealogy_picture
from flowrl.samplers.steering.guidance import Guidance
from flowrl.samplers.steering.loop import Counts, History, Model, Outcome, Steering, gather
from flowrl.samplers.steering.particles import FK, FlowMap, Twisted
from flowrl.samplers.steering.pipeline import PolicyModel
from flowrl.samplers.steering.search import BestOfN, Paths, Rollover, ZeroOrder

if TYPE_CHECKING:
    from flowrl.policy import Policy

#: Methods by the name that the command line uses.
STEERS: dict[str, type] = {
    "best_of_n": BestOfN,
    "zero_order": ZeroOrder,
    "paths": Paths,
    "rollover": Rollover,
    "fk": FK,
    "doob": Doob,
    "flow_map": FlowMap,
    "twisted": Twisted,
    "guidance": Guidance,
}


@dataclass
class Report:
    """What a run cost and what its weights did, over all P populations (prompts x seeds) of N particles.

    counts: in samples. strength: lam as used. rewards, log_weights: (P, N) at the end. chosen: (P,) the particles returned.
    log_z: (P,) estimate of log E[exp(lam r)] over the plain sampler, NaN where the method has none. surviving: (P,) particles of
    the start with a descendant at the end. history: ESS and ancestors at each checkpoint.
    """

    method: Steering
    counts: Counts
    strength: float
    rewards: Tensor
    log_weights: Tensor
    chosen: Tensor
    log_z: Tensor
    surviving: Tensor
    history: History

    @property
    def particles(self) -> int:
        return self.rewards.shape[1]

    @property
    def ess(self) -> list[float]:
        """Mean over populations of the effective sample size, at each checkpoint."""
        return [float(size.mean()) for size in self.history.ess]

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What to print: name and value."""
        returned = gather(self.rewards, self.chosen[:, None])
        rows = [
            ("method", str(self.method)),
            *((name.replace("_", " "), f"{value:,}") for name, value in asdict(self.counts).items() if value),
            ("reward", f"{float(returned.mean()):.4f} returned, {float(self.rewards.mean()):.4f} over all particles"),
        ]
        if self.strength:
            rows.append(("tilt strength", f"{self.strength:.4g}"))
        if self.history.ess:
            trace = "  ".join(f"t {t:.2f}: {size:.1f}" for t, size in zip(self.history.t, self.ess, strict=True))
            rows.append((f"ESS of {self.particles}", trace))
            rows.append(("surviving ancestors", f"{float(self.surviving.float().mean()):.1f} of {self.particles}"))
        if not self.log_z.isnan().any():
            rows.append(("log Z", f"{float(self.log_z.mean()):.4f}"))
        return rows


@dataclass
class SteeredSamples:
    """samples: one per prompt and seed, prompt by prompt, decoded. particles: all of them, where they were asked for."""

    samples: Samples
    report: Report
    particles: Samples | None = None


def steer(
    policy: Policy,
    prompts: Sequence[Prompt],
    reward: Callable[[Samples], Tensor],
    method: Steering,
    seeds: Sequence[int],
    *,
    batch_size: int = 64,
    keep_particles: bool = False,
    **call: Any,
) -> SteeredSamples:
    """Draw one steered sample for each prompt and seed; they do not share particles. `call` goes to the pipeline.

    batch_size: samples per denoiser and decoder call. Without strength, and of FK and best of N with one particle, the
    result is the plain sampler's.
    """
    items = [prompt for prompt in prompts for _ in seeds]
    result = steer_each(
        policy, items, reward, method, [seed for _ in prompts for seed in seeds],
        batch_size=batch_size, keep_particles=keep_particles, **call,
    )  # fmt: skip
    result.samples.group = torch.arange(len(prompts)).repeat_interleave(len(seeds))
    return result


def steer_each(
    policy: Policy,
    prompts: Sequence[Prompt],
    reward: Callable[[Samples], Tensor],
    method: Steering,
    seeds: Sequence[int],
    *,
    batch_size: int = 64,
    keep_particles: bool = False,
    **call: Any,
) -> SteeredSamples:
    """The same with one seed for each prompt."""
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"steering needs a seed for each prompt, and got {len(prompts)} prompts with {len(seeds)} seeds")
    with torch.no_grad():
        model = PolicyModel(policy, prompts, seeds, reward, batch_size, **call)
        outcome = method.run(model)
        chosen = outcome.chosen.to(outcome.state.device)
        picked = model.samples(gather(outcome.state, chosen[:, None]))
        model.counts.decodes += len(prompts)
        particles = model.samples(outcome.state) if keep_particles else None
    p, n = outcome.rewards.shape
    picked.seeds = model.seeds
    report = Report(
        method,
        model.counts,
        outcome.strength,
        outcome.rewards.cpu(),
        outcome.log_weights.cpu(),
        outcome.chosen.cpu(),
        outcome.log_z.cpu(),
        outcome.history.surviving(p, n),
        outcome.history,
    )
    return SteeredSamples(picked, report, particles)


__all__ = [
    "FK",
    "STEERS",
    "BestOfN",
    "Counts",
    "Doob",
    "Euphonium",
    "FlowMap",
    "Guidance",
    "Model",
    "Outcome",
    "Paths",
    "PolicyModel",
    "Report",
    "Rollover",
    "SteeredSamples",
    "Steering",
    "Twisted",
    "ZeroOrder",
    "genealogy_picture",
    "guided_rollout",
    "steer",
    "steer_each",
]
