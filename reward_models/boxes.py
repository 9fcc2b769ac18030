"""Detections: what was found, in which box, and how far boxes cover each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Found:
    """One detection. box: (x0, y0, x1, y1) as shares of the picture's width and height; score in [0, 1].

    color: where the detector tells it.
    """

    phrase: str
    box: Box
    score: float
    color: str | None = None


def intersections(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (P, 4) and (T, 4) -> (P, T): intersection over union, and intersection over the smaller of the two."""
    corner0 = np.maximum(a[:, None, :2], b[None, :, :2])
    corner1 = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.clip(corner1 - corner0, 0, None), -1)
    area_a, area_b = (np.prod(np.clip(x[:, 2:] - x[:, :2], 0, None), -1) for x in (a, b))
    union = area_a[:, None] + area_b[None] - shared
    smaller = np.minimum(area_a[:, None], area_b[None])
    return shared / np.maximum(union, 1e-12), shared / np.maximum(smaller, 1e-12)


def distinct(found: Iterable[Found], overlap: float = 0.9) -> list[Found]:
    """Best first, without those that share more than `overlap` of the smaller box with a better one of their phrase.

    That covers both rules in use, intersection over union and containment above 0.9, as the second follows from the first.
    """
    ranked = sorted(found, key=lambda f: -f.score)
    kept: list[int] = []
    if ranked:
        boxes = np.array([f.box for f in ranked])
        within = intersections(boxes, boxes)[1]
        for i, candidate in enumerate(ranked):
            if all(within[i, k] <= overlap or ranked[k].phrase != candidate.phrase for k in kept):
                kept.append(i)
    return [ranked[i] for i in kept]
