"""Clips of moving shapes and what may be said of them: captions one word apart, and which clip shows which caption."""

from __future__ import annotations

from functools import cache

import numpy as np

from .moves import DIRECTIONS, KINDS, SIZES, SPEEDS, Clip, Moving, Spec, all_specs, random_spec, render_clip, sample_clip, split
from .scenes import COLORS, SHAPES

#: Words that may stand for one another.
_ALIKE = (tuple(COLORS), SHAPES, tuple(DIRECTIONS), tuple(SPEEDS), SIZES)


@cache
def _by_prompt() -> dict[str, Spec]:
    return {spec["prompt"]: spec for spec in all_specs()}


@cache
def _neighbours(prompt: str) -> tuple[str, ...]:
    words, found = prompt.split(), []
    for i, word in enumerate(words):
        others = next((group for group in _ALIKE if word in group), ())
        found += [" ".join([*words[:i], other, *words[i + 1 :]]) for other in others if other != word]
    return tuple(other for other in found if other in _by_prompt())


def neighbours(spec: Spec, but: str | None = "test") -> list[Spec]:
    """The captions of the grammar that differ from this one in one word, without those of the split `but`."""
    left_out = {s["prompt"] for s in split(but)} if but else set()
    return [_by_prompt()[other] for other in _neighbours(spec["prompt"]) if other not in left_out]


def shows(clip: Clip, spec: Spec) -> bool:
    """Does the clip show what the caption says, and nothing else? It is `follow` on the clip itself."""
    left = list(clip.objects)
    for item in spec["include"]:
        found = next((moving for moving in left if _is(moving, item)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _is(moving: Moving, item: Spec) -> bool:
    pace = float(np.hypot(*moving.step))
    way = np.array(DIRECTIONS.get(item["moves"], (0, 0)))
    grows = (moving.sides[1] > moving.sides[0]) - (moving.sides[1] < moving.sides[0])
    low, high = SPEEDS[item["speed"]] if item["speed"] else (0.0, np.inf)
    return (
        moving.shape == item["shape"]
        and item["color"] in (None, moving.color)
        and (item["moves"] is None or np.allclose(moving.step, way * pace))
        and (item["moves"] in (None, "still") or pace > 0)
        and low <= pace <= high
        and grows == {"growing": 1, "shrinking": -1}.get(item["size"], 0)
    )


def captioned_clips(count: int, seed: int) -> tuple[np.ndarray, list[Spec], np.ndarray]:
    """Clips (count, F, 3, H, W) with captions, every second caption one word away from the one before it, each with its own clip;
    and which clip shows which caption, (count, count) bool. No caption is of the split "test"."""
    rng = np.random.default_rng(seed)
    specs: list[Spec] = []
    while len(specs) < count:
        spec = random_spec(rng, "train")
        others = neighbours(spec) or [random_spec(rng, "train")]
        specs += [spec, others[rng.integers(len(others))]]
    specs = specs[:count]
    clips = [sample_clip(spec, rng) for spec in specs]
    shown = np.array([[shows(clip, spec) for spec in specs] for clip in clips])
    return np.stack([render_clip(clip, rng) for clip in clips]), specs, shown


def word_tests(per_kind: int, seed: int) -> tuple[np.ndarray, list[Spec], list[Spec]]:
    """Held-out clips, their captions (of "test"), and captions one word away that they do not show, `per_kind` each kind."""
    rng = np.random.default_rng(seed)
    clips, right, wrong = [], [], []
    for kind in KINDS:
        for _ in range(per_kind):
            false: list[Spec] = []
            while not false:
                spec = random_spec(rng, "test", {kind: 1.0})
                clip = sample_clip(spec, rng)
                false = [other for other in neighbours(spec, but=None) if not shows(clip, other)]
            clips.append(clip)
            right.append(spec)
            wrong.append(false[rng.integers(len(false))])
    return np.stack([render_clip(clip, rng) for clip in clips]), right, wrong
