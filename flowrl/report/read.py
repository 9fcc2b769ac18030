"""What a run's folder says about it, checked: settings, environment, metrics, alarms, pictures. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flowrl.config import ConfigError

#: A step, and a value.
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Sample:
    """A picture that a run kept, and what was written beside it."""

    file: Path
    prompt: str
    group: Any
    rewards: dict[str, float]


@dataclass(frozen=True)
class Run:
    """A run's folder, read. rows: metrics, one per step. samples: by step. notes: what could not be read, a sentence each."""

    folder: Path
    recipe: dict[str, Any]
    environment: dict[str, str]
    rows: list[dict[str, Any]]
    alarms: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def steps(self) -> int:
        return self.rows[-1]["step"]

    def metrics(self) -> list[str]:
        """The names of all metrics that are a number in some row, in the order of their first appearance."""
        return list(
            dict.fromkeys(name for row in self.rows for name, value in row.items() if name != "step" and is_number(value))
        )

    def points(self, name: str) -> Points:
        """A metric, where it is a number."""
        return [(row["step"], float(row[name])) for row in self.rows if is_number(row.get(name))]

    def total(self, name: str) -> float:
        return sum(value for _, value in self.points(name))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(folder: str | Path) -> Run:
    """Raises ConfigError with one line for what is no run, or has nothing to report, or is damaged."""
    folder = Path(folder)
    if not folder.exists():
        raise ConfigError(f"there is no folder {folder}")
    if not folder.is_dir() or not (folder / "recipe.yaml").is_file():
        near = next((place for place in folder.parents if (place / "recipe.yaml").is_file()), None)
        hint = f": give the run, {near}" if near is not None and near != Path() else " (no recipe.yaml)"
        raise ConfigError(f"{folder} is not the folder of a run{hint}")
    notes: list[str] = []
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"{folder}/recipe.yaml cannot be read: not valid YAML") from None
    if not isinstance(recipe, dict):
        raise ConfigError(f"{folder}/recipe.yaml is not a recipe: a recipe is a mapping of options")
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(f"run {folder} has no metrics.jsonl yet: it has not finished a step")
    rows = list(read_lines(metrics, notes))
    if not rows:
        raise ConfigError(f"{metrics} is empty: the run has not finished a step")
    alarms = list(read_lines(folder / "alarms.jsonl", notes)) if (folder / "alarms.jsonl").is_file() else []
    return Run(folder, recipe, environment_of(folder), rows, alarms, samples_of(folder, notes), notes)


def read_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines, each of a step. A last line that was cut short when the run was killed is left out and
    noted. Raises ConfigError for any other line that is none."""
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    cut = len(lines) if not path.read_bytes().endswith(b"\n") else 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == cut:
                notes.append(f"the last line of {path.name} was cut short, and is left out")
                return
            raise ConfigError(f"{path}, line {number}: not JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or isinstance(row["step"], bool):
            raise ConfigError(f"{path}, line {number}: not a row of a step, like {{'step': 1, 'reward': 0.5}}")
        yield row


def environment_of(folder: Path) -> dict[str, str]:
    """environment.json, empty where there is none that can be read."""
    try:
        found = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def samples_of(folder: Path, notes: list[str]) -> dict[int, list[Sample]]:
    """The pictures of each step that kept some, in the order of the steps. A table that cannot be read is noted."""
    found: dict[int, list[Sample]] = {}
    for place in sorted((folder / "samples").glob("step-*")):
        number = place.name.removeprefix("step-")
        if not number.isdecimal():
            continue
        try:
            rows = [json.loads(line) for line in (place / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
            found[int(number)] = [
                Sample(
                    place / str(row["file"]),
                    str(row["prompt"]),
                    row.get("group"),
                    {str(name): float(value) for name, value in (row.get("rewards") or {}).items() if is_number(value)},
                )
                for row in rows
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            notes.append(f"samples/{place.name}/samples.jsonl cannot be read, and its pictures are left out")
    return found
