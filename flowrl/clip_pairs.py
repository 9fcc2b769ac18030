"""Preference data of clips: two clips of one prompt, and which is better in each of several respects.

    path_A, path_B, prompt, VQ, MQ, TA, fps_A, fps_B     VideoAlign: A, B or same; anything else says nothing
    video_0, video_1, prompt, label_0, fps_0, fps_1      one label for all respects: 1, 0, 0.5 (a tie), or a probability between

Files are .csv or .jsonl. A clip is a path relative to the file: a video (which wants PyAV), an animated PNG, WebP or GIF, or a
folder of frames. Frame rates are those of the row, else those that the clip says itself.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl.clips import read_clip
from flowrl.data import json_rows, read_text

#: Where a clip is: a path, or its frames (F, 3, H, W) as uint8 or as floats in [0, 1].
ClipSource = Path | Tensor


@dataclass(frozen=True)
class ClipPair:
    """Two clips of one prompt. labels: for each respect the probability that the first is preferred, 0.5 is a tie, NaN unknown.

    fps: of each clip, None where the data does not say.
    """

    prompt: str
    first: ClipSource
    second: ClipSource
    labels: tuple[float, ...]
    fps: tuple[float | None, float | None] = (None, None)

    def clips(self) -> list[tuple[Tensor, float | None]]:
        """Both as (F, 3, H, W) in [0, 1] with their frame rates."""
        loaded = [load_clip(source) for source in (self.first, self.second)]
        return [(frames, own if said is None else said) for (frames, own), said in zip(loaded, self.fps, strict=True)]


def load_clip_pairs(source: str | Path, respects: Sequence[str] = ("VQ", "MQ", "TA")) -> list[ClipPair]:
    """Pairs from a .csv or .jsonl file. Raises FileNotFoundError, or ValueError that names the file and the line."""
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no preference data at {path}")
    pairs = [_pair(row, path.parent, where, respects) for row, where in _rows(path)]
    if not pairs:
        raise ValueError(f"{path} has no pairs in it")
    return pairs


def load_clip(source: ClipSource) -> tuple[Tensor, float | None]:
    """Frames (F, 3, H, W), fp32 in [0, 1], and frames per second where the clip says. Raises ValueError when it is none."""
    if isinstance(source, Tensor):
        return (source.float() / 255 if source.dtype == torch.uint8 else source.float()), None
    pixels, rate = read_clip(source)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, rate


# ------------------------------------------------------------------------------------------------ rows


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    text = read_text(path)
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines(keepends=True))
        for row in reader:
            yield {name: value for name, value in row.items() if name and value}, f"{path}, line {reader.line_num}"
        return
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{path}: preferences of clips are .csv or .jsonl")
    yield from json_rows(text, path)


def _pair(row: dict[str, Any], folder: Path, where: str, respects: Sequence[str]) -> ClipPair:
    if not isinstance(row.get("prompt"), str):
        raise ValueError(f'{where}: wants a text "prompt"')
    for names in (("path_A", "path_B"), ("video_0", "video_1")):
        if all(name in row for name in names):
            break
    else:
        raise ValueError(f"{where}: has no pair of clips (columns path_A, path_B; video_0, video_1)")
    places: list[Path] = []
    for name in names:
        if not isinstance(row[name], str) or not (folder / row[name]).exists():
            raise FileNotFoundError(f"{where}: {name}: there is no clip {folder / str(row[name])}")
        places.append(folder / row[name])
    if names[0] == "path_A":
        known = {"a": 1.0, "b": 0.0, "same": 0.5}
        labels = tuple(known.get(str(row.get(respect, "")).strip().lower(), math.nan) for respect in respects)
        if all(math.isnan(label) for label in labels):
            raise ValueError(f"{where}: none of {', '.join(respects)} is A, B or same")
    else:
        label = _number(row.get("label_0"), f"{where}: label_0")
        if label is None or not 0 <= label <= 1:
            raise ValueError(f"{where}: label_0 is {row.get('label_0')!r}, and must lie in [0, 1]")
        labels = (label,) * len(respects)
    first, second = (_rate(row.get(key), f"{where}: {key}") for key in (f"fps_{name[-1]}" for name in names))
    return ClipPair(row["prompt"], places[0], places[1], labels, (first, second))


def _rate(value: Any, where: str) -> float | None:
    rate = _number(value, where)
    if rate is not None and not rate > 0:
        raise ValueError(f"{where} is {value!r}, and must be positive")
    return rate


def _number(value: Any, where: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{where} is {value!r}, not a number")
    return number
