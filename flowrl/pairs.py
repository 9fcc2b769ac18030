"""Preference data: pictures of one prompt, and which of them is better. Read from files, folders and the samples of a run.

    prompt (or caption), jpg_0, jpg_1, label_0        Pick-a-Pic: label_0 is 1, 0, 0.5 (a tie), or a probability between
    prompt, chosen, rejected                          also positive, negative (Social Reward)
    prompt, images, ranks                             lists: rank 1 is the best, equal ranks are ties
    RUN/samples/step-*/samples.jsonl                  pictures of one prompt group, compared by one of their rewards

Files are .jsonl or .parquet (which wants pyarrow). A picture is a path (relative to the file), {"bytes": ...}, or base64 text. A
folder is a run, or the result of `flowrl sample`, or holds chosen/NAME.png, rejected/NAME.png and prompts/NAME.txt.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl.batch import stacked
from flowrl.clip_pairs import load_clip
from flowrl.clips import is_clip
from flowrl.data import json_rows, read_text

#: Where a picture is: a file, its encoded bytes, or pixels (3, H, W) as uint8 or as floats in [0, 1].
Source = Path | bytes | Tensor

PAIR_COLUMNS = (
    ("jpg_0", "jpg_1"),
    ("image_0", "image_1"),
    ("chosen", "rejected"),
    ("positive", "negative"),
    ("pos_path", "neg_path"),
)
SAMPLES = "samples.jsonl"
MAX_PIXELS = 1 << 26  #: Of a picture: one that claims more is not unpacked.


@dataclass(frozen=True)
class PreferencePair:
    """Two pictures of one prompt. label: probability that the first is preferred, 0.5 is a tie. weight: of the pair in a loss."""

    prompt: str
    first: Source
    second: Source
    label: float = 1.0
    weight: float = 1.0

    @property
    def as_list(self) -> RankedList:
        """The pair as a list of two; a soft label counts as its nearer end."""
        ranks = (1.0, 1.0) if self.label == 0.5 else (1.0, 2.0) if self.label > 0.5 else (2.0, 1.0)
        return RankedList(self.prompt, (self.first, self.second), ranks)


@dataclass(frozen=True)
class RankedList:
    """Pictures of one prompt in order. ranks: 1 is the best, equal ranks are ties."""

    prompt: str
    pictures: tuple[Source, ...]
    ranks: tuple[float, ...]

    @property
    def pairs(self) -> list[PreferencePair]:
        """All pairs, the better one first; each weighs so that the list counts as one."""
        found = []
        for i, j in combinations(range(len(self.pictures)), 2):
            i, j = (i, j) if self.ranks[i] <= self.ranks[j] else (j, i)
            found.append((i, j, 0.5 if self.ranks[i] == self.ranks[j] else 1.0))
        weight = 1 / len(found)
        return [PreferencePair(self.prompt, self.pictures[i], self.pictures[j], label, weight) for i, j, label in found]


def load_lists(source: str | Path, reward: str | None = None, gap: float = 0.0) -> list[RankedList]:
    """Ranked lists from a file or folder; pairs become lists of two. Arguments and errors as in `load_pairs`."""
    return [item if isinstance(item, RankedList) else item.as_list for item in _read(Path(source), reward, gap)]


def load_pairs(source: str | Path, reward: str | None = None, gap: float = 0.0) -> list[PreferencePair]:
    """Preference pairs from a file or folder; of a list, all its pairs.

    reward: which of a run's rewards compares its pictures. gap: a difference up to it is a tie (0: only equal rewards are).
    Raises FileNotFoundError, or ValueError that names the file and the line.
    """
    pairs: list[PreferencePair] = []
    for item in _read(Path(source), reward, gap):
        pairs += item.pairs if isinstance(item, RankedList) else [item]
    return pairs


def load_shown(file: Path) -> tuple[Tensor, float | None]:
    """A picture (3, H, W), or a clip (F, 3, H, W) with its frames per second, fp32 in [0, 1]. Raises as `load_picture`."""
    return load_clip(file) if is_clip(file) else (load_picture(file), None)


def load_batch(files: Sequence[Path]) -> tuple[Tensor, float | None]:
    """Pictures (N, 3, H, W), or clips (N, F, 3, H, W) with their frames per second, fp32 in [0, 1].

    Raises ValueError where they differ in size, in length or in rate, and as `load_picture`.
    """
    shown = [load_shown(file) for file in files]
    images = stacked([image for image, _ in shown], [str(file) for file in files])
    rates = [rate for _, rate in shown]
    if odd := next((i for i, rate in enumerate(rates) if rate != rates[0]), None):
        raise ValueError(
            f"clips of different rates in one batch: {files[0]} has {rates[0] or 'no known number of'} frames per second, "
            f"{files[odd]} has {rates[odd] or 'no known number'}"
        )
    return images, rates[0]


def load_picture(source: Source) -> Tensor:
    """Pixels (3, H, W), fp32 in [0, 1].

    Raises ValueError when it is no picture, or one of more than MAX_PIXELS; FileNotFoundError when there is none.
    """
    if isinstance(source, Tensor):
        return source.float() / 255 if source.dtype == torch.uint8 else source.float()
    from PIL import Image

    where = str(source) if isinstance(source, Path) else "a row of the data"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked here
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}")
                pixels = np.asarray(picture.convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no picture {where}") from None
    except Exception as error:  # Pillow raises a dozen kinds on bytes that are no picture
        raise ValueError(f"{where} is no picture that can be read: {' '.join(str(error).split())[:200]}") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


# ------------------------------------------------------------------------------------------------ reading

Item = PreferencePair | RankedList


def _read(source: Path, reward: str | None, gap: float = 0.0) -> list[Item]:
    if source.is_dir():
        tables = sorted(source.glob(f"samples/step-*/{SAMPLES}")) or [t for t in (source / SAMPLES,) if t.is_file()]
        items = _compared(tables, reward, gap) if tables else _chosen_rejected(source)
    elif not source.is_file():
        raise FileNotFoundError(f"no preference data at {source}")
    elif source.name == SAMPLES:
        items = _compared([source], reward, gap)
    else:
        items = [_item(row, source.parent, where) for row, where in _rows(source)]
    if not items:
        raise ValueError(f"{source} has no pairs in it")
    return items


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a table, each with its place for error messages."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path}: reading parquet wants pyarrow (pip install flowrl-diffusion[parquet])") from None
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: {error}") from None
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path}, row {number}"
        return
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{path}: preference data is .jsonl, .parquet or a folder")
    yield from json_rows(read_text(path), path)


def _item(row: dict[str, Any], folder: Path, where: str) -> Item:
    prompt = row.get("prompt", row.get("caption"))
    if not isinstance(prompt, str):
        raise ValueError(f'{where}: wants a text "prompt" (or "caption")')
    if "images" in row:
        pictures, ranks = row["images"], row.get("ranks")
        if not isinstance(pictures, list) or not isinstance(ranks, list) or len(pictures) != len(ranks) or len(pictures) < 2:
            raise ValueError(f'{where}: wants as many "ranks" as "images", and two or more')
        values = tuple(_number(rank, f"{where}: ranks") for rank in ranks)
        return RankedList(prompt, tuple(_picture(picture, folder, where) for picture in pictures), values)
    for names in PAIR_COLUMNS:
        if all(name in row for name in names):
            break
    else:
        known = "; ".join(", ".join(names) for names in PAIR_COLUMNS)
        raise ValueError(f"{where}: has no pair of pictures (columns {known}) and no images with ranks")
    first, second = (_picture(row[name], folder, where) for name in names)
    weight = _number(row.get("num_examples_per_prompt") or 1, f"{where}: num_examples_per_prompt")
    if not weight > 0:
        raise ValueError(f"{where}: num_examples_per_prompt must be positive")
    return PreferencePair(prompt, first, second, _label(row, names, where), 1 / weight)


def _label(row: dict[str, Any], names: Sequence[str], where: str) -> float:
    if names[0] not in ("jpg_0", "image_0"):
        return 1.0
    if row.get("label_0") is None:
        raise ValueError(f"{where}: has no label_0 (1, 0, or 0.5 for a tie)")
    label = _number(row["label_0"], f"{where}: label_0")
    if not 0 <= label <= 1:
        raise ValueError(f"{where}: label_0 is {label}, and must lie in [0, 1]")
    other = row.get("label_1")
    if other is not None and abs(label + _number(other, f"{where}: label_1") - 1) > 1e-3:
        raise ValueError(f"{where}: label_0 and label_1 must sum to 1, and are {label} and {other}")
    return label


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} is {value!r}, not a number")
    return float(value)


def _picture(value: Any, folder: Path, where: str) -> Source:
    if isinstance(value, dict):  # as Hugging Face's datasets store pictures
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: a picture is a path, bytes, or base64 text, not {type(value).__name__}")
    if len(value) < 1024 and (folder / value).is_file():
        return folder / value
    try:
        data = base64.b64decode(value.partition("base64,")[2] or value, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if data[:3] == b"\xff\xd8\xff" or data[:4] in (b"\x89PNG", b"RIFF"):
        return data
    raise FileNotFoundError(f"{where}: there is no picture {folder / value[:200]}")


def _chosen_rejected(folder: Path) -> list[Item]:
    chosen = {path.stem: path for path in sorted((folder / "chosen").glob("*")) if path.is_file()}
    if not chosen:
        raise ValueError(f"{folder} is no run with samples, and has no chosen/, rejected/ and prompts/")
    items: list[Item] = []
    for name, path in chosen.items():
        rejected, prompt = sorted((folder / "rejected").glob(f"{name}.*")), folder / "prompts" / f"{name}.txt"
        if not rejected or not prompt.is_file():
            missing = prompt if rejected else folder / "rejected" / f"{name}.*"
            raise ValueError(f"{path} has no counterpart {missing}")
        items.append(PreferencePair(prompt.read_text(encoding="utf-8").strip(), path, rejected[0]))
    return items


def _compared(tables: Sequence[Path], reward: str | None, gap: float) -> list[Item]:
    """Pairs of pictures of one group, the higher reward first; groups are those of the run, or else pictures of one prompt."""
    items: list[Item] = []
    for table in tables:
        groups: dict[Any, list[tuple[dict[str, Any], float]]] = {}
        for row, where in _rows(table):
            rewards = row.get("rewards") or {}
            if reward is None and len(rewards) == 1:
                reward = next(iter(rewards))
            if reward not in rewards:
                known = ", ".join(rewards) or "none"
                raise ValueError(f"{where}: reward={reward}: say which of its rewards compares the pictures ({known})")
            if rewards[reward] is not None:  # None abstains
                groups.setdefault(row.get("group", row["prompt"]), []).append((row, float(rewards[reward])))
        for members in groups.values():
            for (a, x), (b, y) in combinations(members, 2):
                if x < y:
                    (a, x), (b, y) = (b, y), (a, x)
                label = 0.5 if x - y <= gap else 1.0
                items.append(PreferencePair(a["prompt"], table.parent / a["file"], table.parent / b["file"], label))
    return items
