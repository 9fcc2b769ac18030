"""The comparison gallery: a static folder (index.html, images/, thumbs/) that opens from disk, without a server.

Python writes the pictures and one block of JSON; the scripts beside this module draw the page from that block, in the browser.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from flowrl.clips import RATE
from flowrl.gallery.originals import Source, write_picture

MARKER = '<meta name="generator" content="flowrl gallery">'  # in page.html; tells our pages from other people's
OURS = {"index.html", "images", "thumbs", ".DS_Store", "Thumbs.db"}  # a folder holding anything else is not replaced
SCRIPTS = ("base", "numbers", "state", "media", "grid", "pair", "summary", "detail", "film", "vote", "controls", "start")
STYLES = ("page", "grid", "detail", "views", "phone")
MOST_EXACT = 1 << 53  # whole numbers above it are no longer exact in a browser


@dataclass(frozen=True)
class Cell:
    """One picture: what `model` drew for `prompt` from `seed`, and what the rewards say about it."""

    model: str  #: Column. The first model seen is the base that the others are compared with.
    prompt: str  #: Row.
    seed: int  #: Pictures of one prompt and one seed stand side by side.
    image: Source  #: The picture, the frames of a clip, or its file. A missing file becomes a labelled placeholder.
    rewards: Mapping[str, float | None]  #: Higher is better. None or NaN: the reward abstains here.
    kind: str | None = None  #: Category of the prompt, for the filter.
    details: Mapping[str, str] = field(default_factory=dict)  #: For the detail view; "command" can be copied there.
    fps: float = RATE  #: Frames per second of a clip whose frames are given.


@dataclass(frozen=True)
class Frame:
    """What a run drew at one step of its training: some of the pictures, and the mean rewards of all."""

    step: int
    cells: Sequence[Cell]
    means: Mapping[str, float | None]


@dataclass(frozen=True)
class Film:
    """The pictures of a run over its training, step by step."""

    name: str
    frames: Iterable[Frame]
    note: str = ""  #: What was left out, and how the pictures were drawn.


@dataclass(frozen=True)
class Table:
    """An evaluation table, drawn at the top of the page. Every row is as long as the header."""

    title: str
    header: list[str]
    rows: list[list[str]]


def write_gallery(
    out: Path,
    cells: Iterable[Cell],
    *,
    title: str,
    subtitle: str = "",
    tables: Sequence[Table] = (),
    films: Sequence[Film] = (),
    checkpoints: Mapping[str, tuple[str, int]] | None = None,
    trained: Collection[str] = (),
    problems: Sequence[str] = (),
) -> Path:
    """Write the gallery folder `out` and return the path of its page, out/index.html.

    checkpoints: models that are states of one training, {model: (run, step)}; the page shows them as a film. trained: rewards
    that a model was trained on; where there are any, the others are marked as held out. problems: what could not be read.

    Models and prompts keep the order in which they first appear; seeds are sorted. `cells` is consumed once, so a
    generator may draw pictures as it goes. The folder is written aside and then renamed: a failure leaves what was
    there before. An earlier gallery at `out` is replaced; anything else there raises FileExistsError.
    """
    out = Path(out).resolve()
    check_replaceable(out)
    data: dict[str, Any] = {"title": title, "subtitle": subtitle, "tables": [table_data(table) for table in tables]}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as aside:
        new = Path(aside, "new")
        (new / "images").mkdir(parents=True)
        data |= write_cells(new, cells, checkpoints or {}, set(trained))
        data["films"] = [write_film(new, f"film{i}", film) for i, film in enumerate(films)]
        data["problems"] = [*problems, *notes_of(data)]
        page = render(data).encode("utf-8", "xmlcharrefreplace")
        (new / "index.html").write_bytes(page)
        check_replaceable(out)  # again: drawing the cells may have taken hours
        swap(new, out, Path(aside, "old"))
    return out / "index.html"


def check_replaceable(out: Path) -> None:
    """Raise FileExistsError unless `out` is absent, an empty folder, or a gallery and nothing but a gallery."""
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file: name a folder for the gallery.")
    names = {entry.name for entry in out.iterdir()}
    if not names:
        return
    index = out / "index.html"
    if not index.is_file() or MARKER.encode() not in index.read_bytes()[:2000]:
        raise FileExistsError(f"{out} is not empty and is not a gallery: name another folder, or empty this one.")
    foreign = sorted(names - OURS)
    if foreign:
        raise FileExistsError(f"{out} is a gallery that also holds {foreign[0]!r}, which replacing it would delete.")


def swap(new: Path, out: Path, old: Path) -> None:
    """Put the folder `new` at `out`; what was there goes to `old`, and comes back when the second rename fails."""
    if not out.exists():
        os.rename(new, out)
        return
    os.rename(out, old)
    try:
        os.rename(new, out)
    except OSError:
        os.rename(old, out)
        raise


def table_data(table: Table) -> dict[str, Any]:
    """The table as the page reads it."""
    for row in table.rows:
        if len(row) != len(table.header):
            raise ValueError(f"Table {table.title!r}: {len(table.header)} columns, but a row of {len(row)}: {row}")
    return {"title": table.title, "header": table.header, "rows": table.rows}


def write_cells(
    folder: Path, cells: Iterable[Cell], checkpoints: Mapping[str, tuple[str, int]], trained: Collection[str]
) -> dict[str, Any]:
    """Write every picture under `folder`; return models, rewards and prompts as the page reads them, and a digest of it all.

    prompts: [{id, prompt, kind, sets: [{seed, cells: [one per model, or null]}]}], rewards of a cell by position.
    """
    models: dict[str, int] = {}
    rewards: dict[str, int] = {}
    kinds: dict[str, str | None] = {}
    drawn: dict[str, dict[int, dict[int, dict[str, Any]]]] = {}  # prompt -> seed -> model -> cell
    digest = hashlib.sha256()
    for cell in cells:
        model = models.setdefault(cell.model, len(models))
        kind = kinds.setdefault(cell.prompt, cell.kind)
        if kind != cell.kind:
            raise ValueError(f"Prompt {cell.prompt!r} has two kinds: {kind!r} and {cell.kind!r}.")
        row = drawn.setdefault(cell.prompt, {}).setdefault(int(cell.seed), {})
        if model in row:
            raise ValueError(f"Two pictures by {cell.model!r} of prompt {cell.prompt!r}, seed {cell.seed}.")
        name = f"{prompt_id(cell.prompt)}-s{int(cell.seed)}-m{model}-{slug(cell.model)}"
        row[model], content = write_cell(folder, name, cell, rewards)
        digest.update(f"{name} {content}\n".encode("utf-8", "surrogatepass"))
    for row in (row for seeds in drawn.values() for row in seeds.values()):
        for picture in row.values():
            picture["rewards"] = [picture["rewards"].get(index) for index in rewards.values()]
    prompts = [
        {
            "id": prompt_id(prompt),
            "prompt": prompt,
            "kind": kinds[prompt],
            "sets": [{"seed": exact(s), "cells": [seeds[s].get(model) for model in models.values()]} for s in sorted(seeds)],
        }
        for prompt, seeds in drawn.items()
    ]
    runs = {name: {"run": run, "step": step} for name, (run, step) in checkpoints.items()}
    return {
        "id": digest.hexdigest()[:16],
        "models": [{"name": name} | runs.get(name, {}) for name in models],
        "rewards": [{"name": name, "heldOut": bool(trained) and name not in trained} for name in rewards],
        "prompts": prompts,
    }


def write_cell(folder: Path, name: str, cell: Cell, rewards: dict[str, int]) -> tuple[dict[str, Any], str]:
    """Write the picture; return the cell as the page reads it, but for its rewards {index: value}, and the picture's digest."""
    values = {rewards.setdefault(label, len(rewards)): number(value, label) for label, value in cell.rewards.items()}
    picture, content = write_picture(folder, name, cell.image, cell.fps)
    return picture | {"rewards": values, "details": {str(key): str(value) for key, value in cell.details.items()}}, content


