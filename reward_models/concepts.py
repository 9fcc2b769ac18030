"""One kind of demand as a reward of its own, by the rules of CMO (TheDarkKnight-21th/CMO) and T2I-CompBench (arXiv 2307.06350).

    cmo        number     1 / (|n - c| + 1)^2
               size       1 / rank^2 by area among all that was found: from the largest for "huge", from the smallest for "tiny"
               attribute  probability that the crop has the colour
               relation   mean over a of the best b: 1 beyond it and beside it, 1/2 if only the centres are in order, else 0
    compbench  number     1/2 if there is any, 1/2 if there are exactly c
               relation   (score of a + score of b) / 4, + 1/2 if the longer way between the centres is right, less for overlap

A prompt that demands several things is hard by one of them. Rewards that abstain where nothing of their kind is asked let
`aggregation=correlation` find out which. Depth ("in front of") is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.base import Traits
from flowrl.reward_models.boxes import Box, Found, intersections
from flowrl.reward_models.colors import Colors
from flowrl.reward_models.detectors import detect_in, load_detector, pictures_of
from flowrl.reward_models.geneval import AXES, Clause, Objects, Spec, by_name, proportioned, read_spec

Kind = Literal["number", "size", "attribute", "relation"]
Rules = Literal["cmo", "compbench"]

NEAR = ("near", "next to", "on side of")
#: What each set of rules knows, and its relations.
KINDS: dict[Rules, tuple[Kind, ...]] = {"cmo": ("number", "size", "attribute", "relation"), "compbench": ("number", "relation")}
RELATIONS: dict[Rules, tuple[str, ...]] = {"cmo": (*AXES, "inside", "outside"), "compbench": (*AXES, *NEAR)}
DEMANDS = {"number": "count", "size": "size", "attribute": "color", "relation": "relation"}  #: Where a clause has each kind.
TOLERANCE = 0.1  #: Of the smaller side, by which two things may overlap and still be beyond each other (cmo).
CLOSE = 150 / 512  #: Of the picture's height: T2I-CompBench's 150 pixels in its pictures of 512, at any size.


def number_score(n: int, c: int, rules: Rules = "cmo") -> float:
    """How near n is to the c that were asked for, in [0, 1]."""
    return 1 / (abs(n - c) + 1) ** 2 if rules == "cmo" else 0.5 * (n > 0) + 0.5 * (n == c)


def size_score(box: Box, others: Sequence[Box], size: str) -> float:
    """1 / rank^2 of a box by area among itself and the others: from the largest for "huge", from the smallest for "tiny"."""
    sign = 1 if size == "huge" else -1
    return 1 / (1 + sum(sign * _area(other) > sign * _area(box) for other in others)) ** 2


def beyond(a: Box, b: Box, relation: str) -> float:
    """CMO's relation of a to b: 1, 1/2 or 0. Boxes in shares of the sides, y downwards."""
    if relation in ("inside", "outside"):
        shared, least = _overlaps(a, b)[1], min(_area(a), _area(b))
        return float(shared < 0.1 if relation == "outside" else shared * least >= 0.95 * _area(a))
    axis = 0 if AXES[relation][0] else 1
    first, second = (a, b) if sum(AXES[relation]) < 0 else (b, a)  # the first is to lie where the coordinate is smaller
    if first[axis] + first[axis + 2] >= second[axis] + second[axis + 2]:
        return 0.0
    beside = min(a[3 - axis], b[3 - axis]) > max(a[1 - axis], b[1 - axis])
    slack = TOLERANCE * min(first[axis + 2] - first[axis], second[axis + 2] - second[axis])
    return 1.0 if beside and first[axis + 2] <= second[axis] + slack else 0.5


def placed(a: Box, b: Box, relation: str, aspect: float = 1.0) -> float:
    """T2I-CompBench's place of a relative to b, in [0, 1]. Boxes in shares of the sides; aspect: width / height.

    A direction counts where the longer way between the centres has it; an overlap u above 0.1 leaves 0.1 / u of it.
    """
    (x, y), (x_b, y_b) = (_centre(proportioned(box, aspect)) for box in (a, b))
    dx, dy = x - x_b, y - y_b
    if relation in NEAR:
        return 1.0 if min(abs(dx), abs(dy)) < CLOSE else CLOSE / max(abs(dx), abs(dy))
    right, down = AXES[relation]
    good = (abs(dx) > abs(dy)) == bool(right) and dx * right + dy * down > 0
    return min(1.0, 0.1 / max(_overlaps(a, b)[0], 1e-12)) if good else 0.0


