"""The grammar of moving shapes: captions that say what moves, where and how, and clips that agree with them.

A *spec* is a plain dict that survives JSON, as in `scenes`::

    {"prompt": "a red circle moving left", "kind": "color",
     "include": [{"shape": "circle", "color": "red", "count": 1, "moves": "left", "speed": None, "size": None}]}

moves is a direction, "still", or None where the caption does not say; speed is "slowly" or "quickly", size "growing" or
"shrinking". The shapes named by one caption are always different.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

from .grammar import Grammar, Spec
from .render import render
from .scenes import BACKGROUND, COLORS, SHAPES, Object, Scene

FRAMES = 9  #: Of a clip: the first, and two times four, as a video autoencoder that shortens by 4 wants it.
SIDE = 48  #: Frames are SIDE x SIDE pixels.
FPS = 8  #: Of files; captions know slow and quick only.
KINDS = ("still", "direction", "color", "speed", "size", "two")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": (0.8, 1.3), "quickly": (2.2, 2.9)}  #: Pixels per frame.
SIZES = ("growing", "shrinking")
TEST_PER_KIND = 16
TWO_TRAIN = 240  #: Of the 464 sentences about two shapes.
_ANY_SPEED = (0.8, 2.9)
_SMALL, _LARGE = (11.5, 13.5), (18.0, 22.0)  # box sides between which an object grows or shrinks
_ALONE, _TOGETHER = (13.0, 18.0), (12.0, 15.0)  # box sides of one object, and of two
_GAP, _MARGIN = 3.0, 1.5  # pixels between two boxes at any time, and between a box and the border


@dataclass(frozen=True)
class Moving:
    """One shape on its way. start: centre (x, y) in the first frame; step: pixels per frame; sides: box in the first and last."""

    shape: str
    color: str
    start: tuple[float, float]
    step: tuple[float, float]
    sides: tuple[float, float]

    def at(self, frame: int) -> Object:
        """The object in frame 0 ... FRAMES - 1."""
        (x, y), (dx, dy), share = self.start, self.step, frame / (FRAMES - 1)
        side = (1 - share) * self.sides[0] + share * self.sides[1]
        return Object(self.shape, self.color, x + dx * frame, y + dy * frame, side)


@dataclass(frozen=True)
class Clip:
    """What `render_clip` draws. background: RGB in [0, 1]."""

    objects: tuple[Moving, ...]
    background: tuple[float, float, float] = (BACKGROUND,) * 3

    def scenes(self) -> Iterator[Scene]:
        """One for each frame."""
        for frame in range(FRAMES):
            yield Scene(tuple(moving.at(frame) for moving in self.objects), self.background)


def render_clip(clip: Clip, rng: np.random.Generator | None = None) -> np.ndarray:
    """(FRAMES, 3, SIDE, SIDE) float32 in [0, 1]. With `rng`, each object's colour varies by up to 0.04, alike in all frames."""
    seed = None if rng is None else int(rng.integers(1 << 32))
    jitter = [None if seed is None else np.random.default_rng(seed) for _ in range(FRAMES)]
    return np.stack([render(scene, own, SIDE) for scene, own in zip(clip.scenes(), jitter, strict=True)])


# ------------------------------------------------------------------------------------------------ captions


def _item(
    shape: str, color: str | None = None, moves: str | None = None, speed: str | None = None, size: str | None = None
) -> Spec:
    return {"shape": shape, "color": color, "count": 1, "moves": moves, "speed": speed, "size": size}


def _spec(kind: str, prompt: str, *include: Spec) -> Spec:
    return {"prompt": prompt, "kind": kind, "include": list(include)}


def _named(shape: str, color: str | None) -> str:
    return f"a {color} {shape}" if color else f"a {shape}"


def _does(moves: str) -> str:
    return "standing still" if moves == "still" else f"moving {moves}"


