"""What a gallery or a sheet shows, from pictures that are there already.

FOLDER of `flowrl sample`    samples.jsonl knows prompts, seeds and rewards, and every picture the command that drew it
RUN/samples                  a run's own pictures, step by step: a film
FOLDER of pictures           captions from metadata.jsonl (file_name, prompt, and seed, kind, rewards), from NAME.txt, from the
                             text inside a picture, or from its name; each subfolder is a column
FOLDER in GenEval's layout   00000/metadata.jsonl, 00000/samples/0000.png, ...

What cannot be read is left out and named; nothing here needs torch, except scoring.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flowrl.clips import FACTS, PARAMETERS, texts_of
from flowrl.gallery.originals import VIDEOS
from flowrl.gallery.page import Cell, Film, Frame

TABLE = "samples.jsonl"
METADATA = "metadata.jsonl"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", *VIDEOS)
FILM_STEPS, FILM_PICTURES = 48, 12  #: Of a film: at most so many steps, evenly spread, and so many pictures of each.


@dataclass
class Inputs:
    """Pictures that are there. columns: of a prompt, as rewards read them. models: what drew a column, where it is known."""

    cells: list[Cell] = field(default_factory=list)
    films: list[Film] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)  #: Rewards that one of the models was trained on.

    @property
    def checkpoints(self) -> dict[str, tuple[str, int]]:
        """Columns that are states of one training: {column: (run, step)}."""
        found = {column: checkpoint_of(model) for column, model in self.models.items()}
        return {column: place for column, place in found.items() if place}


def read_input(place: Path, name: str | None = None) -> Inputs | None:
    """The pictures in a folder; None where it is no folder of pictures (a model then, or nothing). name: of its column."""
    if not place.is_dir():
        return None
    if (place / TABLE).is_file():
        return read_table(place, name)
    if any(place.glob(f"step-*/{TABLE}")):
        found = Inputs()
        found.films.append(read_film(place, name, found.problems))
        found.trained = trained_on(str(place.parent))
        return found
    if any((place / file).exists() for file in ("recipe.yaml", "training_state", "model_index.json")):
        return None
    return read_geneval(place, name) or read_folder(place, name)


def joined(parts: Sequence[tuple[Path, Inputs]]) -> Inputs:
    """Columns of one name in two folders get the folders' names; of two pictures for a place the first stays."""
    whole = Inputs()
    names = _columns(parts)
    kinds = {cell.prompt: cell.kind for _, part in parts[::-1] for cell in part.cells[::-1] if cell.kind is not None}
    taken: set[tuple[str, str, int]] = set()
    for place, part in parts:
        for cell in part.cells:
            cell = replace(cell, model=names[place, cell.model], kind=kinds.get(cell.prompt))
            if (cell.model, cell.prompt, cell.seed) in taken:
                whole.problems.append(f"Left out, there is another of its prompt and seed: {_file(cell)} ({cell.model})")
                continue
            taken.add((cell.model, cell.prompt, cell.seed))
            whole.cells.append(cell)
        for film in part.films:
            others = [known.name for known in whole.films]
            whole.films.append(film if film.name not in others else replace(film, name=f"{film.name} ({len(others) + 1})"))
        whole.problems += part.problems
        whole.columns |= part.columns
        whole.models |= {names.get((place, column), column): model for column, model in part.models.items()}
        whole.trained |= part.trained
    return whole


def _columns(parts: Sequence[tuple[Path, Inputs]]) -> dict[tuple[Path, str], str]:
    """What each column of each folder is called: its own name, with the folder's or its path where another has it, too."""
    places: dict[str, list[Path]] = {}
    for place, part in parts:
        for column in dict.fromkeys(cell.model for cell in part.cells):
            places.setdefault(column, []).append(place)
    names = {}
    for column, homes in places.items():
        short = len({home.name for home in homes}) == len(homes)
        for home in homes:
            names[home, column] = column if len(homes) == 1 else f"{column} ({home.name if short else home})"
    return names


def _file(cell: Cell) -> str:
    return cell.image.name if isinstance(cell.image, Path) else "a picture"


# ------------------------------------------------------------------------------------------------ tables of pictures