def relation_score(first: Sequence[Found], second: Sequence[Found], relation: str, rules: Rules, aspect: float = 1.0) -> float:
    """Of the first to the second, in [0, 1]; both best first. compbench looks at the best of each."""
    if rules == "cmo":
        best = [max((beyond(a.box, b.box, relation) for b in second), default=0.0) for a in first]
        return sum(best) / max(len(best), 1)
    there = sum(group[0].score for group in (first, second) if group) / 4
    return there + (placed(first[0].box, second[0].box, relation, aspect) / 2 if first and second else 0.0)


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlaps(a: Box, b: Box) -> tuple[float, float]:
    """Intersection over union, and over the smaller of the two."""
    union, smaller = intersections(np.array([a]), np.array([b]))
    return union.item(), smaller.item()


class Concept:
    """How well one kind of what the prompt's column `include` demands is met, in [0, 1]; abstains where nothing of it is asked.

    Columns as in `geneval`, whose objects may also have a "size", "huge" or "tiny". Several demands of the kind count alike.
    """

    name = "concept"
    traits = Traits(columns=("include",), range=(0.0, 1.0))

    def __init__(
        self,
        kind: Kind,  #: number or relation; by CMO's rules also attribute (a colour) or size.
        rules: Rules = "cmo",  #: cmo, or compbench (T2I-CompBench), which leaves attributes to a judge that is asked.
        #: tiny (the embedded world), hub id or folder of a zero-shot detector, or "package.module:Class" of your own.
        detector: Any = "tiny",
        threshold: float = 0.3,  #: Detections count above this score.
        #: Hub id or folder of the CLIP that names colours where the detector does not, or a function
        #: (image (3, H, W), boxes, name) -> colours.
        color: Any = "openai/clip-vit-large-patch14",
    ):
        if rules not in KINDS:
            raise ValueError(f"concept: rules={rules!r}: choose {' or '.join(KINDS)}")
        if kind not in KINDS[rules]:
            raise ValueError(f"concept: kind={kind!r}: the rules {rules} know {', '.join(KINDS[rules])}")
        self.kind, self.rules, self.threshold, self.colors = kind, rules, threshold, Colors(color)
        self.detector = load_detector(detector)

    def __call__(self, samples: Samples) -> Tensor:
        images = pictures_of(samples, self.name)
        specs = [read_spec(prompt.columns, RELATIONS[self.rules]) for prompt in samples.prompts]
        asked = [[c for c in spec.include if getattr(c, DEMANDS[self.kind])] if spec else [] for spec in specs]
        wanted = [spec.names if spec and clauses else [] for spec, clauses in zip(specs, asked, strict=True)]
        found = detect_in(self.detector, images, wanted)
        scores = torch.full((len(samples),), torch.nan)
        for i, spec in enumerate(specs):
            if spec and asked[i]:
                objects = by_name(found[i], spec.names, self.threshold)
                scores[i] = sum(self._met(clause, objects, spec, images[i]) for clause in asked[i]) / len(asked[i])
        return scores

    def _met(self, clause: Clause, objects: Objects, spec: Spec, image: Tensor) -> float:
        """How well the demand of one clause is met."""
        group = objects[clause.name]
        if self.kind == "number":
            return number_score(len(group), clause.count, self.rules)
        if self.kind == "attribute":
            chances = self.colors.chances(image, group[: clause.count], clause.name, str(clause.color))
            return sum(chances) / clause.count
        if self.kind == "size":
            others = [f.box for found in objects.values() for f in found if f is not group[0]] if group else []
            return size_score(group[0].box, others, str(clause.size)) if group else 0.0
        assert clause.relation is not None
        relation, other = clause.relation
        aspect = image.shape[-1] / image.shape[-2]
        return relation_score(group, objects[spec.include[other].name], relation, self.rules, aspect)