def _grammar() -> dict[str, list[Spec]]:
    colors = (None, *COLORS)
    still = [_spec("still", f"{_named(s, c)} standing still", _item(s, c, "still")) for c, s in product(colors, SHAPES)]
    direction = [
        _spec("direction", f"{start}a {s} moving {d}", _item(s, None, d))
        for start, s, d in product(("", "a video of "), SHAPES, DIRECTIONS)
    ]
    color = [_spec("color", f"a {c} {s} moving {d}", _item(s, c, d)) for c, s, d in product(COLORS, SHAPES, DIRECTIONS)]
    speed = [
        _spec("speed", f"a {s} moving {d} {v}", _item(s, None, d, speed=v)) for s, d, v in product(SHAPES, DIRECTIONS, SPEEDS)
    ]
    size = [_spec("size", f"{_named(s, c)} {z}", _item(s, c, size=z)) for c, s, z in product(colors, SHAPES, SIZES)]
    ways = [(a, b) for a, b in permutations((*DIRECTIONS, "still"), 2) if a != "still"]
    two = [
        _spec("two", f"a {s} {_does(a)} and a {r} {_does(b)}", _item(s, None, a), _item(r, None, b))
        for (s, r), (a, b) in product(permutations(SHAPES, 2), ways)
    ]
    return dict(zip(KINDS, (still, direction, color, speed, size, two), strict=True))


def _splits() -> dict[str, list[Spec]]:
    splits: dict[str, list[Spec]] = {"all": [], "train": [], "test": []}
    for kind, specs in _grammar().items():
        shuffled = random.Random(f"flowrl-tiny-video/{kind}").sample(specs, len(specs))
        if kind == "direction":  # the two wordings of one sentence stay together
            shuffled.sort(key=lambda spec: (spec["include"][0]["shape"], spec["include"][0]["moves"]))
            pairs = random.Random("flowrl-tiny-video/pairs").sample(range(len(shuffled) // 2), len(shuffled) // 2)
            shuffled = [shuffled[2 * i + j] for i in pairs for j in (0, 1)]
        train = shuffled[TEST_PER_KIND:]
        splits["all"] += specs
        splits["test"] += shuffled[:TEST_PER_KIND]
        splits["train"] += train[:TWO_TRAIN] if kind == "two" else train
    return splits


#: Words that may stand for one another.
_ALIKE = (tuple(COLORS), SHAPES, tuple(DIRECTIONS), tuple(SPEEDS), SIZES)
GRAMMAR = Grammar(KINDS, _splits, _ALIKE)
all_specs, split, random_spec, neighbours = GRAMMAR.all_specs, GRAMMAR.split, GRAMMAR.random_spec, GRAMMAR.neighbours


# ------------------------------------------------------------------------------------------------ clips


def sample_clip(spec: Spec, rng: np.random.Generator) -> Clip:
    """A clip that agrees with the spec: what the caption leaves open (place, side, colour, speed) is random."""
    names = list(COLORS)
    colors = [item["color"] or names[rng.integers(len(names))] for item in spec["include"]]
    while True:
        objects = tuple(_moving(item, color, len(colors) > 1, rng) for item, color in zip(spec["include"], colors, strict=True))
        if all(_apart(a, b) for i, a in enumerate(objects) for b in objects[:i]):
            break
    grey = BACKGROUND + rng.uniform(-0.03, 0.03)
    r, g, b = np.clip(grey + rng.uniform(-0.015, 0.015, 3), 0, 1)
    return Clip(objects, (float(r), float(g), float(b)))


def _moving(item: Spec, color: str, together: bool, rng: np.random.Generator) -> Moving:
    """One object whose whole way lies inside the frame."""
    side = float(rng.uniform(*(_TOGETHER if together else _ALONE)))
    sides = (side, side)
    if item["size"]:
        small, large = float(rng.uniform(*_SMALL)), float(rng.uniform(*_LARGE))
        sides = (small, large) if item["size"] == "growing" else (large, small)
    pace = float(rng.uniform(*(SPEEDS[item["speed"]] if item["speed"] else _ANY_SPEED)))
    dx, dy = (pace * axis for axis in DIRECTIONS.get(item["moves"], (0, 0)))
    lo = [_MARGIN + max(sides) / 2 + max(0.0, -d * (FRAMES - 1)) for d in (dx, dy)]
    hi = [SIDE - _MARGIN - max(sides) / 2 - max(0.0, d * (FRAMES - 1)) for d in (dx, dy)]
    x, y = (float(rng.uniform(a, b)) for a, b in zip(lo, hi, strict=True))
    return Moving(item["shape"], color, (x, y), (dx, dy), sides)


def _apart(a: Moving, b: Moving) -> bool:
    """Do the boxes keep their gap in every frame?"""
    for frame in range(FRAMES):
        p, q = a.at(frame), b.at(frame)
        if max(abs(p.cx - q.cx), abs(p.cy - q.cy)) - (p.size + q.size) / 2 < _GAP:
            return False
    return True
