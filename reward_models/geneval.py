"""GenEval (arXiv 2310.11513) as a reward: are the asked objects there, in their number, colour and place?

The rules are plain functions of detections. Two deviations of the widely used reward server are not repeated: its partial credit
falls below 0 when objects abound, and its wrong position counts as half right.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.base import Traits
from flowrl.reward_models.boxes import Box, Found
from flowrl.reward_models.colors import Colors
from flowrl.reward_models.detectors import detect_in, load_detector, pictures_of

#: Unit vector from the second object to the first, y downwards.
AXES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
MAX_FOUND = 16  #: Per name, the best ones.


@dataclass(frozen=True)
class Clause:
    """A demand: `count` objects called `name`. relation: (its name, index of the clause it refers to). size: huge or tiny."""

    name: str
    count: int = 1
    color: str | None = None
    relation: tuple[str, int] | None = None
    size: str | None = None

    @property
    def phrase(self) -> str:
        return f"{self.color} {self.name}" if self.color else self.name


@dataclass(frozen=True)
class Spec:
    """What a picture must show. exclude: clauses whose count must not be reached."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    tag: str = ""

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(clause.name for clause in self.include + self.exclude))


def read_spec(columns: Mapping[str, Any], relations: Collection[str] = tuple(AXES)) -> Spec | None:
    """From GenEval's metadata, or from the columns of the embedded prompts; None where there is no `include`.

    GenEval: {"tag", "include": [{"class", "count", "color", "size", "position": [relation, index]}], "exclude": [...]}.
    Embedded: {"kind", "include": [{"shape", "count", "color"}], "relation": of the first with respect to the second}.
    relations: those that are known. Raises ValueError for what is neither.
    """
    if not columns.get("include"):
        return None
    include = [_clause(item, "include") for item in columns["include"]]
    if columns.get("relation"):
        include[0] = replace(include[0], relation=(columns["relation"], 1))
    for clause in include:
        if clause.relation and (clause.relation[0] not in relations or clause.relation[1] not in range(len(include))):
            known = ", ".join(relations)
            raise ValueError(f"column include: position {list(clause.relation)} wants {known}, and a clause's index")
    exclude = [_clause(item, "exclude") for item in columns.get("exclude") or ()]
    return Spec(tuple(include), tuple(exclude), str(columns.get("tag") or columns.get("kind") or ""))


def _clause(item: Mapping[str, Any], column: str) -> Clause:
    try:
        name = item["class"] if "class" in item else item["shape"]
        position = item.get("position")
        relation = (str(position[0]), int(position[1])) if position else None
        clause = Clause(str(name), int(item.get("count", 1)), item.get("color"), relation, item.get("size"))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise ValueError(f'column {column}: wants objects like {{"class": "dog", "count": 1}}, not {item!r}') from None
    if clause.count < 1:
        raise ValueError(f"column {column}: count of {clause.name!r} is {clause.count}, but counts start at 1")
    if clause.size not in (None, "huge", "tiny"):
        raise ValueError(f"column {column}: size of {clause.name!r} is {clause.size!r}, but huge or tiny")
    return clause


