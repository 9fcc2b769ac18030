"""Pinned evaluation: the same prompts, seeds and ODE for every model; paired comparison with confidence intervals.

base, tuned = (evaluate(policy, prompts, rewards, Protocol("tiny-test", 20, 1.0, seeds=4)) for policy in (before, after))
compare(base, tuned, "tiny_strict")                    # Difference(base, tuned, low, high)
write_results("scores.json", [base, tuned])            # read_results("scores.json")[0] compares without sampling again
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl.batch import Prompt, Samples, concatenate
from flowrl.data import sample_seed
from flowrl.policy import Policy
from flowrl.protocol import Protocol, differences, digest_of, reward_version
from flowrl.reward_models.base import Reward, score, traits_of
from flowrl.reward_models.features import embed
from flowrl.statistics import Wins, interval, mean_of, pairwise_distance, vendi, win_rate

#: What is measured of a prompt's samples together, by name; present where features are.
DIVERSITY: dict[str, Callable[[Tensor], Tensor]] = {"pairwise_distance": pairwise_distance, "vendi_score": vendi}


@dataclass
class Evaluation:
    """Scores of one model under a protocol. scores: (P, S, K) for P prompts, S seeds, K rewards; NaN abstains.

    features: (P * S, d) of the pictures. measures: (P,) of a prompt's samples together, by name. weights: a digest of the
    model's. specs: what loads each reward, and the features, by label. summary: what a benchmark of others sums up itself.
    """

    model: str
    protocol: Protocol
    prompts: list[Prompt]
    seeds: list[list[int]]
    rewards: list[str]
    scores: Tensor
    samples: Samples | None = None
    features: Tensor | None = None
    measures: dict[str, Tensor] = field(default_factory=dict)
    weights: str | None = None
    specs: dict[str, str] = field(default_factory=dict)
    summary: dict[str, float] = field(default_factory=dict)

    def mean(self, reward: str, kind: str | None = None) -> float:
        """Mean over prompts (of one kind) of the mean over seeds."""
        return float(self.per_prompt(reward)[self._of(kind)].nanmean())

    def per_prompt(self, name: str) -> Tensor:
        """(P,) a reward's mean over seeds, or a measure."""
        return self.measures[name] if name in self.measures else self.scores[:, :, self.rewards.index(name)].nanmean(1)

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
                "rewards": {n: finite(self.scores[i, j, k]) for k, n in enumerate(self.rewards)},
            }
            for i, p in enumerate(self.prompts)
            for j, seed in enumerate(self.seeds[i])
        ]
        names = [*self.rewards, *self.measures]
        return {
            "model": self.model,
            "weights": self.weights,
            "protocol": asdict(self.protocol),
            "means": {name: {kind or "all": finite(self.mean(name, kind)) for kind in [None, *self.kinds]} for name in names},
            "summary": {name: finite(value) for name, value in self.summary.items()},
            "specs": self.specs,
            "prompts": [{"prompt": p.text, **p.columns} for p in self.prompts],
            "measures": {name: [finite(v) for v in values] for name, values in self.measures.items()},
            "samples": rows,
        }


def finite(value: Tensor | float) -> float | None:
    """Six decimals; NaN is null in JSON."""
    return None if not math.isfinite(value) else round(float(value), 6)


