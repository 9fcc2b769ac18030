"""Prompts: from text files, JSON lines and the embedded sets; the order in which training sees them."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowrl.batch import Prompt

#: Prompt sets that come with the library, by name.
EMBEDDED = ("tiny-train", "tiny-test", "tiny-video-train", "tiny-video-test")


def load_prompts(source: str | Path | Sequence[str | Prompt]) -> list[Prompt]:
    """Prompts from a .txt file (one per line), a .jsonl file (`prompt` plus free columns), an embedded name, or a list.

    Raises FileNotFoundError, or ValueError that names the file and the line.
    """
    if not isinstance(source, str | Path):
        prompts = [item if isinstance(item, Prompt) else Prompt(item) for item in source]
        if not prompts:
            raise ValueError("the list of prompts is empty")
        return prompts
    embedded = str(source) in EMBEDDED
    path = Path(str(files("flowrl.assets")), "prompts", f"{source}.jsonl") if embedded else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file at {path} (embedded sets: {', '.join(EMBEDDED)})")
    lines = read_text(path).split("\n")  # splitlines() would cut at U+2028, which JSON allows inside text
    read = _from_json if path.suffix in (".jsonl", ".json") else lambda line, place: Prompt(line.strip(), place=place)
    prompts = [read(line, (path, number)) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompts in it")
    return prompts


def _from_json(line: str, place: tuple[Path, int]) -> Prompt:
    where = f"{place[0]}, line {place[1]}"
    row = parsed(line, where)
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{where}: wants an object with a string "prompt", like {{"prompt": "a red circle"}}')
    return Prompt(row.pop("prompt"), row, place)


def read_text(path: Path) -> str:
    """What a file says, without a byte order mark. Raises ValueError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def parsed(line: str, where: str) -> Any:
    """A line of JSON. Raises ValueError that says where it is."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None


def json_rows(text: str, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of JSON lines, each with its place for errors. Raises ValueError for what is none."""
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut at U+2028, which JSON allows inside text
        if line.strip():
            where = f"{path}, line {number}"
            row = parsed(line, where)
            if not isinstance(row, dict):
                raise ValueError(f"{where}: wants an object")
            yield row, where


def prompt_order(num_prompts: int, count: int, step: int, seed: int) -> list[int]:
    """Which prompts step `step` (0, 1, ...) takes, `count` of them: every epoch a fresh permutation, nothing to remember.

    A prompt appears at most once per step as long as count <= num_prompts.
    """
    if count > num_prompts:
        raise ValueError(f"prompts_per_step={count} exceeds the {num_prompts} prompts of the file")
    per_epoch = num_prompts // count  # steps per epoch; the rest of a permutation waits for the next one
    epoch, position = divmod(step, per_epoch)
    permutation = np.random.default_rng([seed, epoch]).permutation(num_prompts)
    return [int(i) for i in permutation[position * count : (position + 1) * count]]


def even_order(kinds: Sequence[Hashable], count: int, step: int, seed: int) -> list[int]:
    """The same with as many prompts of every kind in each step, or one more of some, in turn. kinds: one value per prompt.

    Each kind has epochs of its own, so that prompts of a rare kind come oftener than others.
    """
    places: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        places.setdefault(kind, []).append(i)
    each, more = divmod(count, len(places))
    order = []
    for k, (kind, rows) in enumerate(places.items()):
        most = each + (more > 0)
        if most > len(rows):
            raise ValueError(f"prompts_per_step={count} wants {most} prompts of kind {kind!r} in a step; there are {len(rows)}")
        mine = each + ((k - step * more) % len(places) < more)
        order += [rows[i] for i in prompt_order(len(rows), most, step, sample_seed(seed, k))[:mine]] if most else []
    return order


def sample_seed(*numbers: int) -> int:
    """A seed below 2^62 from (run seed, step, prompt, generation, ...): the same on every machine, unrelated neighbours."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0] >> np.uint64(2))


def generators(seeds: Sequence[int], offset: int = 0) -> list[torch.Generator]:
    """One CPU generator per sample: the same picture on every device and in every batch. offset separates uses of one seed."""
    return [torch.Generator().manual_seed((int(seed) * 2 + offset) % (1 << 63)) for seed in seeds]
