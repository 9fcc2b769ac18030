"""What the layouts share: exporting with resume, the manifest beside an export, and result rows made into an evaluation."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from flowrl.batch import Prompt
from flowrl.evaluate import Evaluation
from flowrl.pictures import read_frames, slug
from flowrl.protocol import Protocol, differences, digest_of
from flowrl.record import move, unfinished, writing
from flowrl.scorefile import read_results, write_results


@dataclass
class Row:
    """What a benchmark says of one picture: the index-th, from 0, of the prompt `key`. NaN in scores abstains.

    where: file and row, for faults. prompt: as far as the file tells it. picture: its path, as the file has it.
    """

    where: str
    key: str
    index: int
    scores: dict[str, float]
    prompt: Prompt
    picture: str = ""


@dataclass
class Results:
    """Of one or several files. summary: what the benchmark sums up. model: as the files name it."""

    rows: list[Row]
    summary: dict[str, float] = field(default_factory=dict)
    model: str | None = None


class Layout:
    """How one benchmark names files. Subclasses say the paper, the repository, and what was seen in its code."""

    name: ClassVar[str]
    count: ClassVar[int]  #: Pictures per prompt of its published numbers.
    whole: ClassVar[bool] = True  #: Its results have a row for every picture.

    def prompts(self, path: Path) -> list[Prompt]:
        """Its prompt file, or folder. Raises ValueError with file and row."""
        raise NotImplementedError

    def keys(self, prompts: Sequence[Prompt]) -> list[str]:
        """What its files and results call each prompt. Raises ValueError where the prompts lack what it wants to know."""
        raise NotImplementedError

    def root(self, out: Path, model: str, prompts: Sequence[Prompt]) -> Path:
        """The folder of one model's pictures. It need not exist."""
        return out

    def places(self, root: Path, prompts: Sequence[Prompt], seeds: int) -> list[list[Path]]:
        """The file of each picture, (P, S). Raises ValueError for prompts that cannot be file names."""
        raise NotImplementedError

    def write(self, prompt: Prompt, sources: Sequence[Path], places: Sequence[Path]) -> None:
        """The files of one prompt: by default each picture as it is."""
        for source, place in zip(sources, places, strict=True):
            put(source, place)

    def read(self, place: Path, index: int, seeds: int) -> Any:
        """One picture, or a clip's frames, back from the file that `places` names."""
        return read_frames(place)

    def files(self, path: Path) -> list[Path]:
        """Result files: the path itself, or those in a folder where a benchmark writes several."""
        return [] if path.is_dir() else [path]

    def results(self, path: Path, seeds: int | None) -> Results:
        """Its result file, or a folder of them. seeds: pictures per prompt, where the manifest says. Raises ValueError."""
        raise NotImplementedError

    def command(self, root: Path, evaluation: Evaluation) -> str:
        """What is run in the benchmark's own repository to score an export."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------ export


@contextmanager
def placing(place: Path) -> Iterator[Path]:
    """A file to write that then goes into its place, whole or not at all; what is unfinished lies outside the folder."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with writing(place), unfinished(place.parent.parent) as temporary:
        yield temporary / place.name
        move(temporary / place.name, place)


def put(source: Path, place: Path) -> None:
    """A file in its place: linked where the disk can, copied otherwise."""
    with placing(place) as file:
        try:
            os.link(source, file)
        except OSError:
            shutil.copyfile(source, file)


def manifest_of(root: Path) -> Path:
    """Beside the folder, since scorers take what is in it for pictures."""
    return root.with_name(f"{root.name}.flowrl.json")


def export_root(
    layout: Layout, out: Path, model: str, prompts: Sequence[Prompt], protocol: Protocol, weights: str | None
) -> Path:
    """The folder that an export of a model goes into. Raises ValueError where the prompts do not suit the layout, or where other
    pictures are there: what can be told before anything is drawn."""
    layout.keys(prompts)
    root = layout.root(out, slug(model, 80) or "model", prompts)
    layout.places(root, prompts, protocol.seeds)
    manifest = manifest_of(root)
    if manifest.is_file():
        there = read_results(manifest)[0]
        found = differences(there.protocol, replace(protocol, digest=digest_of(prompts)))
        if there.weights and weights and there.weights != weights:
            found.append(f"weights: {there.model} ({there.weights}) against {model} ({weights})")
        if found:
            raise ValueError(f"{root} holds pictures of another export ({'; '.join(found)}): choose another folder")
    elif root.is_dir() and any(root.iterdir()):
        raise ValueError(f"{root} holds other files already (no {manifest.name} beside it): choose another folder")
    return root


def export(
    layout: Layout, evaluation: Evaluation, sources: Sequence[Sequence[Path]], out: Path, progress: bool = False
) -> tuple[Path, int]:
    """Pictures into the layout, and the evaluation beside them. sources: (P, S) files. Returns the folder and how many prompts
    are new: what an interrupted export left is kept. Raises as `export_root`.
    """
    from tqdm.auto import tqdm

    prompts, protocol = evaluation.prompts, evaluation.protocol
    root = export_root(layout, out, evaluation.model, prompts, protocol, evaluation.weights)
    places = layout.places(root, prompts, protocol.seeds)
    root.mkdir(parents=True, exist_ok=True)
    write_results(manifest_of(root), [replace(evaluation, features=None)], layout=layout.name)
    todo = [i for i, files in enumerate(places) if not all(file.is_file() for file in files)]
    for i in tqdm(todo, desc=f"exporting to {root}", unit="prompt", disable=not progress, leave=False):
        layout.write(prompts[i], sources[i], places[i])
    return root, len(todo)


