"""The grammar of the embedded world: captions of the six GenEval kinds, and scenes that agree with them.

A *spec* is a plain dict that survives JSON::

    {"prompt": "a circle left of a square", "kind": "position",
     "include": [{"shape": "circle", "color": None, "count": 1}, {"shape": "square", "color": None, "count": 1}],
     "relation": "left of"}          # of include[0] with respect to include[1]; None for every other kind

The shapes named by one caption are always different, so that a detection belongs to at most one entry of `include`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import combinations, permutations, product

import numpy as np

from .grammar import Grammar, Spec

SIZE = 64  #: Pictures are SIZE x SIZE pixels.
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
#: sRGB in [0, 1], far apart as seen from the light background.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.14, 0.14),
    "green": (0.12, 0.62, 0.22),
    "blue": (0.12, 0.30, 0.88),
    "yellow": (0.95, 0.78, 0.08),
    "purple": (0.62, 0.18, 0.74),
    "black": (0.08, 0.08, 0.08),
}
BACKGROUND = 0.94  #: Mean grey level of the background.
KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = {2: "two", 3: "three", 4: "four"}
FRAMES = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "a drawing of {}",
    "a painting of {}",
    "an icon of {}",
    "an image of {}",
)
TEST_PER_KIND = 20
COLOR_ATTR_TRAIN = 240  #: Of the 900 bindings, so that most are never seen.
_SIZES = {1: (20, 28), 2: (18, 24), 3: (16, 21), 4: (15, 18)}  # objects in the scene -> box side, pixels
_GAP, _MARGIN = 4.0, 2.0  # pixels between two boxes, and between a box and the border


@dataclass(frozen=True)
class Object:
    """One shape. cx, cy: centre of its bounding box; size: side of the box; all in pixels, y downwards."""

    shape: str
    color: str
    cx: float
    cy: float
    size: float


@dataclass(frozen=True)
class Scene:
    """What the renderer draws. background: RGB in [0, 1]."""

    objects: tuple[Object, ...]
    background: tuple[float, float, float] = (BACKGROUND,) * 3


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _spec(kind: str, prompt: str, *include: tuple[str, str | None, int], relation: str | None = None) -> Spec:
    items = [{"shape": shape, "color": color, "count": count} for shape, color, count in include]
    return {"prompt": prompt, "kind": kind, "include": items, "relation": relation}


def _grammar() -> dict[str, list[list[Spec]]]:
    """kind -> combinations -> the specs that share the combination; a combination is held out as a whole."""
    colored = list(product(COLORS, SHAPES))
    pairs = list(permutations(SHAPES, 2))
    singles = [[_spec("single_object", f.format(f"a {s}"), (s, None, 1))] for s, f in product(SHAPES, FRAMES)]
    two = [
        [
            _spec("two_object", f.format(f"a {a} and a {b}"), (a, None, 1), (b, None, 1))
            for (a, b), f in product((pair, pair[::-1]), FRAMES[:3])
        ]
        for pair in combinations(SHAPES, 2)
    ]
    counting = [
        [_spec("counting", f"{NUMBERS[n]} {c + ' ' if c else ''}{plural(s)}", (s, c, n))]
        for n, s, c in product(NUMBERS, SHAPES, (None, *COLORS))
    ]
    colors = [[_spec("colors", f.format(f"a {c} {s}"), (s, c, 1)) for f in FRAMES[:2]] for c, s in colored]
    position = [
        [_spec("position", f"a {a} {r} a {b}", (a, None, 1), (b, None, 1), relation=r)] for (a, b), r in product(pairs, RELATIONS)
    ]
    color_attr = [
        [_spec("color_attr", f"a {c} {a} and a {d} {b}", (a, c, 1), (b, d, 1))]
        for (a, b), (c, d) in product(pairs, permutations(COLORS, 2))
    ]
    return dict(zip(KINDS, (singles, two, counting, colors, position, color_attr), strict=True))


def _splits() -> dict[str, list[Spec]]:
    splits: dict[str, list[Spec]] = {"all": [], "train": [], "test": []}
    for kind, groups in _grammar().items():
        splits["all"] += [spec for group in groups for spec in group]
        shuffled = random.Random(f"flowrl-tiny/{kind}").sample(groups, len(groups))
        size = len(groups[0])
        held = -(-TEST_PER_KIND // size)  # combinations held out, rounded up
        splits["test"] += [spec for group in shuffled[:held] for spec in group][:TEST_PER_KIND]
        train = [spec for group in shuffled[held:] for spec in group]
        splits["train"] += train[:COLOR_ATTR_TRAIN] if kind == "color_attr" else train
    return splits


#: Words that may stand for one another.
_ALIKE = (tuple(COLORS), SHAPES, tuple(map(plural, SHAPES)), tuple(NUMBERS.values()), ("left", "right"), ("above", "below"))
GRAMMAR = Grammar(KINDS, _splits, _ALIKE)
all_specs, split, random_spec, neighbours = GRAMMAR.all_specs, GRAMMAR.split, GRAMMAR.random_spec, GRAMMAR.neighbours


def sample_scene(spec: Spec, rng: np.random.Generator) -> Scene:
    """A scene that agrees with the spec: what the caption leaves open (place, size, colour) is random.

    Objects of one `include` entry share their colour; boxes keep a gap of 4 pixels.
    """
    names = list(COLORS)
    wanted = []
    for item in spec["include"]:
        color = item["color"] or names[rng.integers(len(names))]
        wanted += [(item["shape"], color)] * item["count"]
    low, high = _SIZES[min(len(wanted), max(_SIZES))]
    while True:
        sizes = rng.uniform(low, high, len(wanted))
        centres = _place(sizes, rng, spec["relation"])
        if centres is not None:
            break
    objects = tuple(
        Object(shape, color, float(x), float(y), float(s))
        for (shape, color), (x, y), s in zip(wanted, centres, sizes, strict=True)
    )
    grey = BACKGROUND + rng.uniform(-0.03, 0.03)
    r, g, b = np.clip(grey + rng.uniform(-0.015, 0.015, 3), 0, 1)
    return Scene(objects, (float(r), float(g), float(b)))


def _place(sizes: np.ndarray, rng: np.random.Generator, relation: str | None, tries: int = 60) -> np.ndarray | None:
    """Centres (n, 2) of boxes that do not touch, or None after too many tries."""
    centres: list[np.ndarray] = []
    for i, size in enumerate(sizes):
        lo, hi = _MARGIN + size / 2, SIZE - _MARGIN - size / 2
        for _ in range(tries):
            point = rng.uniform(lo, hi, 2)
            gaps = [np.abs(point - c).max() - (size + sizes[j]) / 2 for j, c in enumerate(centres)]
            if all(g >= _GAP for g in gaps) and (relation is None or i == 0 or _related(centres[0], point, relation)):
                centres.append(point)
                break
        else:
            return None
    return np.stack(centres)


def _related(a: np.ndarray, b: np.ndarray, relation: str, cosine: float = 0.8) -> bool:
    d = np.asarray(a) - np.asarray(b)
    return float(d @ np.array(RELATIONS[relation])) >= cosine * float(np.hypot(*d))
