"""Pictures as files: names that mean something, the settings inside the file, and the labelled contact sheet.

stem = file_stem("a red circle", seed=3)                          # "a-red-circle-a1e4a280d2-s3", on every machine
picture_bytes(image, {"parameters": text, "flowrl": json})        # PNG with text chunks (clips: `flowrl.clips`)
read_facts("samples/tiny-sd3/a-red-circle-a1e4a280d2-s3.png")     # what drew it
contact_sheet(["a red circle"], [("tiny-sd3", "seed 3")], [[Cell(image)]]).save("grid.png")
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from flowrl.clips import FACTS, FORMS, RATE, VIDEOS, clip_bytes, is_clip, read_clip, texts_of, video_library

# ------------------------------------------------------------------------------------------------ names


def slug(text: str, limit: int = 48) -> str:
    """`text` in characters that every file system, shell and URL takes as they are; may be empty."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9.]+", "-", plain).strip("-.")[:limit].rstrip("-.")


def file_stem(prompt: str, seed: int, repeat: int = 0) -> str:
    """The name of a picture without its suffix: readable words, a digest of the whole prompt, the seed.

    It depends on these alone, not on a place in a file. repeat counts equal prompts that differ in their columns.
    """
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    again = f"-{repeat + 1}" if repeat else ""
    return "-".join(part for part in (slug(prompt).replace(".", "-"), digest) if part) + f"{again}-s{seed}"


# ------------------------------------------------------------------------------------------------ files