def rows_of(table: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl file that can be read; the others are named."""
    try:
        lines = table.read_bytes().split(b"\n")
    except OSError as error:
        problems.append(f"{table.parent.name}/{table.name} cannot be read: {error.strerror}")
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            problems.append(f"{table.parent.name}/{table.name}, line {number} is not valid JSON")
            continue
        if isinstance(row, dict):
            yield row
        else:
            problems.append(f"{table.parent.name}/{table.name}, line {number} is not an object")


def read_table(place: Path, name: str | None) -> Inputs:
    """The folder of `flowrl sample`, or one step of a run's samples."""
    found = Inputs()
    rows = [row for row in rows_of(place / TABLE, found.problems) if _is_picture(row, place, found.problems)]
    labels = dict.fromkeys(str(row.get("column") or place.name) for row in rows)
    for row in rows:
        label = str(row.get("column") or place.name)
        label = label if name is None else name if len(labels) == 1 else f"{name} {label}"
        columns = row["columns"] if isinstance(row.get("columns"), dict) else {}
        found.columns.setdefault(row["prompt"], columns)
        if isinstance(row.get("model"), str) and label not in found.models:
            found.models[label] = row["model"]
            found.trained |= trained_on(row["model"])
        kind = columns.get("kind")
        file = place / row["file"]
        seed = row["seed"] if type(row.get("seed")) is int else len(found.cells)
        rewards = rewards_of(row.get("rewards"), file.name, found.problems)
        found.cells.append(Cell(label, row["prompt"], seed, file, rewards, None if kind is None else str(kind), details_of(file)))
    return found


def _is_picture(row: Mapping[str, Any], place: Path, problems: list[str]) -> bool:
    if isinstance(row.get("file"), str) and row["file"] and isinstance(row.get("prompt"), str):
        return True
    problems.append(f"{place.name}/{TABLE}: a row without file and prompt")
    return False


def rewards_of(given: Any, where: str, problems: list[str]) -> dict[str, float | None]:
    """The rewards of a row; what is no finite number abstains, and is named unless it is null."""
    rewards: dict[str, float | None] = {}
    for label, value in given.items() if isinstance(given, dict) else ():
        finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not finite and value is not None:
            problems.append(f"{where}: its {label} is {value!r}, not a number")
        rewards[str(label)] = float(value) if finite else None
    return rewards


def details_of(file: Path) -> dict[str, str]:
    """What a picture says about itself: of `flowrl sample` settings and command, of other tools their line of settings."""
    texts = _texts(file)
    if FACTS not in texts:
        return {"file": file.name} | ({"parameters": texts[PARAMETERS]} if PARAMETERS in texts else {})
    facts = json.loads(texts[FACTS])
    call, request = facts.get("resolved") or {}, facts.get("request") or {}
    said = {
        "steps": call.get("num_inference_steps"),
        "guidance": call.get("guidance_scale"),
        "sampler": (request.get("steer") or request.get("transition") or {}).get("name"),
        "fps": call.get("fps"),
        "weights": facts.get("weights"),
        "file": file.name,
        "command": facts.get("command"),
    }
    return {key: str(value) for key, value in said.items() if value is not None}


def _texts(file: Path) -> dict[str, str]:
    """The text chunks of a picture, as far as they can be read; FACTS only where it is the JSON of an object."""
    texts = texts_of(file)
    try:
        facts = json.loads(texts.get(FACTS, "null"))
    except ValueError:
        facts = None
    return texts if isinstance(facts, dict) else {key: value for key, value in texts.items() if key != FACTS}


# ------------------------------------------------------------------------------------------------ films


def read_film(samples: Path, name: str | None, problems: list[str]) -> Film:
    """The pictures that a run saved: of each step the first of every group, then the second, and so on."""
    run = samples.absolute().parent
    steps = sorted(
        (int(table.parent.name[5:]), table) for table in samples.glob(f"step-*/{TABLE}") if table.parent.name[5:].isdigit()
    )
    kept = steps
    if len(steps) > FILM_STEPS:
        kept = [steps[round(i * (len(steps) - 1) / (FILM_STEPS - 1))] for i in range(FILM_STEPS)]
    frames, most = [], 0
    for step, table in kept:
        rows = [row for row in rows_of(table, problems) if _is_picture(row, table.parent, problems)]
        most = max(most, len(rows))
        rewards = [rewards_of(row.get("rewards"), f"{table.parent.name}/{row['file']}", problems) for row in rows]
        cells = []
        for i in _one_by_one(rows)[:FILM_PICTURES]:
            file = table.parent / rows[i]["file"]
            seed = rows[i]["seed"] if type(rows[i].get("seed")) is int else i
            cells.append(Cell(run.name, rows[i]["prompt"], seed, file, rewards[i]))
        names = dict.fromkeys(label for values in rewards for label in values)
        frames.append(Frame(step, cells, {label: _mean([values.get(label) for values in rewards]) for label in names}))
    note = "Pictures of the training's own sampler, other prompts and seeds at each step. Curves are means over all saved ones."
    note += f" {len(kept)} of {len(steps)} saved steps." if len(kept) < len(steps) else ""
    note += f" Up to {FILM_PICTURES} of {most} pictures each." if most > FILM_PICTURES else ""
    return Film(name or run.name, frames, note)


def _one_by_one(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Positions in turn from every group."""
    seen: dict[Any, int] = {}
    order = []
    for i, row in enumerate(rows):
        group = str(row.get("group", row["prompt"]))
        seen[group] = seen.get(group, -1) + 1
        order.append((seen[group], i))
    return [i for _, i in sorted(order)]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# ------------------------------------------------------------------------------------------------ any folder of pictures


def read_geneval(place: Path, name: str | None) -> Inputs | None:
    """00000/metadata.jsonl with a prompt and a tag, 00000/samples/0000.png, ..."""
    folders = [d for d in sorted(place.iterdir()) if (d / METADATA).is_file() and (d / "samples").is_dir()]
    found = Inputs()
    for folder in folders:
        row = next(rows_of(folder / METADATA, found.problems), {})
        prompt = str(row.get("prompt", folder.name))
        kind = str(row["tag"]) if "tag" in row else None
        for seed, file in enumerate(_pictures(folder / "samples")):
            found.cells.append(Cell(name or place.absolute().name, prompt, seed, file, {}, kind, details_of(file)))
    return found if found.cells else None


def read_folder(place: Path, name: str | None) -> Inputs | None:
    """Pictures, or subfolders of pictures; with captions, and rewards where a metadata.jsonl has them."""
    found = Inputs()
    label = name or place.absolute().name
    parts = {label: place} if _pictures(place) else {}
    subfolders = [d for d in sorted(place.iterdir(), key=_natural) if d.is_dir() and not d.name.startswith(".") and _pictures(d)]
    parts |= {d.name if name is None or len(subfolders) + len(parts) > 1 else name: d for d in subfolders}
    for column, folder in parts.items():
        told = _metadata(place, folder, found.problems)
        taken: dict[str, set[int]] = {}
        for file in _pictures(folder):
            row = told.get(file.resolve(), {})
            prompt, seed = caption_of(file, row)
            used = taken.setdefault(prompt, set())
            if seed is None or seed in used:
                seed = next(i for i in range(len(used) + 1) if i not in used)
            used.add(seed)
            rewards = rewards_of(row.get("rewards"), file.name, found.problems)
            found.columns.setdefault(prompt, {key: value for key, value in row.items() if key not in ("file_name", "rewards")})
            kind = None if row.get("kind") is None else str(row["kind"])
            found.cells.append(Cell(column, prompt, seed, file, rewards, kind, details_of(file)))
        found.problems += [
            f"Missing file: {file.name} ({METADATA})" for file in told if file.parent == folder.resolve() and not file.exists()
        ]
    return found if found.cells else None


def _metadata(place: Path, folder: Path, problems: list[str]) -> dict[Path, dict[str, Any]]:
    """Rows about the pictures of `folder`, by file: from its own table, or from one in `place`, above it."""
    rows: dict[Path, dict[str, Any]] = {}
    for home in dict.fromkeys((place, folder)):
        if (home / METADATA).is_file():
            own: list[str] = []
            rows |= {(home / str(row["file_name"])).resolve(): row for row in rows_of(home / METADATA, own) if "file_name" in row}
            problems += [problem for problem in own if problem not in problems]
    return rows


def caption_of(file: Path, row: Mapping[str, Any]) -> tuple[str, int | None]:
    """Prompt and seed: from the row of a table, a text beside the picture, the text inside it, or its name.

    A name ends in the seed after a dash, underscore or space: a_red_circle-s3, photo_0004.
    """
    seed = row["seed"] if type(row.get("seed")) is int else None
    named, own = _from_name(file.stem)
    for key in ("prompt", "text", "caption"):
        if isinstance(row.get(key), str):
            return row[key], own if seed is None else seed
    beside = file.with_suffix(".txt")
    if beside.is_file():
        return beside.read_text(encoding="utf-8", errors="replace").strip(), own if seed is None else seed
    texts = _texts(file)
    if FACTS in texts:
        request = json.loads(texts[FACTS]).get("request") or {}
        if isinstance(request.get("prompt"), str):
            return request["prompt"], request.get("seed") if type(request.get("seed")) is int else seed
    if PARAMETERS in texts:
        prompt = re.split(r"\n(?:Negative prompt: |Steps: )", texts[PARAMETERS])[0].strip()
        number = re.search(r"\bSeed: (\d+)", texts[PARAMETERS])
        return prompt or named, int(number[1]) if number else own
    return named, own if seed is None else seed


def _from_name(stem: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(.*?[^-_ ])[-_ ]+(?:seed[-_ ]?|s)?(\d{1,18})", stem)
    words, seed = (found[1], int(found[2])) if found else (stem, None)
    return " ".join(re.split(r"[-_\s]+", words)).strip() or stem, seed


def _pictures(folder: Path) -> list[Path]:
    files = [
        file for file in folder.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith(".") and file.is_file()
    ]
    return sorted(files, key=_natural)


def _natural(path: Path) -> list[Any]:
    """2.png before 10.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


# ------------------------------------------------------------------------------------------------ what is known about models


def in_order(models: Sequence[str]) -> list[str]:
    """The models, those checkpoints of one run that are named among them by their steps: a shell puts 100 before 50."""
    places = {model: found for model in models if (found := re.fullmatch(r"(.*)/checkpoint-(\d+)/?", model))}
    ordered = list(models)
    for run in {found[1] for found in places.values()}:
        own = [model for model in models if model in places and places[model][1] == run]
        for at, model in zip([models.index(model) for model in own], sorted(own, key=lambda m: int(places[m][2])), strict=True):
            ordered[at] = model
    return ordered


def checkpoint_of(model: str) -> tuple[str, int] | None:
    """(run, step) of RUN/checkpoint-STEP, or of a run's result."""
    found = re.search(r"([^/]+)/checkpoint-(\d+)/?$", model)
    if found:
        return found[1], int(found[2])
    try:
        lines = (Path(model) / "metrics.jsonl").read_text().splitlines()
        return Path(model).absolute().name, int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def trained_on(model: str) -> set[str]:
    """The rewards that a run, a checkpoint, or a LoRA of one was trained on."""
    names: set[str] = set()
    for part in model.split("+"):
        path = Path(part if Path(part).exists() else part.rpartition("@")[0] or part)
        rewards = (recipe_of(path) or recipe_of(path.absolute().parent)).get("rewards")
        names |= {str(label) for label in rewards} if isinstance(rewards, dict) else set()
    return names


def recipe_of(run: Path) -> dict[str, Any]:
    """The recipe of a run; empty where there is none."""
    import yaml

    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


# ------------------------------------------------------------------------------------------------ scoring


def scored(found: Inputs, rewards: Sequence[str], batch_size: int = 32) -> Inputs:
    """The pictures and clips with further rewards; what cannot be read stays without. Raises ConfigError for a reward that
    compares."""
    import torch

    from flowrl.batch import Prompt, Samples
    from flowrl.config import ConfigError
    from flowrl.pairs import load_shown
    from flowrl.reward_models import load_reward
    from flowrl.reward_models.base import score, short_labels, traits_of

    scorers = {label: load_reward(name) for name, label in short_labels(rewards).items()}
    for label, reward in scorers.items():
        if traits_of(reward).arity != "point" or "references" in traits_of(reward).needs:
            raise ConfigError(f"reward {label} compares pictures with others: use it with `flowrl eval`")
    sizes: dict[Any, list[tuple[int, Any]]] = {}
    cells = list(found.cells)

    def flush(batch: list[tuple[int, Any]], fps: float | None) -> None:
        prompts = [Prompt(cells[i].prompt, found.columns.get(cells[i].prompt, {})) for i, _ in batch]
        images = torch.stack([pixels for _, pixels in batch])
        nothing = torch.zeros(len(batch), 0)
        samples = Samples(prompts, [cells[i].seed for i, _ in batch], torch.arange(len(batch)), nothing, images, fps=fps)
        for (i, _), values in zip(batch, score(scorers, samples).tolist(), strict=True):
            new = {label: None if value != value else round(value, 6) for label, value in zip(scorers, values, strict=True)}
            cells[i] = replace(cells[i], rewards={**cells[i].rewards, **new})
        batch.clear()

    for i, cell in enumerate(cells):
        try:
            pixels, fps = load_shown(cell.image) if isinstance(cell.image, Path) else (None, None)
        except (OSError, ValueError):
            continue  # the page names it
        if pixels is not None:
            batch = sizes.setdefault((pixels.shape, fps), [])
            batch.append((i, pixels))
            if len(batch) == batch_size:
                flush(batch, fps)
    for (_, fps), batch in sizes.items():
        if batch:
            flush(batch, fps)
    return replace(found, cells=cells)
