"""The labelled sheet: prompts down, models and seeds across, rewards below, as one PNG for a paper, or of clips as a film."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flowrl.clips import FORMS, RATE, UNPLAYABLE
from flowrl.gallery.originals import frames_of
from flowrl.gallery.page import Cell
from flowrl.pictures import Cell as Place
from flowrl.pictures import reduced, sheet_files


def write_sheet(
    file: Path, cells: Sequence[Cell], *, by_seed: bool = False, rewards: bool = True, note: str = ""
) -> tuple[list[Path], list[str]]:
    """Write `file`, or FILE-1.png, FILE-2.png, ... where one sheet would be too tall; returns them, and what could not be read.

    In a .png a clip is a strip of up to four frames; in a .webp or .mp4 all clips move, in step, at the pace of the first.

    by_seed: the models of one seed stand beside each other, instead of the seeds of one model. rewards: below every picture.
    """
    places = {(cell.prompt, cell.model, cell.seed): cell for cell in cells}
    prompts = list(dict.fromkeys(cell.prompt for cell in cells))
    models = list(dict.fromkeys(cell.model for cell in cells))
    seeds = sorted({cell.seed for cell in cells})
    drawn = {(cell.model, cell.seed) for cell in cells}
    columns = [(m, s) for s in seeds for m in models] if by_seed else [(m, s) for m in models for s in seeds]
    columns = [column for column in columns if column in drawn]
    names = [(f"seed {seed}", model) if by_seed else (model, f"seed {seed}") for model, seed in columns]
    problems: dict[str, None] = {}

    def place(row: int, column: int) -> Place:
        cell = places.get((prompts[row], *columns[column]))
        picture = None if cell is None else _picture(cell, problems)
        if cell is None or picture is None:
            return Place(None)
        return Place(reduced(picture), _caption(cell) if rewards else "")

    height = next((_height(picture) for cell in cells if (picture := _picture(cell, problems)) is not None), 128)
    moves = file.suffix.lower() in FORMS.values()
    fps = next((pace for cell in cells if (pace := _pace(cell)) is not None), RATE) if moves else RATE
    written = []
    for path, content in sheet_files(file, prompts, names, place, height, note, fps):
        path.write_bytes(content)
        written.append(path)
    return written, list(problems)


def _picture(cell: Cell, problems: dict[str, None]) -> Any:
    """The picture or the frames of a clip; None, and the problem, where there is nothing to draw."""
    path = cell.image
    if not isinstance(path, Path):
        return path
    try:
        if frames := frames_of(path)[0]:
            return frames
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        problems[f"Missing file: {path.name}"] = None
    except ValueError as error:  # says which file, and what is missing to read it
        problems[f"Unreadable file: {path.name}" + (" (it wants PyAV)" if "PyAV" in str(error) else "")] = None
    except (OSError, SyntaxError, Image.DecompressionBombError):
        problems[f"Unreadable file: {path.name}"] = None
    return None


def _pace(cell: Cell) -> float | None:
    """Frames per second of a clip; None of a picture, and of what cannot be read."""
    if not isinstance(cell.image, Path):
        return None if isinstance(cell.image, Image.Image) else cell.fps
    try:
        frames, fps = frames_of(cell.image)
    except UNPLAYABLE:
        return None
    return fps if frames else None


def _caption(cell: Cell) -> str:
    values = {label.rpartition(".")[2]: value for label, value in cell.rewards.items()}
    return "  ".join(f"{label} {'-' if value is None or value != value else f'{value:.3g}'}" for label, value in values.items())


def _height(picture: Any) -> int:
    return (picture if isinstance(picture, Image.Image) else picture[0]).height