def picture_bytes(picture: Image.Image, texts: dict[str, str]) -> bytes:
    """A PNG file with text chunks."""
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)  # Latin-1 as tEXt, anything else as iTXt
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_facts(path: str | Path) -> dict[str, Any]:
    """What drew a picture or clip, from inside it. Raises FileNotFoundError, or ValueError where there is nothing to read."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no picture at {path}")
    if Path(path).suffix.lower() in VIDEOS:
        video_library(f"{path}: reading videos")
    try:
        facts = json.loads(texts_of(path)[FACTS])
        facts["request"]["prompt"]
        return facts
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not a picture of `flowrl sample`, or its text was stripped (no {FACTS} chunk)") from None


def read_frames(path: str | Path) -> Image.Image | list[Image.Image]:
    """A picture, or the frames of a clip."""
    if is_clip(path):
        return [Image.fromarray(frame) for frame in read_clip(path)[0]]
    with Image.open(path) as image:
        return image.convert("RGB")


# ------------------------------------------------------------------------------------------------ contact sheet


@dataclass(frozen=True)
class Cell:
    """One place of a sheet: a picture (or a clip's frames) and a line below it. No picture: an empty place."""

    picture: Image.Image | Sequence[Image.Image] | None
    caption: str = ""


INK, SOFT, RULE, EMPTY, PAPER = "#1b1b1b", "#6a6a6a", "#d8d8d8", "#f2f2f2", "#ffffff"
GAP, MARGIN, LABEL = 6, 16, 200
MAX_HEIGHT = 12_000  #: Pixels; longer sheets are cut into pages, between rows.
FILM_QUALITY = 85  #: Of a sheet in which clips move.


def contact_sheet(
    rows: Sequence[str], columns: Sequence[tuple[str, str]], cells: Sequence[Sequence[Cell]], note: str = ""
) -> Any:
    """A labelled grid. rows: prompts, wrapped at the left. columns: (group, name); neighbours of one group share its heading.

    cells[r][c] fit their place without being cut. note: a line at the foot.
    """
    width, height = _cell_size(cells)
    captions = any(cell.caption for row in cells for cell in row)
    line = _line_height(13)
    below = max((len(_wrap(cell.caption, 12, width)) for row in cells for cell in row), default=0) * _line_height(12) * captions
    groups = [(name, len(list(members))) for name, members in groupby(group for group, _ in columns)]
    pitch = width + GAP
    total = MARGIN + LABEL + pitch * len(columns) + MARGIN
    headings = [_wrap(name, 14, span * pitch - GAP, 4) for name, span in groups]
    heading = max(len(lines) for lines in headings) * _line_height(14)
    names = [_wrap(name, 12, width, 2) for _, name in columns]
    naming = max(len(lines) for lines in names) * _line_height(12)
    top = MARGIN + heading + naming + GAP
    labels = [_wrap(text, 13, LABEL - 2 * GAP, max(3, (height + below) // line)) for text in rows]
    tall = [max(height + below, len(lines) * line) + 2 * GAP for lines in labels]
    foot = _wrap(note, 11, total - 2 * MARGIN, 3)
    sheet = Image.new("RGB", (total, top + sum(tall) + len(foot) * _line_height(11) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)

    x = MARGIN + LABEL
    for lines, (_, span) in zip(headings, groups, strict=True):
        _write(draw, (x, MARGIN), lines, 14, INK)
        x += span * pitch
    for c, lines in enumerate(names):
        _write(draw, (MARGIN + LABEL + c * pitch, MARGIN + heading), lines, 12, SOFT)
    y = top
    for lines, row, step in zip(labels, cells, tall, strict=True):
        draw.line([(MARGIN, y - GAP // 2), (total - MARGIN, y - GAP // 2)], fill=RULE)
        _write(draw, (MARGIN, y + GAP // 2), lines, 13, INK)
        for c, cell in enumerate(row):
            left = MARGIN + LABEL + c * pitch
            if cell.picture is None:
                draw.rectangle([left, y + GAP // 2, left + width - 1, y + GAP // 2 + height - 1], fill=EMPTY)
                continue
            small = _fitted(_still(cell.picture), width, height)
            sheet.paste(small, (left + (width - small.width) // 2, y + GAP // 2 + (height - small.height) // 2))
            _write(draw, (left, y + GAP // 2 + height + 1), _wrap(cell.caption, 12, width), 12, SOFT)
        y += step
    starts = 0
    for (_, span), _lines in zip(groups[:-1], headings, strict=False):  # a rule between groups
        starts += span
        x = MARGIN + LABEL + starts * pitch - GAP // 2 - 1
        draw.line([(x, MARGIN), (x, y - GAP)], fill=RULE)
    _write(draw, (MARGIN, y), foot, 11, SOFT)
    return sheet


def reduced(picture: Image.Image | Sequence[Image.Image]) -> Any:
    """What a sheet needs of a picture: at most 320 pixels on its shorter side."""
    if not isinstance(picture, Image.Image):
        return [reduced(frame) for frame in picture]
    scale = 320 / min(picture.size)
    return picture if scale >= 1 else _fitted(picture, round(picture.width * scale), round(picture.height * scale))


def sheet_files(
    file: Path,
    rows: Sequence[str],
    columns: Sequence[tuple[str, str]],
    place: Callable[[int, int], Cell],
    height: int,
    note: str = "",
    fps: float = RATE,
) -> Iterator[tuple[Path, bytes]]:
    """A sheet as PNG files: `file`, or FILE-1.png, FILE-2.png, ... where one would be too tall. Those of an earlier sheet go.

    A .webp or .mp4 is a film, in which clips move in step, `fps` frames a second; shorter ones stay at their last.
    place: the cell at (row, column), asked for page by page. height: of a picture, in pixels. The rest as for `contact_sheet`.
    """
    form = next((form for form, suffix in FORMS.items() if suffix == file.suffix.lower()), None)
    stem = f"{file.stem}-"
    for old in [file, *file.parent.glob(f"*{file.suffix}")]:
        if old == file or (old.stem.startswith(stem) and old.stem.removeprefix(stem).isdecimal()):
            old.unlink(missing_ok=True)
    pages = sheet_pages(len(rows), height)
    for number, page in enumerate(pages, 1):
        numbers = range(len(rows))[page]
        cells = [[place(r, c) for c in range(len(columns))] for r in numbers]
        length = max([1, *(len(_frames(cell)) for row in cells for cell in row)])
        moments = [[[_at(cell, i) for cell in row] for row in cells] for i in range(length)] if form else [cells]
        sheets = [contact_sheet([rows[r] for r in numbers], columns, moment, note) for moment in moments]
        content = clip_bytes(sheets, fps, form, quality=FILM_QUALITY) if form else picture_bytes(sheets[0], {})
        yield file if len(pages) == 1 else file.with_name(f"{stem}{number}{file.suffix}"), content


def sheet_pages(rows: int, height: int) -> list[slice]:
    """Which rows go on which page, so that no page is taller than a viewer takes. height: of a picture, in pixels."""
    per_page = max(1, MAX_HEIGHT // (min(max(height, 128), 320) + 50))
    return [slice(start, start + per_page) for start in range(0, rows, per_page)]


def _frames(cell: Cell) -> Sequence[Image.Image]:
    """The frames of a place, of a still picture one, of an empty place none."""
    return [] if cell.picture is None else [cell.picture] if isinstance(cell.picture, Image.Image) else cell.picture


def _at(cell: Cell, i: int) -> Cell:
    """A place at a moment of a film."""
    frames = _frames(cell)
    return replace(cell, picture=frames[min(i, len(frames) - 1)]) if frames else cell


def _cell_size(cells: Sequence[Sequence[Cell]]) -> tuple[int, int]:
    """The place of a picture: the largest one, brought to between 128 and 320 pixels."""
    sizes = [_still(cell.picture).size for row in cells for cell in row if cell.picture is not None]
    width, height = max((w for w, _ in sizes), default=128), max((h for _, h in sizes), default=128)
    scale = min(320 / min(width, height), max(1.0, 128 / min(width, height)))
    return round(width * scale), round(height * scale)


def _still(picture: Image.Image | Sequence[Image.Image]) -> Image.Image:
    """A clip as a strip of up to four of its frames, first and last among them."""
    if isinstance(picture, Image.Image):
        return picture
    count = min(4, len(picture))
    frames = [picture[round(i * (len(picture) - 1) / max(1, count - 1))] for i in range(count)]
    strip = Image.new("RGB", (sum(frame.width for frame in frames), frames[0].height))
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * frame.width, 0))
    return strip


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image if size == image.size else image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], size: int, fill: str) -> None:
    for i, text in enumerate(lines):
        draw.text((at[0], at[1] + i * _line_height(size)), text, font=_font_for(text, size), fill=fill)


def _line_height(size: int) -> int:
    return round(size * 1.3)


def _wrap(text: str, size: int, width: int, most: int = 8) -> list[str]:
    """Lines that fit `width` pixels: broken between words, inside a word that is too long, and cut with an ellipsis."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if not text:
        return []
    text = text[: most * width]  # no character is narrower than a pixel
    font = _font_for(text, size)
    lines: list[str] = []
    current = ""
    for word in text.split(" "):
        while word:
            joined = f"{current} {word}" if current else word
            if font.getlength(joined) <= width:
                current, word = joined, ""
            elif current:
                lines, current = [*lines, current], ""
            else:
                fits = max(1, bisect_right(range(1, len(word) + 1), width, key=lambda n: font.getlength(word[:n])))
                lines, word = [*lines, word[:fits]], word[fits:]
        if len(lines) > most:
            break
    lines = [*lines, current] if current else lines
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "\u2026") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + "\u2026"]
    return lines


#: Tried in this order: fonts that many systems have, by the scripts they cover. What none covers is drawn as boxes.
FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf", "NotoSansCJK-Regular.ttc", "msyh.ttc",
    "PingFang.ttc", "Hiragino Sans GB.ttc", "YuGothM.ttc", "malgun.ttf", "Nirmala.ttf", "NotoSansArabic-Regular.ttf",
)  # fmt: skip


def _font_for(text: str, size: int) -> Any:
    """The first font that has every character of the text, or else the one that lacks the fewest."""
    found = _fonts(size)
    return min(found, key=lambda font: sum(_lacks(font, c) for c in set(text) if not c.isspace()))


@lru_cache(maxsize=16)
def _fonts(size: int) -> list[Any]:
    fonts = []
    for name in FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return [*fonts, ImageFont.load_default(size)]  # Pillow's own: ASCII only


@lru_cache(maxsize=65536)
def _lacks(font: Any, character: str) -> bool:
    mask, missing = font.getmask(character), font.getmask("\uffff")
    return mask.size == missing.size and bytes(mask) == bytes(missing)
