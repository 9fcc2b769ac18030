"""Pairs of clips of moving shapes whose flaws are known, and what a judge of pictures, motion and text would say of them.

A clip has a flaw of each kind, or none: standing noise (visual quality), a shaking camera (motion), other content (text).
The clip with less of a flaw is preferred in that respect; equal ones are a tie. Everything is a function of the random generator.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .moves import Spec, random_spec, render_clip, sample_clip

RESPECTS = ("VQ", "MQ", "TA")
NOISE = (0.0, 0.06, 0.15)  #: Standard deviation of the noise, alike in all frames, by level.
SHAKE = (0, 1, 3)  #: Pixels by which each frame is displaced at most, by level.


class FlawedPair(NamedTuple):
    """clips: (2, F, 3, H, W) in [0, 1]; labels: for each respect 1 where the first is preferred, 0 the second, 0.5 neither."""

    spec: Spec
    clips: np.ndarray
    labels: tuple[float, float, float]


def flawed(spec: Spec, levels: tuple[int, int, int], rng: np.random.Generator, split_name: str = "train") -> np.ndarray:
    """(F, 3, H, W): a clip of the spec with flaws. levels: of noise, of shaking (0 to 2), 1 for another caption's content."""
    shown = spec
    while levels[2] and shown["include"] == spec["include"]:
        shown = random_spec(rng, split_name)
    clip = render_clip(sample_clip(shown, rng), rng)
    noise = rng.normal(size=clip.shape[1:]).astype(np.float32) * NOISE[levels[0]]
    reach = SHAKE[levels[1]]
    offsets = rng.integers(-reach, reach + 1, size=(len(clip), 2))
    padded = np.pad(clip, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="edge")
    height, width = clip.shape[-2:]
    places = [(reach + int(y), reach + int(x)) for y, x in offsets]
    moved = [frame[:, y : y + height, x : x + width] for frame, (y, x) in zip(padded, places, strict=True)]
    return np.clip(np.stack(moved) + noise, 0, 1)


def flawed_pair(rng: np.random.Generator, split_name: str = "train") -> FlawedPair:
    """A random caption and two clips for it, each with random flaws."""
    spec = random_spec(rng, split_name)
    drawn = [(int(rng.integers(3)), int(rng.integers(3)), int(rng.integers(2))) for _ in range(2)]
    clips = np.stack([flawed(spec, levels, rng, split_name) for levels in drawn])
    first, second, third = (float((b > a) + 0.5 * (a == b)) for a, b in zip(*drawn, strict=True))
    return FlawedPair(spec, clips, (first, second, third))