def direction(a: Box, b: Box, relation: str) -> float:
    """How much the way from b to a points where the relation says, in [-1, 1]; it holds above 0.5, within about 60 degrees.

    GenEval's: per axis the way between the centres is shortened by a tenth of both sides, then divided by its full length.
    a, b: in units that are equal along x and y, so that angles are right (multiply x by width / height).
    """
    way, length = 0.0, 0.0
    for axis, sign in enumerate(AXES[relation]):
        offset = (a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2
        slack = 0.1 * (abs(a[axis + 2] - a[axis]) + abs(b[axis + 2] - b[axis]))
        way += sign * math.copysign(max(abs(offset) - slack, 0.0), offset)
        length = math.hypot(length, offset)
    return way / length if length > 0 else 0.0


def proportioned(box: Box, aspect: float) -> Box:
    """A box in shares of the sides, in units of the height. aspect: width / height."""
    return box[0] * aspect, box[1], box[2] * aspect, box[3]


Objects = Mapping[str, Sequence[Found]]  #: Detections by name, best first.


def by_name(found: Sequence[Found], names: Sequence[str], threshold: float) -> dict[str, list[Found]]:
    """The best MAX_FOUND of each name above the threshold, best first."""
    return {
        name: sorted((f for f in found if f.phrase == name and f.score > threshold), key=lambda f: -f.score)[:MAX_FOUND]
        for name in names
    }


def holds(first: Sequence[Found], second: Sequence[Found], relation: str, aspect: float = 1.0) -> bool:
    """Every object of the first stands so to every object of the second."""
    pairs = [(proportioned(a.box, aspect), proportioned(b.box, aspect)) for a in first for b in second]
    return bool(pairs) and all(direction(a, b, relation) > 0.5 for a, b in pairs)


def official(objects: Objects, spec: Spec, aspect: float = 1.0) -> bool:
    """The benchmark's rule: the best `count` objects of each name are looked at; more of them are no mistake unless excluded."""
    groups = [list(objects.get(clause.name, ()))[: clause.count] for clause in spec.include]
    good = []
    for clause, group in zip(spec.include, groups, strict=True):
        colored = sum(f.color == clause.color for f in group)
        good.append(len(group) == clause.count and (clause.color is None or colored == clause.count))
    for clause, group in zip(spec.include, groups, strict=True):
        if clause.relation:
            relation, other = clause.relation
            good.append(good[other] and holds(group, groups[other], relation, aspect))
    return all(good) and all(len(objects.get(clause.name, ())) < clause.count for clause in spec.exclude)


def terms(objects: Objects, spec: Spec, aspect: float = 1.0) -> list[float]:
    """Every demand in [0, 1], counts to be met exactly; their mean is the dense score, all of them 1 the strict one.

    Count n for c: max(0, 1 - |c - n| / c). Colour: share of the c objects that have it, 0 where the count is wrong. Relation:
    1 or 0, and 0 unless count and colour of both clauses are right. Excluded: 1 or 0, unless an included count says it already.
    """
    values, good = [], []
    for clause in spec.include:
        group = objects.get(clause.name, ())
        own = [max(0.0, 1 - abs(clause.count - len(group)) / clause.count)]
        if clause.color is not None:
            right = sum(f.color == clause.color for f in group)
            own.append(right / clause.count if len(group) == clause.count else 0.0)
        values += own
        good.append(min(own) == 1)
    for clause, fine in zip(spec.include, good, strict=True):
        if clause.relation:
            relation, other = clause.relation
            pair = objects.get(clause.name, ()), objects.get(spec.include[other].name, ())
            values.append(float(fine and good[other] and holds(*pair, relation, aspect)))
    included = {clause.name for clause in spec.include}
    values += [float(len(objects.get(c.name, ())) < c.count) for c in spec.exclude if c.name not in included]
    return values


class GenEval:
    """Does the picture show what the columns of its prompt demand: objects, counts, colours, places? Abstains without `include`.

    Columns as in GenEval's metadata: {"tag", "include": [{"class", "count", "color", "position": [relation, index]}], "exclude":
    [...]}, or as of the embedded prompts: {"kind", "include": [{"shape", "count", "color"}], "relation"}. Scores resemble the
    benchmark's, but are not its numbers: those come from Mask2Former of mmdet 2.
    """

    name = "geneval"
    traits = Traits(columns=("include",), range=(0, 1))

    def __init__(
        self,
        #: strict is 1 or 0, with exact counts; dense gives partial credit; official is the benchmark's own rule, 1 or 0.
        mode: str = "strict",
        #: tiny (the embedded world), hub id or folder of a zero-shot detector, or "package.module:Class" of your own.
        detector: Any = "tiny",
        threshold: float = 0.3,  #: Detections count above this score.
        #: That of the benchmark's counting prompts, 0.9 with its own detector; unset: `threshold`.
        counting_threshold: float | None = None,
        #: Hub id or folder of the CLIP that names colours where the detector does not, or a function
        #: (image (3, H, W), boxes, name) -> colours.
        color: Any = "openai/clip-vit-large-patch14",
    ):
        if mode not in ("strict", "dense", "official"):
            raise ValueError(f"mode={mode!r}: choose strict, dense or official")
        self.mode, self.detector = mode, load_detector(detector)
        self.threshold, self.colors = threshold, Colors(color)
        self.counting_threshold = threshold if counting_threshold is None else counting_threshold

    def __call__(self, samples: Samples) -> Tensor:
        images = pictures_of(samples, self.name)
        specs = [read_spec(prompt.columns) for prompt in samples.prompts]
        found = detect_in(self.detector, images, [spec.names if spec else [] for spec in specs])
        aspect = images.shape[-1] / images.shape[-2]
        scores = torch.full((len(samples),), torch.nan)
        for i, spec in enumerate(specs):
            if spec is None:
                continue
            threshold = self.counting_threshold if spec.tag == "counting" else self.threshold
            objects = by_name(found[i], spec.names, threshold)
            for name in {clause.name for clause in spec.include if clause.color}:
                objects[name] = self.colors(images[i], objects[name], [name])
            if self.mode == "official":
                scores[i] = float(official(objects, spec, aspect))
            else:
                values = terms(objects, spec, aspect)
                scores[i] = sum(values) / len(values) if self.mode == "dense" else float(min(values) == 1)
        return scores