def prompt_seed(prompt: str, index: int, seed: int = 0) -> int:
    """The seed of sample `index` of a prompt: it depends on the text, not on the prompt's place in a file."""
    return sample_seed(seed, int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big"), index)


def seeds_of(prompts: Sequence[Prompt], protocol: Protocol) -> list[list[int]]:
    """Of each prompt's samples."""
    return [[prompt_seed(prompt.text, j, protocol.seed) for j in range(protocol.seeds)] for prompt in prompts]


# ------------------------------------------------------------------------------------------------ sampling and scoring


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
    features: Any = None,
    rounded: bool = False,
) -> Evaluation:
    """Sample every prompt `protocol.seeds` times by the ODE and score. weights: which of the policy's weights to wear.

    Rewards that compare samples see all those of a prompt, or of the evaluation, together. references: where pictures to
    compare with come from (`flowrl.references`). features: an encoder (`load_features`), for diversity and distances. rounded:
    score what a file would hold, 8 bits per colour.
    """
    solver: dict[str, Any] = {"solver": protocol.solver} if protocol.solver != "euler" else {}

    def draw(part: Sequence[tuple[Prompt, int]]) -> Samples:
        with policy.using(weights):
            drawn, seeds = [prompt for prompt, _ in part], [seed for _, seed in part]
            samples = policy.rollout(drawn, seeds, **solver, **protocol.arguments())
            samples.images = policy.decode(samples, **protocol.call)
        if rounded:
            samples.images = (samples.images.clamp(0, 1) * 255).round() / 255
        if references is not None:
            samples.references = references(samples.prompts, policy).to(samples.latents.device)
        return samples

    own = policy.call.get("guidance_scale", getattr(policy._parameters.get("guidance_scale"), "default", None))
    guidance = own if protocol.guidance_scale is None else protocol.guidance_scale
    ema = averaged(policy, weights)
    complete = replace(protocol, guidance_scale=guidance, ema=protocol.ema if ema is None else ema)
    return score_all(draw, prompts, rewards, complete, name, batch_size, keep_images, progress, features)


def averaged(policy: Policy, weights: str) -> bool | None:
    """Whether these weights are averages (EMA); None where there is no difference, or nothing was averaged."""
    if weights != "policy":
        return True if weights == "ema" else None
    average = policy.snapshots.get("ema")
    if average is None or all(torch.equal(p.data, average[key]) for key, p in policy.trainable().items() if key in average):
        return None
    return False


def score_all(
    draw: Callable[[Sequence[tuple[Prompt, int]]], Samples],
    prompts: Sequence[Prompt],
    rewards: dict[str, Reward],
    protocol: Protocol,
    name: str,
    batch_size: int = 64,
    keep_images: bool = False,
    progress: bool = False,
    features: Any = None,
) -> Evaluation:
    """Score what `draw` gives for each batch of (prompt, seed), in the order of the prompts. `evaluate` says the rest."""
    from tqdm.auto import tqdm

    versions = {label: reward_version(reward) for label, reward in rewards.items()}
    whole = {label: reward for label, reward in rewards.items() if traits_of(reward).arity != "point"}  # these compare samples
    single = {label: reward for label, reward in rewards.items() if label not in whole}
    seeds = seeds_of(prompts, protocol)
    items = [(prompt, seed) for prompt, own in zip(prompts, seeds, strict=True) for seed in own]
    starts: Iterable[int] = range(0, len(items), batch_size)
    parts, scores, embedded, size = [], [], [], protocol.size
    for start in tqdm(starts, desc=f"evaluating {name}", unit="batch", disable=not progress, leave=False):
        part = items[start : start + batch_size]
        samples = draw(part)
        samples.group = torch.arange(start, start + len(part)) // protocol.seeds
        assert samples.images is not None
        *frames, _, height, width = samples.images.shape[1:]
        size = (*frames, height, width)
        scores.append(score(single, samples))
        if features is not None:
            embedded.append(embed(features, samples.images).float().cpu())
        if not (keep_images or whole):
            samples.images = None
        parts.append(samples)
    together = score(whole, concatenate(parts)) if whole else torch.zeros(len(items), 0)
    order = [[*single, *whole].index(label) for label in rewards]
    table = torch.cat([torch.cat(scores), together], 1)[:, order].reshape(len(prompts), protocol.seeds, len(rewards))
    complete = replace(protocol, digest=digest_of(prompts), size=size, rewards={**protocol.rewards, **versions})
    result = Evaluation(name, complete, list(prompts), seeds, list(rewards), table)
    result.samples = concatenate(parts) if keep_images else None
    return with_diversity(result, torch.cat(embedded), reward_version(features)) if features is not None else result


def with_diversity(result: Evaluation, features: Tensor, version: str) -> Evaluation:
    """The evaluation with features (P * S, d) of its pictures, and what they say of each prompt's samples together."""
    result.features = features
    if result.protocol.seeds > 1:
        grouped = features.unflatten(0, (-1, result.protocol.seeds))
        result.measures = {name: measure(grouped) for name, measure in DIVERSITY.items()}
    result.protocol = replace(result.protocol, rewards={**result.protocol.rewards, **dict.fromkeys(DIVERSITY, version)})
    return result