def find_pictures(
    layout: Layout, root: Path, prompts: Sequence[Prompt] | None, seeds: int | None
) -> tuple[Evaluation, list[tuple[Path, int]]]:
    """What a folder in the layout holds: an evaluation without scores, and (P * S) files, each with the picture's index in it.

    prompts, seeds: where there is no manifest beside the folder. Raises ValueError that names the first missing picture.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}")
    manifest = manifest_of(root)
    if manifest.is_file():
        known = read_results(manifest)[0]
    elif prompts is None:
        raise ValueError(f"there is no {manifest} to say of which prompts these are: give them with --prompts {layout.name}:PATH")
    else:
        protocol = Protocol(f"{layout.name} prompts", None, seeds=seeds or layout.count, digest=digest_of(prompts))
        order = [list(range(protocol.seeds))] * len(prompts)
        known = Evaluation(root.name, protocol, list(prompts), order, [], torch.zeros(len(prompts), protocol.seeds, 0))
    layout.keys(known.prompts)
    places = [(f, j) for files in layout.places(root, known.prompts, known.protocol.seeds) for j, f in enumerate(files)]
    files = list(dict.fromkeys(place for place, _ in places))
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"{root} lacks {len(missing)} of {len(files)} files: {missing[0]} is the first")
    return known, places


# ------------------------------------------------------------------------------------------------ results


def read_scores(layout: Layout, path: Path) -> Evaluation:
    """A result file of the benchmark as an evaluation: with the manifest of our export, or else with what the file tells.

    Raises FileNotFoundError, or ValueError that names the file and the row.
    """
    if not path.exists():
        raise FileNotFoundError(f"no results of {layout.name} at {path}")
    manifest = find_manifest(path, [])
    results = layout.results(path, read_results(manifest)[0].protocol.seeds if manifest else None)
    if not results.rows:
        raise ValueError(f"{path} holds no results of {layout.name}")
    if manifest is None and (manifest := find_manifest(path, [row.picture for row in results.rows[:1]])):
        results = layout.results(path, read_results(manifest)[0].protocol.seeds)
    return assemble(layout, results, path, read_results(manifest)[0] if manifest else None)


def find_manifest(path: Path, pictures: Sequence[str]) -> Path | None:
    """The manifest of the export that a result file is about: beside a folder above the results or above the pictures, or beside
    the results with the name of such a folder."""
    path = path.absolute()
    above = [*path.parents, *(folder for picture in pictures for folder in Path(picture).absolute().parents)]
    named = [path.parent / part for picture in pictures for part in Path(picture).parts if part != "/"]
    places = [manifest_of(folder) for folder in (path, *above, *named) if folder.name]
    return next((place for place in places if place.is_file()), None)


def assemble(layout: Layout, results: Results, path: Path, known: Evaluation | None) -> Evaluation:
    """Rows in their places. known: the manifest's evaluation, whose prompts and seeds they are."""
    rows = results.rows
    if known:
        keys, prompts, seeds = layout.keys(known.prompts), known.prompts, known.protocol.seeds
    else:
        found = {row.key: row.prompt for row in sorted(rows, key=lambda row: natural(row.key))}
        keys, prompts, seeds = list(found), list(found.values()), 1 + max(row.index for row in rows)
    places = {key: i for i, key in enumerate(keys)}
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    scores = torch.full((len(prompts), seeds, len(names)), torch.nan)
    taken: set[tuple[str, int]] = set()
    for row in rows:
        if row.key not in places or row.index >= seeds:
            raise ValueError(
                f"{row.where}: picture {row.index} of {row.key} is none of the {len(keys)} x {seeds} that were exported"
            )
        if (row.key, row.index) in taken:
            raise ValueError(f"{row.where}: picture {row.index} of {row.key} has a row already")
        taken.add((row.key, row.index))
        for name, value in row.scores.items():
            scores[places[row.key], row.index, names.index(name)] = value
    missing = [(key, j) for key in keys for j in range(seeds) if (key, j) not in taken]
    if missing and layout.whole:
        key, index = missing[0]
        raise ValueError(f"{path} has no row for {len(missing)} of {len(keys) * seeds} pictures: {index} of {key} is the first")
    if known:
        return replace(known, protocol=replace(known.protocol, rewards={}), rewards=names, scores=scores, summary=results.summary)
    protocol = Protocol(layout.name, None, seeds=seeds, digest=digest_of(prompts))
    order = [list(range(seeds))] * len(prompts)
    return Evaluation(results.model or path.stem, protocol, prompts, order, names, scores, summary=results.summary)


def natural(text: str) -> list[Any]:
    """Order by numbers where there are numbers: 2 before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def score_of(value: Any, where: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number within bounds, true and false too. Raises ValueError with `where`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {value!r} is not a number") from None
    if not math.isfinite(number) or not low <= number <= high:
        raise ValueError(f"{where}: {number} is not within {low:g} and {high:g}")
    return number


def file_name(prompt: str, name: str, layout: str, without: str = "/") -> str:
    """A name that a scorer reads the prompt back from. Raises ValueError where it could not."""
    if bad := [character for character in without if character in prompt]:
        raise ValueError(f"{layout} names files by their prompts, and {prompt!r} has {bad[0]!r} in it")
    if len(name.encode()) > 255:
        raise ValueError(f"{layout} names files by their prompts, and {prompt[:60]!r}... is longer than a file's name may be")
    return name