def write_film(folder: Path, name: str, film: Film) -> dict[str, Any]:
    """Write the pictures of a film: {name, note, rewards, frames: [{step, means, cells}]}, numbers by position in rewards."""
    rewards: dict[str, int] = {}
    frames: list[dict[str, Any]] = []
    for frame in film.frames:
        for label in frame.means:
            rewards.setdefault(label, len(rewards))
        cells = []
        for i, cell in enumerate(frame.cells):
            picture, _ = write_cell(folder, f"{name}-{frame.step:06d}-{i:03d}", cell, rewards)
            cells.append(picture | {"prompt": cell.prompt, "seed": exact(cell.seed)})
        frames.append(
            {"step": frame.step, "means": {label: number(mean, label) for label, mean in frame.means.items()}, "cells": cells}
        )
    for written in frames:
        written["means"] = [written["means"].get(label) for label in rewards]
        for picture in written["cells"]:
            picture["rewards"] = [picture["rewards"].get(index) for index in rewards.values()]
    return {"name": film.name, "note": film.note, "rewards": list(rewards), "frames": frames}


def notes_of(data: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with single pictures, each with its place."""
    names = [model["name"] for model in data["models"]]
    for prompt in data["prompts"]:
        for place in prompt["sets"]:
            for name, cell in zip(names, place["cells"], strict=True):
                if cell and not cell["image"]:
                    yield f"{cell['note']} ({name}, seed {place['seed']}: {prompt['prompt']})"
    for film in data["films"]:
        for frame in film["frames"]:
            yield from (f"{cell['note']} ({film['name']}, step {frame['step']})" for cell in frame["cells"] if not cell["image"])


def exact(seed: int) -> int | str:
    """A seed as a browser can hold it: digits where it would be rounded."""
    return int(seed) if abs(seed) < MOST_EXACT else str(int(seed))


def number(value: float | None, reward: str) -> float | None:
    """The reward as JSON can hold it: a finite number, or None where it abstains."""
    if value is None or math.isnan(value):
        return None
    if math.isinf(value):
        raise ValueError(f"Reward {reward!r} is infinite; a reward is a finite number, or None where it abstains.")
    return float(value)


def prompt_id(prompt: str) -> str:
    """A short name that depends on the prompt alone: links and file names survive a gallery's next edition."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def slug(name: str) -> str:
    """`name` in characters that every file system and URL accepts."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "model"


def render(data: Mapping[str, Any]) -> str:
    """The page: template, style, script and data in one file. Its policy lets nothing else run and nothing load."""
    css = "\n".join(asset(f"{name}.css") for name in STYLES)
    js = "\n".join(['"use strict";', *(asset(f"{name}.js") for name in SCRIPTS)])
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src 'self' file: data:",
            "media-src 'self' file:",
            f"style-src '{source_hash(css)}'",
            f"script-src '{source_hash(js)}'",
        ]
    )
    parts = {
        "title": html.escape(data["title"]),
        "policy": html.escape(policy, quote=False),
        "css": css,
        "js": js,
        "data": embedded_json(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], asset("page.html"))


def asset(name: str) -> str:
    """A file that is installed beside this module."""
    return resources.files("flowrl.gallery").joinpath(name).read_text("utf-8")


def source_hash(source: str) -> str:
    """The name by which a Content-Security-Policy admits one inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def embedded_json(data: Mapping[str, Any]) -> str:
    """JSON that cannot leave its script element: ASCII only, and no character that HTML gives a meaning to."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
