"""Shaping: what happens to a reward's values before they are compared. Plain functions of (N,) tensors; NaN stays NaN.

In a recipe, in order:  rewards.hpsv2={weight: 1, shape: [{par: {k: 3}}, {cap: 0.9}]}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowrl.batch import Prompt, Samples
from flowrl.data import generators
from flowrl.reward_models.base import Reward, as_scores, load_reward, nearest, traits_of


def cap(r: Tensor, at: float) -> Tensor:
    """min(r, at): above it there is nothing to gain, and no gradient (ReFL's relu(at - r), arXiv 2304.05977)."""
    return r.clamp(max=at)


def sigmoid(r: Tensor, center: float = 0.0, scale: float = 1.0) -> Tensor:
    """1 / (1 + exp(-(r - center) / scale)): bounded in (0, 1)."""
    return torch.sigmoid((r - center) / scale)


def preference_as_reward(r: Tensor, r_ref: Tensor, k: float = 1.0, scale: float | None = None) -> Tensor:
    """PAR (Reward Shaping to Mitigate Reward Hacking in RLHF): mean over references m of sigmoid(k (r - r_ref_m) / scale).

    In (0, 1); 1/2 is as good as they are.

    r: (N,); r_ref: (N, M), NaN where a reference has no value. scale: None divides by the deviation of all r_ref, so that k
    means the same for a reward that varies by hundredths and one that varies by tens.
    """
    if scale is None:
        valid = r_ref[~r_ref.isnan()].float()
        scale = max(float(valid.std()) if len(valid) > 1 else 1.0, 1e-6)
    return torch.sigmoid(k * (r[:, None] - r_ref) / scale).nanmean(1)


def dither(r: Tensor, group: Tensor, noise: Tensor, std: float = 0.05) -> Tensor:
    """ReDit (Reward Dithering for Improved LLM Policy Optimization): zero-mean noise breaks the ties of a 0/1 verifier.

    r, noise: (N,); group: (N,) int64. Groups in which all values are equal stay as they are: there, noise would be all of the
    advantage.
    """
    _, inverse = torch.unique(group, return_inverse=True)
    groups = int(inverse.max()) + 1 if len(inverse) else 0
    low = r.new_full((groups,), math.inf).scatter_reduce(0, inverse, r.nan_to_num(math.inf), "amin")
    high = r.new_full((groups,), -math.inf).scatter_reduce(0, inverse, r.nan_to_num(-math.inf), "amax")
    return torch.where((high > low)[inverse], r + std * noise, r)


def softmin(r: Tensor, temperature: float = 0.1, dim: int = -1) -> Tensor:
    """PURE (Stop Summation: Min-Form Credit Assignment): sum softmax(-r / T) r over steps, frames or criteria.

    Near the worst of them, yet all count. NaN entries are left out; NaN where all are.
    """
    weight = torch.softmax((-r / temperature).masked_fill(r.isnan(), -math.inf), dim)
    return torch.where(r.isnan().all(dim), torch.nan, (weight * r).nan_to_num(0.0).sum(dim))


# ------------------------------------------------------------------------------------------------ as part of a reward


class Shaped:
    """A reward whose values are shaped.

    shape: {name: options}, a name alone, or a list of such, in order; a number in place of options is the first of them.
    """

    def __init__(self, of: Any, shape: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]):
        self.of: Reward = load_reward(of)
        self.steps = [_step(name, options) for name, options in _named_steps(shape)]
        if not self.steps:
            raise ValueError("shape is empty; leave it out")
        self.name = self.of.name
        self.traits = _shaped_traits(self.of, self.steps)

    def __call__(self, samples: Samples) -> Tensor:
        values = as_scores(self.of(samples), len(samples), self.name)
        for name, options in self.steps:
            values = _STEPS[name](values, self, samples, **options)
        return values

    def reference_scores(self, samples: Samples) -> Tensor:
        """(N, R): the inner reward of each sample's reference pictures. The samples of a prompt share them: scored once."""
        assert samples.references is not None
        groups = samples.by_group()
        count = samples.references.shape[1]
        first = [int(rows[0]) for rows in groups]
        owners = [i for i in first for _ in range(count)]
        pictures = Samples(
            prompts=[Prompt(samples.prompts[i].text, samples.prompts[i].columns) for i in owners],
            seeds=[samples.seeds[i] for i in owners],
            group=samples.group[torch.tensor(owners)],
            latents=samples.latents[torch.tensor(owners)],
            images=samples.references[torch.tensor(first)].flatten(0, 1),
            fps=samples.fps,
        )
        scores = as_scores(self.of(pictures), len(owners), self.name).unflatten(0, (len(groups), count))
        out = torch.full((len(samples), count), torch.nan)
        for rows, values in zip(groups, scores, strict=True):
            out[rows] = values.detach()
        return out


