"""Read a clip back: which shapes, and how they move; and does that fulfil the caption?

Every frame is read as a picture (`verify`). The detections of one shape are its track; a line through the centres says where it
goes, how fast, and how far it strays from the line; the boxes say whether it grows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .moves import DIRECTIONS, SPEEDS, Spec
from .verify import Detection, detect_batch

if TYPE_CHECKING:
    from torch import Tensor

STILL = 0.3  #: Pixels per frame up to which a shape stands still ...
MOVING = 0.55  #: ... and from which on it moves.
BETWEEN = (SPEEDS["slowly"][1] + SPEEDS["quickly"][0]) / 2  #: Pixels per frame: slower is slow, faster is quick.
MIN_COSINE = 0.85  #: Between the way and the direction asked for: within 32 degrees.
STRAY = 0.8  #: Pixels, root mean square distance from the line, up to which a way is smooth.
GROWTH = 1.25  #: Ratio of the sides at the end and at the start from which on a shape grows; below 1 / GROWTH it shrinks.
PARTS = ("object", "motion", "smooth", "same")  #: What `parts` tells apart.
CHUNK = 8  #: Clips read at a time: more do not fit a processor's cache, and take twice as long.


def _track(frames: Sequence[list[Detection]], item: Spec) -> list[Detection | None]:
    """In every frame the detection of the item's shape, the one of its colour first; None where there is none."""
    track: list[Detection | None] = []
    for found in frames:
        same = [d for d in found if d.shape == item["shape"]]
        track.append(max(same, key=lambda d: (d.color == item["color"], d.score), default=None))
    return track


def _line(values: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, float]:
    """Slope (D,) of values (n, D) at times (n,) by least squares, and the root mean square distance from the line."""
    centred = times - times.mean()
    slope = centred @ values / max(float(centred @ centred), 1e-12)
    rest = values - values.mean(0) - centred[:, None] * slope
    return slope, float(np.sqrt((rest**2).sum(1).mean()))


def _motion(item: Spec, slope: np.ndarray, growth: float) -> list[float]:
    """The demands on an object's motion, each in [0, 1]. slope: pixels per frame; growth: last side over first."""
    speed, parts = float(np.hypot(*slope)), []
    if item["moves"] == "still":
        parts.append(1.0 if speed <= STILL else max(0.0, 1 - (speed - STILL) / MOVING))
    elif item["moves"]:
        cosine = float(slope @ np.array(DIRECTIONS[item["moves"]])) / max(speed, 1e-6)
        parts.append(1.0 if cosine >= MIN_COSINE and speed >= MOVING else max(0.0, cosine) * min(1.0, speed / MOVING) * 0.9)
    if item["speed"]:
        far = (BETWEEN - speed) if item["speed"] == "slowly" else (speed - BETWEEN)
        parts.append(1.0 if far > 0 else max(0.0, 1 + far))
    if item["size"]:
        gain = np.log(growth) if item["size"] == "growing" else -np.log(growth)
        parts.append(float(np.clip(gain / np.log(GROWTH), 0, 1)))
    elif not 1 / GROWTH < growth < GROWTH:
        parts.append(0.5)  # it was not asked to
    return parts


def _clip_parts(frames: Sequence[list[Detection]], spec: Spec) -> dict[str, float]:
    """The demands on one clip, each in [0, 1]."""
    n, items = len(frames), spec["include"]
    shown, motions, smooth = [], [], []
    for item in items:
        track = _track(frames, item)
        there = [d is not None and item["color"] in (None, d.color) for d in track]
        shown.append(sum(there) / n)
        seen = [(i, d) for i, d in enumerate(track) if d is not None]
        if len(seen) < max(3, n // 2):
            motions.append(0.0)
            smooth.append(0.0)
            continue
        times = np.array([i for i, _ in seen], float)
        sides = np.array([[(d.box[2] - d.box[0] + d.box[3] - d.box[1]) / 2] for _, d in seen])
        slope, stray = _line(np.array([d.center for _, d in seen]), times)
        grow, _ = _line(sides, times)
        middle, reach = float(sides.mean()), float(grow[0]) * (n - 1) / 2
        growth = max(middle + reach, 1.0) / max(middle - reach, 1.0)
        motions += _motion(item, slope, growth)
        smooth.append(1.0 if stray <= STRAY else STRAY / stray)
    kinds = [Counter((d.shape, d.color) for d in found) for found in frames]
    common = Counter(tuple(sorted(kind.items())) for kind in kinds).most_common(1)[0][1]
    surplus = float(np.mean([max(0, len(found) - len(items)) for found in frames]))
    return {
        "object": float(np.mean(shown)) / (1 + surplus),
        "motion": float(np.mean(motions)) if motions else 1.0,
        "smooth": float(np.mean(smooth)),
        "same": common / n,
    }


def parts(clips: Tensor | np.ndarray, specs: Sequence[Spec]) -> Tensor:
    """(N, 4) how well each demand of `PARTS` is met, in [0, 1]. clips: (N, F, 3, H, W) in [0, 1].

    object: the shapes and colours asked for are in every frame, and nothing else. motion: direction, speed, change of size.
    smooth: a straight way at an even pace. same: share of the frames that show the same shapes and colours, asked for or not.
    """
    import torch

    pixels = clips if isinstance(clips, np.ndarray) else clips.detach().float().cpu().numpy()
    if pixels.ndim != 5 or pixels.shape[2] != 3:
        raise ValueError(f"clips must be (N, F, 3, H, W), not {tuple(pixels.shape)}")
    if len(pixels) != len(specs):
        raise ValueError(f"{len(pixels)} clips but {len(specs)} specs")
    n, f = pixels.shape[:2]
    chunks = (pixels[i : i + CHUNK].reshape(-1, *pixels.shape[2:]) for i in range(0, n, CHUNK))
    found = [frame for chunk in chunks for frame in detect_batch(chunk)]
    rows = [_clip_parts(found[i * f : (i + 1) * f], spec) for i, spec in enumerate(specs)]
    return torch.tensor([[row[name] for name in PARTS] for row in rows], dtype=torch.float32).reshape(n, len(PARTS))


def follow(clips: Tensor | np.ndarray, specs: Sequence[Spec]) -> tuple[Tensor, Tensor]:
    """Do the clips show what the captions say? clips: (N, F, 3, H, W) in [0, 1]; returns strict (N,), dense (N,).

    strict is 1.0 or 0.0: in every frame the right shapes and colours and nothing else, the right motion, on a smooth way. dense
    in [0, 1] is the mean of `parts`; it is 1 exactly where strict is.
    """
    return verdict(parts(clips, specs))


def verdict(each: Tensor) -> tuple[Tensor, Tensor]:
    """strict (N,) and dense (N,) of `parts` (N, 4)."""
    strict = (each > 1 - 1e-6).all(1).float()
    return strict, each.mean(1).where(strict == 0, 1.0)
