"""Any reward of pictures for clips: some of the frames are scored one by one.

T2V-Turbo, 2405.18750: five frames at random under an image reward, and all of them under a video reward
VADER, 2407.08737: one frame at random
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.backbones import Frames, check_frames, over_frames
from flowrl.reward_models.base import Traits, as_scores, load_reward, traits_of
from flowrl.reward_models.clips import clips_of

Pick = Literal["even", "random", "first", "last", "all"]
PICKS = ("even", "random", "first", "last", "all")


class FramesOf:
    """A reward of pictures on some frames of each clip, as one number. A frame of which it abstains is left out."""

    def __init__(
        self,
        of: Any,  #: The reward: a name, or {name: ..., option: ...}; one that looks at one picture at a time.
        count: int = 5,  #: Frames that are scored.
        #: even: from the first to the last. random: another choice for every sample, by its seed alone. first, last, all.
        pick: Pick = "even",
        reduce: Frames = "mean",  #: How they count: mean, min (the worst one), or softmin (mostly the worst ones).
    ):
        self.of, self.pick, self.reduce = load_reward(of), pick, check_frames(reduce)
        inner = traits_of(self.of)
        if pick not in PICKS:
            raise ValueError(f"frames: pick={pick!r}: choose {', '.join(PICKS[:-1])} or {PICKS[-1]}")
        if count < 1:
            raise ValueError(f"frames: count={count}: one at least")
        if inner.arity != "point" or not {"clips", "latents"}.isdisjoint(inner.needs):
            looks = f"compares a {inner.arity}" if inner.arity != "point" else f"wants {' and '.join(inner.needs)}"
            raise ValueError(f"frames: {self.of.name} {looks}; give a reward that looks at one picture")
        self.count, self.name = count, self.of.name
        self.traits = Traits(
            needs=tuple(dict.fromkeys(("clips", *(need for need in inner.needs if need != "images")))),
            columns=inner.columns,
            range=inner.range,
            differentiable=inner.differentiable,
            remote=inner.remote,
            licence=inner.licence,
        )

    def __call__(self, samples: Samples) -> Tensor:
        clips = clips_of(samples, self.name)
        chosen = self.chosen(clips.shape[1], samples.seeds).to(clips.device)
        rows = torch.arange(len(clips)).repeat_interleave(chosen.shape[1])
        light = replace(samples, images=None, steps=[], latents=torch.zeros(len(clips), 0), maps=None, each=None)
        pictures = light.select(rows)
        pictures.images = clips[rows.to(clips.device), chosen.flatten()]
        values = as_scores(self.of(pictures), len(rows), self.name).unflatten(0, (-1, chosen.shape[1]))
        if not values.isnan().any():
            return over_frames(values, self.reduce)
        each = [row[~row.isnan()] for row in values]
        return torch.stack([over_frames(row[None], self.reduce)[0] if len(row) else row.new_tensor(torch.nan) for row in each])

    def chosen(self, frames: int, seeds: list[int]) -> Tensor:
        """Which frames of each sample, (N, count), in their order."""
        count = frames if self.pick == "all" else min(self.count, frames)
        if self.pick == "random":
            return torch.stack([torch.randperm(frames, generator=_generator(seed))[:count].sort().values for seed in seeds])
        start = {"last": frames - count}.get(self.pick, 0)
        one = torch.linspace(0, frames - 1, count).round().long() if self.pick == "even" else start + torch.arange(count)
        return one.expand(len(seeds), -1)


def _generator(seed: int) -> torch.Generator:
    """Unlike that of the sample's noise."""
    digest = hashlib.sha256(f"flowrl-frames/{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