# ------------------------------------------------------------------------------------------------ comparison


@dataclass(frozen=True)
class Difference:
    """Tuned minus base with a 95 % interval; NaN bounds where one prompt, or none, leaves nothing to resample."""

    base: float
    tuned: float
    low: float
    high: float
    prompts: int = 0  #: Those that both have a score for.

    @property
    def value(self) -> float:
        return self.tuned - self.base

    @property
    def significant(self) -> bool:
        return self.low > 0 or self.high < 0


def check_comparable(base: Evaluation, tuned: Evaluation, *rewards: str) -> None:
    """Raise ValueError when the protocols, the prompts or the versions of these rewards differ: such scores do not compare."""
    if found := differences(base.protocol, tuned.protocol, *rewards):
        raise ValueError(
            f"these evaluations do not compare, {base.model} and {tuned.model}: their protocols differ in {'; '.join(found)}"
        )
    if (texts := [p.text for p in base.prompts]) != [p.text for p in tuned.prompts]:
        raise ValueError(
            f"these evaluations do not compare: {base.protocol.prompts} had {len(texts)} prompts for {base.model}, "
            f"and {len(tuned.prompts)} prompts, or others, for {tuned.model}"
        )


def compare(
    base: Evaluation, tuned: Evaluation, reward: str, kind: str | None = None, resamples: int = 10_000, by_kind: bool = False
) -> Difference:
    """Paired difference of means; the interval is a bootstrap over prompts (the seeds of a prompt stay together).

    reward: or a measure. by_kind: the mean of the kinds' means, each resampled by itself. Raises as `check_comparable`.
    """
    check_comparable(base, tuned, reward)
    chosen = base._of(kind)
    a, b = (result.per_prompt(reward)[chosen].double().numpy() for result in (base, tuned))
    both = ~(np.isnan(a) | np.isnan(b))
    strata = [str(base.prompts[i].columns.get("kind")) for i in np.array(chosen)[both]] if by_kind else None
    low, high = interval((b - a)[both], strata, resamples)
    return Difference(mean_of(a[both], strata), mean_of(b[both], strata), low, high, int(both.sum()))


def compare_wins(base: Evaluation, tuned: Evaluation, reward: str, kind: str | None = None) -> Wins:
    """How often tuned beats base on the same prompt and seed. Raises as `check_comparable`."""
    check_comparable(base, tuned, reward)
    chosen = base._of(kind)
    a, b = (result.scores[chosen][:, :, result.rewards.index(reward)].double().numpy() for result in (base, tuned))
    return win_rate(a, b)


def comparison_rows(base: Evaluation, tuned: Evaluation, reward: str) -> tuple[list[str], list[list[str]]]:
    """A table of one reward: a row for each kind and one for all, with interval."""
    header = [reward, base.model, tuned.model, "difference", "95 % interval", "prompts"]
    rows = []
    for kind in [*base.kinds, None]:
        d = compare(base, tuned, reward, kind)
        if d.prompts or kind is None:
            rows.append([kind or "all", *difference_cells(d)])
    return header, rows


def difference_cells(d: Difference) -> list[str]:
    return [number(d.base), number(d.tuned), number(d.value, "+z.3f"), bounds(d.low, d.high, "+z.3f"), str(d.prompts)]


def score_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """A table of one model: a row for each kind and one for all, a column for each reward."""
    header = [evaluation.model, *evaluation.rewards, "prompts"]
    rows = [
        [
            kind or "all",
            *(number(evaluation.mean(name, kind)) for name in evaluation.rewards),
            str(len(evaluation._of(kind))),
        ]
        for kind in [*evaluation.kinds, None]
    ]
    return header, rows


def number(value: float, form: str = "z.3f") -> str:
    """A cell; a dash where there is no number."""
    return "-" if math.isnan(value) else f"{value:{form}}"


def bounds(low: float, high: float, form: str = "z.3f") -> str:
    """The cell of an interval; a dash where there is none."""
    return "-" if math.isnan(low) else f"{low:{form}} to {high:{form}}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
