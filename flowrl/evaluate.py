"""Pinned evaluation: the same prompts, seeds and ODE for every model; paired comparison with confidence intervals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl.batch import Prompt, Samples, concatenate
from flowrl.data import sample_seed
from flowrl.policy import Policy
from flowrl.reward_models.base import Reward, score, traits_of


@dataclass(frozen=True)
class Protocol:
    """What must be equal for two scores to be comparable. Sampling is always by the ODE."""

    prompts: str = "tiny-test"
    num_inference_steps: int = 20
    guidance_scale: float | None = None
    seeds: int = 1  #: Samples per prompt.
    seed: int = 0
    call: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        guidance = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return {**self.call, "num_inference_steps": self.num_inference_steps, **guidance}


@dataclass
class Evaluation:
    """Scores of one model under a protocol. scores: (P, S, K) for P prompts, S seeds, K rewards; NaN abstains."""

    model: str
    protocol: Protocol
    prompts: list[Prompt]
    seeds: list[list[int]]
    rewards: list[str]
    scores: Tensor
    samples: Samples | None = None

    def mean(self, reward: str, kind: str | None = None) -> float:
        """Mean over prompts (of one kind) of the mean over seeds."""
        return float(self.per_prompt(reward)[self._of(kind)].nanmean())

    def per_prompt(self, reward: str) -> Tensor:
        """(P,) mean over seeds."""
        return self.scores[:, :, self.rewards.index(reward)].nanmean(1)

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(str(p.columns["kind"]) for p in self.prompts if "kind" in p.columns))

    def _of(self, kind: str | None) -> list[int]:
        return [i for i, p in enumerate(self.prompts) if kind is None or str(p.columns.get("kind")) == kind]

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "prompt": p.text,
                "kind": p.columns.get("kind"),
                "seed": seed,
                **{n: _finite(self.scores[i, j, k]) for k, n in enumerate(self.rewards)},
            }
            for i, p in enumerate(self.prompts)
            for j, seed in enumerate(self.seeds[i])
        ]
        means = {name: {kind or "all": _finite(self.mean(name, kind)) for kind in [None, *self.kinds]} for name in self.rewards}
        return {"model": self.model, "protocol": asdict(self.protocol), "means": means, "samples": rows}


def _finite(value: Tensor | float) -> float | None:
    """Six decimals; NaN is null in JSON."""
    return None if value != value else round(float(value), 6)


def prompt_seed(prompt: str, index: int, seed: int = 0) -> int:
    """The seed of sample `index` of a prompt: it depends on the text, not on the prompt's place in a file."""
    return sample_seed(seed, int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big"), index)


def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: dict[str, Reward],
    protocol: Protocol,
    *,
    name: str = "policy",
    weights: str = "policy",
    batch_size: int = 64,
    keep_images: bool = False,
    progress: bool = False,
    references: Callable[[Sequence[Prompt], Policy], Tensor] | None = None,
) -> Evaluation:
    """Sample every prompt `protocol.seeds` times by the ODE and score. weights: which of the policy's weights to wear.

    Rewards that compare samples see all those of a prompt, or of the evaluation, together. references: where pictures to
    compare with come from (`flowrl.references`).
    """
    from tqdm.auto import tqdm

    whole = {label: reward for label, reward in rewards.items() if traits_of(reward).arity != "point"}  # these compare samples
    single = {label: reward for label, reward in rewards.items() if label not in whole}
    items = [(prompt, prompt_seed(prompt.text, j, protocol.seed)) for prompt in prompts for j in range(protocol.seeds)]
    starts: Iterable[int] = range(0, len(items), batch_size)
    parts, scores = [], []
    for start in tqdm(starts, desc=f"evaluating {name}", unit="batch", disable=not progress, leave=False):
        part = items[start : start + batch_size]
        with policy.using(weights):
            samples = policy.rollout([prompt for prompt, _ in part], [seed for _, seed in part], **protocol.arguments())
            samples.images = policy.decode(samples, **protocol.call)
        samples.group = torch.arange(start, start + len(part)) // protocol.seeds
        if references is not None:
            samples.references = references(samples.prompts, policy).to(samples.latents.device)
        scores.append(score(single, samples))
        if not (keep_images or whole):
            samples.images = None
        parts.append(samples)
    seeds = [[prompt_seed(prompt.text, j, protocol.seed) for j in range(protocol.seeds)] for prompt in prompts]
    together = score(whole, concatenate(parts)) if whole else torch.zeros(len(items), 0)
    order = [[*single, *whole].index(label) for label in rewards]
    table = torch.cat([torch.cat(scores), together], 1)[:, order].reshape(len(prompts), protocol.seeds, len(rewards))
    return Evaluation(name, protocol, list(prompts), seeds, list(rewards), table, concatenate(parts) if keep_images else None)


@dataclass(frozen=True)
class Difference:
    """Tuned minus base with a 95 % interval."""

    base: float
    tuned: float
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.tuned - self.base

    @property
    def significant(self) -> bool:
        return self.low > 0 or self.high < 0


def compare(base: Evaluation, tuned: Evaluation, reward: str, kind: str | None = None, resamples: int = 10_000) -> Difference:
    """Paired difference of means; the interval is a bootstrap over prompts (the seeds of a prompt stay together).

    Raises ValueError when the protocols or the prompts differ: such scores do not compare.
    """
    if base.protocol != tuned.protocol:
        ours, theirs = asdict(base.protocol), asdict(tuned.protocol)
        differing = [f"{k}: {ours[k]!r} against {theirs[k]!r}" for k in ours if ours[k] != theirs[k]]
        raise ValueError(f"these evaluations do not compare, their protocols differ in {'; '.join(differing)}")
    if (texts := [p.text for p in base.prompts]) != [p.text for p in tuned.prompts]:
        raise ValueError(
            f"these evaluations do not compare: {base.protocol.prompts} had {len(texts)} prompts for {base.model}, "
            f"and {len(tuned.prompts)} prompts, or others, for {tuned.model}"
        )
    chosen = base._of(kind)
    a, b = base.per_prompt(reward)[chosen].double().numpy(), tuned.per_prompt(reward)[chosen].double().numpy()
    both = ~(np.isnan(a) | np.isnan(b))
    a, b = a[both], b[both]
    if len(a) == 0:
        return Difference(*[float("nan")] * 4)
    draws = np.random.default_rng(0).integers(0, len(a), (resamples, len(a)))
    low, high = np.quantile((b - a)[draws].mean(1), [0.025, 0.975])
    return Difference(float(a.mean()), float(b.mean()), float(low), float(high))


def comparison_rows(base: Evaluation, tuned: Evaluation, reward: str) -> tuple[list[str], list[list[str]]]:
    """A table of one reward: a row for each kind and one for all, with interval."""
    header = [reward, base.model, tuned.model, "difference", "95 % interval", "prompts"]
    rows = []
    for kind in [*base.kinds, None]:
        d = compare(base, tuned, reward, kind)
        rows.append(
            [
                kind or "all",
                f"{d.base:.3f}",
                f"{d.tuned:.3f}",
                f"{d.value:+.3f}",
                f"{d.low:+.3f} to {d.high:+.3f}",
                str(len(base._of(kind))),
            ]
        )
    return header, rows


def score_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """A table of one model: a row for each kind and one for all, a column for each reward."""
    header = [evaluation.model, *evaluation.rewards, "prompts"]
    rows = [
        [
            kind or "all",
            *(f"{evaluation.mean(name, kind):.3f}" for name in evaluation.rewards),
            str(len(evaluation._of(kind))),
        ]
        for kind in [*evaluation.kinds, None]
    ]
    return header, rows


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
