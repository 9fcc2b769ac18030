"""Comparisons in the embedded world: captions that differ in one word, and pairs of pictures with the choices of a made-up human.

Everything is a function of its seed; nothing here imports torch before it is asked for pictures of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from .render import render_batch
from .scenes import COLORS, KINDS, NUMBERS, RELATIONS, SHAPES, Scene, Spec, all_specs, plural, random_spec, sample_scene, split
from .verify import MIN_COSINE, verify

if TYPE_CHECKING:
    from torch import Tensor

#: Words that may stand for one another.
_ALIKE = (tuple(COLORS), SHAPES, tuple(map(plural, SHAPES)), tuple(NUMBERS.values()), ("left", "right"), ("above", "below"))


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


def agreement(scenes: Sequence[Scene], specs: Sequence[Spec]) -> np.ndarray:
    """Which scenes show what which captions say, (scenes, specs) bool: exact counts, right colours, the relation, nothing else.

    It is `verify` on the scenes themselves, for many captions at once.
    """
    shapes, colors = list(SHAPES), list(COLORS)
    counts = np.zeros((len(scenes), len(shapes), len(colors)), int)
    holds = {name: np.zeros((len(scenes), len(shapes), len(shapes)), bool) for name in RELATIONS}
    for n, scene in enumerate(scenes):
        for a in scene.objects:
            counts[n, shapes.index(a.shape), colors.index(a.color)] += 1
            for b in scene.objects:
                dx, dy = a.cx - b.cx, a.cy - b.cy
                for name, (x, y) in RELATIONS.items():
                    if dx * x + dy * y > MIN_COSINE * math.hypot(dx, dy):
                        holds[name][n, shapes.index(a.shape), shapes.index(b.shape)] = True
    of_shape, total = counts.sum(2), counts.sum((1, 2))
    result = np.empty((len(scenes), len(specs)), bool)
    for m, spec in enumerate(specs):
        rows = [shapes.index(item["shape"]) for item in spec["include"]]
        right = total == sum(item["count"] for item in spec["include"])
        for row, item in zip(rows, spec["include"], strict=True):
            right &= (of_shape[:, row] if item["color"] is None else counts[:, row, colors.index(item["color"])]) == item["count"]
        if spec["relation"] is not None:
            right &= holds[spec["relation"]][:, rows[0], rows[1]]
        result[:, m] = right
    return result


#: What is hard is shown more often.
KIND_WEIGHTS = {"single_object": 0.5, "two_object": 1.0, "counting": 1.2, "colors": 0.6, "position": 1.6, "color_attr": 1.2}


def captioned_scenes(count: int, seed: int) -> tuple[np.ndarray, list[Spec], np.ndarray]:
    """Pictures (count, 3, 64, 64) with captions, every second caption one word away from the one before it, each with its own
    scene; and which picture shows which caption, (count, count) bool. No caption is of the split "test"."""
    rng = np.random.default_rng(seed)
    specs: list[Spec] = []
    while len(specs) < count:
        spec = random_spec(rng, "train", KIND_WEIGHTS)
        others = neighbours(spec)
        specs += [spec, others[rng.integers(len(others))]]
    specs = specs[:count]
    scenes = [sample_scene(spec, rng) for spec in specs]
    return render_batch(scenes, rng), specs, agreement(scenes, specs)


def word_tests(per_kind: int, seed: int) -> tuple[np.ndarray, list[Spec], list[Spec]]:
    """Held-out pictures, their captions (of "test"), and captions one word away that they do not show, `per_kind` each kind."""
    rng = np.random.default_rng(seed)
    scenes, right, wrong = [], [], []
    for kind in KINDS:
        for _ in range(per_kind):
            spec = random_spec(rng, "test", {kind: 1.0})
            others = neighbours(spec, but=None)
            scene = sample_scene(spec, rng)
            false = [other for other, shown in zip(others, agreement([scene], others)[0], strict=True) if not shown]
            scenes.append(scene)
            right.append(spec)
            wrong.append(false[rng.integers(len(false))])
    return render_batch(scenes, rng), right, wrong


def drawn_tests(each: int, steps: int = 10) -> tuple[list[str], Tensor, Tensor]:
    """What the embedded generator draws for the held-out captions: captions, pictures (P, each, 3, 64, 64), strict (P, each)."""
    specs = split("test")
    images, strict, _ = drawn(specs, each, seed=0, steps=steps)
    return [spec["prompt"] for spec in specs], images, strict


def drawn(specs: Sequence[Spec], each: int, seed: int, steps: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures of the embedded generator (P, each, 3, 64, 64) in [0, 1], and what the verifier says: strict, dense (P, each)."""
    import torch

    from . import evaluate, model_path, models

    pipe, parts = models.load(model_path()), []
    seeds = np.random.default_rng([seed, 1]).integers(1 << 62, size=(len(specs), each)).tolist()
    jobs = [(spec, seeds[i][j]) for i, spec in enumerate(specs) for j in range(each)]
    for start in range(0, len(jobs), 64):
        part = jobs[start : start + 64]
        parts.append(evaluate.sample(pipe, [spec["prompt"] for spec, _ in part], [s for _, s in part], num_inference_steps=steps))
    images = torch.cat(parts)
    strict, dense = verify(images, [spec for spec, _ in jobs])
    shape = (len(specs), each)
    return images.unflatten(0, shape), strict.view(shape), dense.view(shape)
