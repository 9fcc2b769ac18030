"""Clips of moving shapes and what may be said of them: captions one word apart, and which clip shows which caption."""

from __future__ import annotations

import numpy as np

from .moves import DIRECTIONS, KINDS, SPEEDS, Clip, Moving, Spec, neighbours, random_spec, render_clip, sample_clip


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
