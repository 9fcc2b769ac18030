"""The comparison gallery: a static folder (index.html, images/, thumbs/) that opens from disk, without a server.

Python writes the pictures and one block of JSON; `page.js` draws the page from that block, in the browser.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

MARKER = '<meta name="generator" content="flowrl gallery">'  # in page.html; tells our pages from other people's
THUMBNAIL = 512  # longer side in pixels; larger originals get a thumbnail for the grid
OURS = {"index.html", "images", "thumbs", ".DS_Store", "Thumbs.db"}  # a folder holding anything else is not replaced
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif"}  # files that browsers show: copied unchanged
PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}


@dataclass(frozen=True)
class Cell:
    """One picture: what `model` drew for `prompt` from `seed`, and what the rewards say about it."""

    model: str  #: Column. The first model seen is the base that the others are compared with.
    prompt: str  #: Row.
    seed: int  #: Pictures of one prompt and one seed stand side by side.
    image: Image.Image | Path  #: The picture, or its file. A missing file becomes a labelled placeholder.
    rewards: Mapping[str, float | None]  #: Higher is better. None or NaN: the reward abstains here.
    kind: str | None = None  #: Category of the prompt, for the filter.
    details: Mapping[str, str] = field(default_factory=dict)  #: For the detail view; "command" can be copied there.


@dataclass(frozen=True)
class Table:
    """An evaluation table, drawn at the top of the page. Every row is as long as the header."""

    title: str
    header: list[str]
    rows: list[list[str]]


def write_gallery(out: Path, cells: Iterable[Cell], *, title: str, subtitle: str = "", tables: Sequence[Table] = ()) -> Path:
    """Write the gallery folder `out` and return the path of its page, out/index.html.

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
        data |= write_cells(new, cells)
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


def write_cells(folder: Path, cells: Iterable[Cell]) -> dict[str, Any]:
    """Write every picture under `folder`; return models, rewards and prompts as the page reads them.

    prompts: [{id, prompt, kind, sets: [{seed, cells: [one per model, or null]}]}], rewards of a cell by position.
    """
    models: dict[str, int] = {}
    rewards: dict[str, int] = {}
    kinds: dict[str, str | None] = {}
    drawn: dict[str, dict[int, dict[int, dict[str, Any]]]] = {}  # prompt -> seed -> model -> cell
    for cell in cells:
        model = models.setdefault(cell.model, len(models))
        kind = kinds.setdefault(cell.prompt, cell.kind)
        if kind != cell.kind:
            raise ValueError(f"Prompt {cell.prompt!r} has two kinds: {kind!r} and {cell.kind!r}.")
        row = drawn.setdefault(cell.prompt, {}).setdefault(int(cell.seed), {})
        if model in row:
            raise ValueError(f"Two pictures by {cell.model!r} of prompt {cell.prompt!r}, seed {cell.seed}.")
        values = {rewards.setdefault(name, len(rewards)): number(value, name) for name, value in cell.rewards.items()}
        name = f"{prompt_id(cell.prompt)}-s{int(cell.seed)}-m{model}-{slug(cell.model)}"
        row[model] = write_picture(folder, name, cell.image) | {
            "rewards": values,
            "details": {str(key): str(value) for key, value in cell.details.items()},
        }
    for row in (row for seeds in drawn.values() for row in seeds.values()):
        for picture in row.values():
            picture["rewards"] = [picture["rewards"].get(index) for index in rewards.values()]
    prompts = [
        {
            "id": prompt_id(prompt),
            "prompt": prompt,
            "kind": kinds[prompt],
            "sets": [{"seed": s, "cells": [seeds[s].get(model) for model in models.values()]} for s in sorted(seeds)],
        }
        for prompt, seeds in drawn.items()
    ]
    return {"models": list(models), "rewards": list(rewards), "prompts": prompts}


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


def write_picture(folder: Path, name: str, source: Image.Image | Path) -> dict[str, Any]:
    """Write the original, and a thumbnail where it is large. Returns image, thumb, width, height; or a note instead."""
    if isinstance(source, Image.Image):
        image, original = source, png_bytes(source)
        suffix = ".png"
    else:
        try:
            original = Path(source).read_bytes()
            image = Image.open(io.BytesIO(original))
            image.load()  # a truncated file is found here, not by the reader of the page
        except FileNotFoundError:
            return {"image": None, "note": f"Missing file: {Path(source).name}"}
        except (OSError, SyntaxError):  # Pillow raises both for a damaged file
            return {"image": None, "note": f"Unreadable file: {Path(source).name}"}
        suffix = SUFFIXES.get(image.format or "", "")
        if not suffix:
            original, suffix = png_bytes(image), ".png"
    path = f"images/{name}{suffix}"
    (folder / path).write_bytes(original)
    picture: dict[str, Any] = {"image": path, "width": image.width, "height": image.height}
    if max(image.size) > THUMBNAIL:
        picture["thumb"] = write_thumbnail(folder, name, image)
    return picture


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    (image if image.mode in PNG_MODES else image.convert("RGB")).save(buffer, "PNG")
    return buffer.getvalue()


def write_thumbnail(folder: Path, name: str, image: Image.Image) -> str:
    """A JPEG whose longer side is THUMBNAIL pixels (a PNG where the picture is transparent); returns its path."""
    opaque = image.mode in {"RGB", "L"}
    small = ImageOps.exif_transpose(image).convert("RGB" if opaque else "RGBA")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    path = f"thumbs/{name}.{'jpg' if opaque else 'png'}"
    (folder / "thumbs").mkdir(exist_ok=True)
    small.save(folder / path, quality=88)
    return path


def render(data: Mapping[str, Any]) -> str:
    """The page: template, style, script and data in one file. Its policy lets nothing else run and nothing load."""
    template, css, js = (asset(f"page.{suffix}") for suffix in ("html", "css", "js"))
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src 'self' file: data:",
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
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


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
