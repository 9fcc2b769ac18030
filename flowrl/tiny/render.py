"""Draw scenes: anti-aliased shapes on a light background, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .scenes import COLORS, SIZE, Object, Scene

_SUPER = 4  # sub-pixels per pixel and axis

# Corners of a five-pointed star, stretched so that its box is [-1, 1] x [-1, 1].
_ANGLES = np.pi * np.arange(10) / 5 - np.pi / 2
_RADII = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
_STAR = np.stack([_RADII * np.cos(_ANGLES), _RADII * np.sin(_ANGLES)], 1)
_STAR = 2 * (_STAR - _STAR.min(0)) / np.ptp(_STAR, axis=0) - 1


def _polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Inside test by crossing number."""
    inside = np.zeros(np.broadcast(x, y).shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Is (x, y) in the shape whose box is [-1, 1] x [-1, 1]? y points downwards."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "ring":
        r2 = x * x + y * y
        return (r2 <= 1) & (r2 >= 0.55**2)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 1
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.34) & (np.maximum(abs(x), abs(y)) <= 1)
    if shape == "triangle":
        return (abs(y) <= 1) & (abs(x) <= (y + 1) / 2)
    if shape == "star":
        return _polygon(x, y, _STAR)
    raise ValueError(f"unknown shape {shape!r}")


def coverage(obj: Object, size: int = SIZE) -> tuple[slice, slice, np.ndarray]:
    """Rows, columns and covered fraction (h, w) in [0, 1] of the pixels around one object."""
    lo = np.floor([obj.cy - obj.size / 2, obj.cx - obj.size / 2]).astype(int).clip(0, size)
    hi = np.ceil([obj.cy + obj.size / 2, obj.cx + obj.size / 2]).astype(int).clip(0, size)
    (h, w), k = hi - lo, _SUPER
    y = (lo[0] + (np.arange(h * k) + 0.5) / k - obj.cy) / (obj.size / 2)
    x = (lo[1] + (np.arange(w * k) + 0.5) / k - obj.cx) / (obj.size / 2)
    mask = inside(obj.shape, x[None, :], y[:, None])
    return slice(lo[0], hi[0]), slice(lo[1], hi[1]), mask.reshape(h, k, w, k).mean((1, 3), dtype=np.float32)


def render(scene: Scene, rng: np.random.Generator | None = None, size: int = SIZE) -> np.ndarray:
    """One picture: (3, size, size) float32 in [0, 1]. With `rng`, each object's colour varies by up to 0.04."""
    image = np.empty((3, size, size), np.float32)
    image[:] = np.asarray(scene.background, np.float32)[:, None, None]
    for obj in scene.objects:
        rows, cols, alpha = coverage(obj, size)
        color = np.asarray(COLORS[obj.color], np.float32)
        if rng is not None:
            color = np.clip(color + rng.uniform(-0.04, 0.04, 3).astype(np.float32), 0, 1)
        patch = image[:, rows, cols]
        patch += alpha * (color[:, None, None] - patch)
    return image


def render_batch(scenes: Sequence[Scene], rng: np.random.Generator | None = None) -> np.ndarray:
    """Pictures (N, 3, 64, 64), float32 in [0, 1]."""
    return np.stack([render(scene, rng) for scene in scenes])