def _par(r: Tensor, shaped: Shaped, samples: Samples, k: float = 1.0, scale: float | None = None) -> Tensor:
    return preference_as_reward(r, shaped.reference_scores(samples), k, scale)


def _dither(r: Tensor, shaped: Shaped, samples: Samples, std: float = 0.05) -> Tensor:
    noise = torch.stack([torch.randn((), generator=g) for g in generators(samples.seeds, offset=1)])
    return dither(r, samples.group.cpu(), noise, std)


#: Shapes by the name that a recipe uses, each as f(values, shaped, samples, **options).
_STEPS: dict[str, Callable[..., Tensor]] = {
    "cap": lambda r, shaped, samples, at: cap(r, at),
    "sigmoid": lambda r, shaped, samples, center=0.0, scale=1.0: sigmoid(r, center, scale),
    "par": _par,
    "dither": _dither,
    "negate": lambda r, shaped, samples: -r,
}
_FIRST = {"cap": "at", "sigmoid": "center", "par": "k", "dither": "std"}
_OPTIONS = {"cap": {"at"}, "sigmoid": {"center", "scale"}, "par": {"k", "scale"}, "dither": {"std"}, "negate": set()}


def _named_steps(shape: Any) -> Iterator[tuple[str, Any]]:
    for step in [shape] if isinstance(shape, str | Mapping) else shape if isinstance(shape, list | tuple) else [shape]:
        if isinstance(step, str):
            yield step, None
        elif isinstance(step, Mapping):
            yield from step.items()
        else:
            raise ValueError(f"shape={step!r}: a name, {{name: options}}, or a list of them; names are {', '.join(_STEPS)}")


def _step(name: str, options: Any) -> tuple[str, dict[str, float]]:
    if name not in _STEPS:
        raise ValueError(f"shape {name!r}{nearest(name, _STEPS)}")
    if options is None or options is True:
        options = {}
    elif not _OPTIONS[name]:
        raise ValueError(f"shape {name} has no options, and got {options!r}")
    elif not isinstance(options, Mapping):
        options = {_FIRST[name]: options}
    for key, value in options.items():
        if key not in _OPTIONS[name]:
            raise ValueError(f"shape {name} has no option {key!r}{nearest(key, _OPTIONS[name])}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"shape {name}: {key}={value!r} is not a number")
        if key in ("scale", "std", "k") and value <= 0:
            raise ValueError(f"shape {name}: {key}={value} must be positive")
    if name == "cap" and "at" not in options:
        raise ValueError("shape cap needs its value, as in {cap: 2.0}")
    return name, dict(options)


def _shaped_traits(of: Reward, steps: list[tuple[str, dict[str, float]]]) -> Any:
    """What the shapes do to the range, the arity and the needs."""
    traits = traits_of(of)
    low, high = traits.range
    for name, options in steps:
        if name == "cap":
            low, high = min(low, options["at"]), min(high, options["at"])
        elif name in ("sigmoid", "par"):
            low, high = 0.0, 1.0
        elif name == "negate":
            low, high = -high, -low
        elif name == "dither":
            low, high = -math.inf, math.inf
            traits = replace(traits, arity="group" if traits.arity == "point" else traits.arity)
        if name == "par":
            needs = tuple(dict.fromkeys([*traits.needs, "references"]))
            alone = "scale" in options and traits.arity == "point"
            traits = replace(traits, needs=needs, arity="point" if alone else "batch")
    return replace(traits, range=(low, high))
