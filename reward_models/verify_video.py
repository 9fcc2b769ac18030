"""Exact verifiers of the embedded world of clips (`flowrl.tiny.follow`): they read every frame back, and how things move."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.base import Traits
from flowrl.reward_models.clips import Once, clips_of
from flowrl.tiny.follow import PARTS, parts, verdict

Part = Literal["object", "motion", "smooth", "same"]
_TRAITS = Traits(needs=("clips",), columns=("include",), range=(0.0, 1.0))


class TinyVideoStrict:
    """1 when the clip of moving shapes shows what its caption says, all of it, on a smooth way and in every frame; else 0.

    Abstains (NaN) where the prompt carries no description of motion (`include` with `moves`, of the embedded video prompts).
    """

    name = "tiny_video_strict"
    traits = _TRAITS

    def __call__(self, samples: Samples) -> Tensor:
        return _read(samples)[:, len(PARTS)]


class TinyVideoDense:
    """How much of its caption the clip of moving shapes shows, in [0, 1]: the mean of the parts, 1 where `tiny_video_strict` is.

    Abstains (NaN) where the prompt carries no description of motion (`include` with `moves`, of the embedded video prompts).
    """

    name = "tiny_video_dense"
    traits = _TRAITS

    def __call__(self, samples: Samples) -> Tensor:
        return _read(samples)[:, len(PARTS) + 1]


class TinyVideoPart:
    """One demand on the clip of moving shapes, in [0, 1], as a reward of its own.

    object: the right shapes and colours in every frame, and nothing else. motion: direction, speed, change of size. smooth: a
    straight way at an even pace. same: share of the frames that show the same things, asked for or not: a frozen clip has 1.
    Abstains (NaN) as `tiny_video_dense` does.
    """

    traits = _TRAITS

    def __init__(
        self,
        part: Part,  #: object, motion, smooth or same.
    ):
        if part not in PARTS:
            raise ValueError(f"part={part!r}: choose {', '.join(PARTS[:-1])} or {PARTS[-1]}")
        self.name, self.column = f"tiny_video_{part}", PARTS.index(part)

    def __call__(self, samples: Samples) -> Tensor:
        return _read(samples)[:, self.column]


def _described(columns: dict[str, Any]) -> bool:
    items = columns.get("include")
    return isinstance(items, list) and bool(items) and all(isinstance(item, dict) and "moves" in item for item in items)


def _verified(samples: Samples) -> Tensor:
    """(N, 6): the parts, strict, dense; NaN where the prompt says nothing of motion."""
    clips = clips_of(samples, "tiny_video")
    values = torch.full((len(samples), len(PARTS) + 2), torch.nan)
    known = [i for i, prompt in enumerate(samples.prompts) if _described(prompt.columns)]
    if known:
        each = parts(clips[known], [{"prompt": samples.prompts[i].text, **samples.prompts[i].columns} for i in known])
        values[known] = torch.cat([each, torch.stack(verdict(each), 1)], 1)
    return values


_read = Once(_verified)
