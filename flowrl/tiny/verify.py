"""Read a picture back: which shapes, of which colours, where; and does that fulfil the caption?

No network is involved. A pixel belongs to the colour whose mixing line with the background passes nearest, if it lies
on the colour's half of that line; connected pixels are a component; a component is the shape whose template, stretched
to the component's box, it overlaps best. A component that resembles no shape is "unknown".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from .render import coverage
from .scenes import BACKGROUND, COLORS, RELATIONS, SHAPES, Object, Spec

if TYPE_CHECKING:
    from torch import Tensor

MIN_AREA = 16  #: Components of fewer pixels are ignored.
MIN_SCORE = 0.74  #: Overlap (soft intersection over union) below which a component is "unknown".
MAX_ASPECT = 1.45  #: Longer boxes are "unknown".
MAX_SIDE = 40  #: Larger boxes (pixels) are "unknown": a picture that is black all over is no black square.
MIN_COSINE = 0.5  #: A relation holds within 60 degrees of its axis, as in GenEval.
_GRID = 16  # templates are _GRID x _GRID
_NEIGHBOURS = np.zeros((3, 3, 3), int)
_NEIGHBOURS[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]  # connected within a plane, never across planes


@dataclass(frozen=True)
class Detection:
    """One component. box: (x0, y0, x1, y1) in pixels, x1 and y1 exclusive; score: overlap with the shape in [0, 1]."""

    shape: str
    color: str
    box: tuple[int, int, int, int]
    score: float

    @property
    def center(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


def _stretch(mask: np.ndarray) -> np.ndarray:
    """(h, w) -> (_GRID, _GRID) by linear interpolation between pixel centres."""
    h, w = mask.shape
    return _weights(h) @ mask @ _weights(w).T


@cache
def _weights(n: int) -> np.ndarray:
    """Rows of interpolation weights (_GRID, n)."""
    at = np.clip((np.arange(_GRID) + 0.5) * n / _GRID - 0.5, 0, n - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n)[None])).astype(np.float32)


@cache
def _templates() -> np.ndarray:
    """(shapes, _GRID * _GRID): each shape averaged over sizes and sub-pixel offsets, cropped as a component is."""
    rows = []
    for shape in SHAPES:
        masks = []
        for size in (15, 18, 21, 25):
            for offset in (0.0, 0.25, 0.5, 0.75):
                canvas = np.zeros((64, 64), np.float32)
                y, x, alpha = coverage(Object(shape, "red", 32 + offset, 32 + offset, size))
                canvas[y, x] = alpha
                box = ndimage.find_objects((canvas > 0.5).astype(int))[0]
                masks.append(_stretch(canvas[box]))
        rows.append(np.mean(masks, 0).ravel())
    return np.stack(rows)


def _segment(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """images (N, 3, H, W) -> alpha (N, H, W) in [0, 1], colour index (N, H, W); alpha is the share of the colour."""
    axes = np.array(list(COLORS.values()), np.float32) - BACKGROUND  # (C, 3), background -> colour
    n, _, h, w = images.shape
    offset = images.reshape(n, 3, h * w) - np.float32(BACKGROUND)
    alpha = np.clip(np.matmul(axes, offset) / (axes**2).sum(1)[:, None], 0, 1)  # (N, C, HW)
    # |offset - alpha axis|^2 without the |offset|^2 that all colours share
    distance = alpha * (alpha * (axes**2).sum(1)[:, None] - 2 * np.matmul(axes, offset))
    color = distance.argmin(1)
    alpha = np.take_along_axis(alpha, color[:, None], 1)[:, 0]
    return alpha.reshape(n, h, w), color.reshape(n, h, w)


def detect_batch(images: Tensor | np.ndarray) -> list[list[Detection]]:
    """Detections of each picture. images: (N, 3, H, W) in [0, 1]; values outside are clipped."""
    pixels = images if isinstance(images, np.ndarray) else images.detach().float().cpu().numpy()
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"images must be (N, 3, H, W), not {tuple(pixels.shape)}")
    pixels = np.clip(np.nan_to_num(pixels), 0, 1)
    n, names = len(pixels), list(COLORS)
    height, width = pixels.shape[2:]
    alpha, color = _segment(pixels)
    planes = (color[:, None] == np.arange(len(names))[:, None, None]) & (alpha > 0.5)[:, None]
    labels: np.ndarray = ndimage.label(planes.reshape(-1, height, width), _NEIGHBOURS)[0]
    found: list[list[Detection]] = [[] for _ in range(n)]
    large = np.bincount(labels.ravel()) >= MIN_AREA
    large[0] = False  # the background
    labels = (np.cumsum(large, dtype=np.int32) * large)[labels]
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        plane, rows, cols = box[0].start, box[1], box[2]
        image, c = divmod(plane, len(names))
        shape, score = _classify(labels[plane, rows, cols] == label, alpha[image, rows, cols])
        where = (cols.start, rows.start, cols.stop, rows.stop)
        found[image].append(Detection(shape, names[c], where, score))
    return found


def _classify(mask: np.ndarray, alpha: np.ndarray) -> tuple[str, float]:
    """Shape and overlap of one component. mask, alpha: (h, w) in its box."""
    h, w = mask.shape
    # Alpha keeps the soft edge, but the neighbours' pixels in the box are not ours.
    ours = _stretch(np.where(ndimage.binary_dilation(mask), alpha, 0).astype(np.float32)).ravel()
    templates = _templates()
    overlap = np.minimum(ours, templates).sum(1) / np.maximum(ours, templates).sum(1)
    best = int(overlap.argmax())
    known = overlap[best] >= MIN_SCORE and max(h, w) <= min(MAX_ASPECT * min(h, w), MAX_SIDE)
    return (SHAPES[best] if known else "unknown"), float(overlap[best])


def detect(image: Tensor | np.ndarray) -> list[Detection]:
    """Detections of one picture. image: (3, H, W) in [0, 1]."""
    return detect_batch(image[None])[0]


def _parts(found: list[Detection], spec: Spec) -> list[float]:
    """The demands of the caption, each in [0, 1]; the picture fulfils the caption iff all are exactly 1."""
    parts, surplus = [], len(found)
    for item in spec["include"]:
        same = [d for d in found if d.shape == item["shape"]]
        parts.append(max(0.0, 1 - abs(len(same) - item["count"]) / item["count"]))
        surplus -= min(len(same), item["count"])
        if item["color"] is not None:
            right = sum(d.color == item["color"] for d in same)
            parts.append(min(right, item["count"]) / item["count"])
    if spec["relation"] is not None:
        parts.append(float(_holds(found, spec)))
    parts.append(1 / (1 + surplus))
    return parts


def _holds(found: list[Detection], spec: Spec) -> bool:
    """Does the relation hold for some pair of the two shapes?"""
    axis = np.array(RELATIONS[spec["relation"]])
    first, second = ([d for d in found if d.shape == item["shape"]] for item in spec["include"])
    for a in first:
        for b in second:
            d = np.subtract(a.center, b.center)
            if d @ axis > MIN_COSINE * np.hypot(*d):
                return True
    return False


def verify(images: Tensor | np.ndarray, specs: Sequence[Spec]) -> tuple[Tensor, Tensor]:
    """Do the pictures show what the captions say? images: (N, 3, H, W) in [0, 1]; returns strict (N,), dense (N,).

    strict is 1.0 or 0.0: exact counts, right colours, the relation within 60 degrees of its axis, and nothing else in
    the picture: any surplus object, known or unknown, fails every kind. dense in [0, 1] is the mean over the demands
    (count of each shape, its colour, the relation, 1 / (1 + surplus objects)); it is 1 exactly where strict is.
    """
    import torch

    if len(images) != len(specs):
        raise ValueError(f"{len(images)} pictures but {len(specs)} specs")
    parts = [_parts(found, spec) for found, spec in zip(detect_batch(images), specs, strict=True)]
    dense = torch.tensor([sum(p) / len(p) if min(p) < 1 else 1.0 for p in parts], dtype=torch.float32)
    strict = torch.tensor([float(min(p) == 1) for p in parts], dtype=torch.float32)
    return strict, dense
