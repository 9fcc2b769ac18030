"""Gaussian layout rewards: the point and coverage rewards of GUI-G2 (arXiv 2507.15846), applied to generated pictures.

A box is a Gaussian: its centre, and per axis the deviation sigma = alpha x side, so that large things may be off by more.

    R_point = exp(-1/2 sum_a (delta_a / sigma_a)^2)                         sigma of the target
    R_cov   = prod_a sqrt(2 s g / (s^2 + g^2)) exp(-delta_a^2 / (4 (s^2 + g^2)))   s, g: sigma of found and target

R_cov is the Bhattacharyya coefficient of the two Gaussians, separated by axes. What is ours is the use for pictures with several
things in them: found things are assigned to targets one to one, weak detections count little, missing things are missing, and
surplus things cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.base import Traits
from flowrl.reward_models.boxes import Box, Found, intersections
from flowrl.reward_models.detectors import detect_in, load_detector, pictures_of
from flowrl.reward_models.geneval import direction, proportioned, read_spec

SAME = 0.7  #: Intersection over union above which two detections are of one thing, whatever their phrases.


@dataclass(frozen=True)
class Target:
    """What is to be found. box: None where only its presence matters."""

    phrase: str
    box: Box | None = None


@dataclass(frozen=True)
class Layout:
    """targets; relations between groups of them: (name, indices of the first, indices of the second); unwanted: phrases."""

    targets: tuple[Target, ...]
    relations: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    unwanted: tuple[str, ...] = ()

    @property
    def phrases(self) -> list[str]:
        return list(dict.fromkeys([target.phrase for target in self.targets] + list(self.unwanted)))


def _gaussian(boxes: Tensor, alpha: float, sigma_min: float) -> tuple[Tensor, Tensor]:
    """(..., 4) -> centres (..., 2), deviations (..., 2)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, (alpha * (high - low)).clamp_min(max(sigma_min, 1e-6))


def point_reward(found: Tensor, target: Tensor, alpha: float = 0.5, sigma_min: float = 0.0) -> Tensor:
    """R_point in (0, 1]. Boxes (..., 4) as (x0, y0, x1, y1), broadcast; sigma_min: floor of sigma in the boxes' unit."""
    (mu, _), (nu, sigma) = _gaussian(found, alpha, sigma_min), _gaussian(target, alpha, sigma_min)
    return (-0.5 * ((mu - nu) / sigma).square().sum(-1)).exp()


def coverage_reward(found: Tensor, target: Tensor, alpha: float = 0.5, sigma_min: float = 0.0) -> Tensor:
    """R_cov in (0, 1], 1 for equal boxes, symmetric. Arguments as in `point_reward`."""
    (mu, s), (nu, g) = _gaussian(found, alpha, sigma_min), _gaussian(target, alpha, sigma_min)
    total = s.square() + g.square()
    return ((2 * s * g / total).sqrt() * (-(mu - nu).square() / (4 * total)).exp()).prod(-1)


def assign(values: np.ndarray, allowed: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (p, t), each index at most once, that maximise the sum of values (P, T) >= 0 over the allowed pairs (Hungarian)."""
    rows, columns = linear_sum_assignment(np.where(allowed, values, 0), maximize=True)
    return [(int(p), int(t)) for p, t in zip(rows, columns, strict=True) if allowed[p, t]]


def relation_score(a: Box, b: Box, relation: str, tau: float = 0.1) -> float:
    """GenEval's rule, smooth, in (0, 1): sigma((u - 1/2) / tau) with u of `geneval.direction`; 1/2 where the rule flips."""
    return 1 / (1 + math.exp(-(direction(a, b, relation) - 0.5) / tau))


@dataclass
class Rule:
    """How detections become a score."""

    #: Deviation of the Gaussian per side of the box. 0.5 is the paper's best; larger is more lenient.
    alpha: float = 0.5
    #: Weight of R_point, a Gaussian of the distance between centres.
    point: float = 1.0
    #: Weight of R_cov, how much of the two boxes, as Gaussians, coincides.
    coverage: float = 1.0
    #: Penalty of surplus things: this times e / (T + e) for e of them beside T targets.
    surplus: float = 0.25
    #: Scores of the detector where a detection begins to count, and from where it counts fully.
    gate: tuple[float, float] = (0.25, 0.5)
    #: What a detection at the lower end of the gate is worth; below, it falls to 0 with its score. Orders the failures.
    fallback: float = 0.1
    #: Floor of the deviation, as a share of the picture's side: detectors tremble on tiny boxes.
    sigma_min: float = 0.02
    #: Width of the relation's transition.
    tau: float = 0.1

    def __post_init__(self) -> None:
        for name in ("alpha", "tau", "sigma_min"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("point", "coverage", "surplus", "fallback"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.point + self.coverage == 0:
            raise ValueError("point=0 and coverage=0: give one of them a weight")
        if len(self.gate) != 2 or not 0 < self.gate[0] < self.gate[1] <= 1:
            raise ValueError(f"gate={self.gate} wants two scores, 0 < low < high <= 1")

    def strength(self, score: Any) -> Any:
        """What a detection's score (or an array of them) counts as a thing that is there, in [0, 1]: 0 below the gate."""
        return np.clip((score - self.gate[0]) / (self.gate[1] - self.gate[0]), 0, 1)

    def worth(self, score: Any) -> Any:
        """What it counts for the target that it is assigned to: the same, with a small slope below the gate."""
        below = self.fallback * np.clip(score / self.gate[0], 0, 1)
        return below + (1 - self.fallback) * self.strength(score)


def layout_parts(found: Sequence[Found], layout: Layout, rule: Rule, aspect: float = 1.0) -> tuple[Tensor, float]:
    """Value of every target and then of every relation (T + R,) in [0, 1]; e, the number of surplus things.

    aspect: width / height of the picture. e is soft: a surplus thing counts by its strength.
    """
    targets = layout.targets
    scores = np.array([f.score for f in found], dtype=float)
    worth = rule.worth(scores)
    names = np.array([f.phrase for f in found], dtype=object)
    allowed = names[:, None] == np.array([t.phrase for t in targets], dtype=object)[None]
    values = _fit(found, targets, rule) * worth[:, None]
    # Among equals the clearest detection is taken, and any detection rather than none.
    taken = {t: p for p, t in assign(values + 1e-6 * (1 + scores[:, None]), allowed)}
    results = [float(values[taken[t], t]) if t in taken else 0.0 for t in range(len(targets))]
    for name, first, second in layout.relations:
        total = 0.0
        for a, b in ((taken[i], taken[j]) for i in first for j in second if i in taken and j in taken):
            boxes = proportioned(found[a].box, aspect), proportioned(found[b].box, aspect)
            total += min(worth[a], worth[b]) * relation_score(*boxes, name, rule.tau)
        results.append(float(total) / (len(first) * len(second)))
    return torch.tensor(results), _surplus(found, set(taken.values()), rule)


def layout_score(found: Sequence[Found], layout: Layout, rule: Rule, aspect: float = 1.0) -> float:
    """Mean of the parts minus the penalty of surplus things, cut to [0, 1]. Arguments as in `layout_parts`."""
    parts, surplus = layout_parts(found, layout, rule, aspect)
    penalty = rule.surplus * surplus / (len(layout.targets) + surplus)
    return min(max(float(parts.mean()) - penalty, 0.0), 1.0)


def _fit(found: Sequence[Found], targets: Sequence[Target], rule: Rule) -> np.ndarray:
    """(P, T) in [0, 1]: how well each box fits each target; 1 where the target has none."""
    boxes = torch.tensor([f.box for f in found], dtype=torch.float64).reshape(-1, 1, 4)
    wanted = torch.tensor([t.box or (0.0, 0.0, 1.0, 1.0) for t in targets], dtype=torch.float64)[None]
    point = point_reward(boxes, wanted, rule.alpha, rule.sigma_min)
    coverage = coverage_reward(boxes, wanted, rule.alpha, rule.sigma_min)
    fit = (rule.point * point + rule.coverage * coverage) / (rule.point + rule.coverage)
    return np.where([t.box is None for t in targets], 1.0, fit.numpy())


def _surplus(found: Sequence[Found], taken: set[int], rule: Rule) -> float:
    """Strength of what no target took, each thing once, however many phrases it answers."""
    boxes = np.array([f.box for f in found], dtype=float).reshape(-1, 4)
    overlap = intersections(boxes, boxes)[0]
    seen, total = list(taken), 0.0
    for p in sorted(set(range(len(found))) - taken, key=lambda p: -found[p].score):
        if not any(overlap[p, q] > SAME for q in seen):
            seen.append(p)
            total += float(rule.strength(found[p].score))
    return total


def read_layout(columns: Mapping[str, Any]) -> Layout | None:
    """From the column `layout`, [{"phrase": "red dog", "box": [x0, y0, x1, y1], "count": 1}, ...], boxes as shares of the sides;
    else from `include` (see `geneval.read_spec`), which knows no boxes but relations; None where there is neither.

    A layout's entry without a box asks for presence only. Raises ValueError for malformed columns.
    """
    if columns.get("layout"):
        return Layout(tuple(target for item in columns["layout"] for target in _targets(item)))
    spec = read_spec(columns)
    if spec is None:
        return None
    targets: list[Target] = []
    members = []
    for clause in spec.include:
        members.append(tuple(range(len(targets), len(targets) + clause.count)))
        targets += [Target(clause.phrase)] * clause.count
    relations = [(c.relation[0], members[i], members[c.relation[1]]) for i, c in enumerate(spec.include) if c.relation]
    included = {clause.name for clause in spec.include}
    unwanted = tuple(c.phrase for c in spec.exclude if c.count == 1 and c.name not in included)
    return Layout(tuple(targets), tuple(relations), unwanted)


def _targets(item: Any) -> list[Target]:
    try:
        phrase, box, count = str(item["phrase"]), item.get("box"), int(item.get("count", 1))
        corners = None if box is None else tuple(float(x) for x in box)
    except (KeyError, TypeError, ValueError, AttributeError):
        example = '{"phrase": "dog", "box": [0.1, 0.2, 0.5, 0.9]}'
        raise ValueError(f"column layout: wants objects like {example}, not {item!r}") from None
    if corners is None:
        return [Target(phrase)] * count
    if len(corners) != 4 or not (0 <= corners[0] < corners[2] <= 1 and 0 <= corners[1] < corners[3] <= 1):
        raise ValueError(f"column layout: the box of {phrase!r} is {list(corners)}, but wants 0 <= x0 < x1 <= 1 and y likewise")
    return [Target(phrase, corners)] * count


@dataclass
class GaussianLayout(Rule):
    """Is everything where the prompt's column `layout` says, or as often as its column `include` says? Abstains without either.

    In [0, 1]. `layout`: [{"phrase": "red dog", "box": [x0, y0, x1, y1], "count": 1}, ...], boxes as shares of its sides;
    without a box only presence counts. `include` as in the reward `geneval`; it knows relations, but no boxes. Two detectors that
    disagree tell a thing from a texture that fools one of them: train on one, evaluate with the other.
    """

    #: tiny (the embedded world), hub id or folder of a zero-shot detector, or "package.module:Class" of your own.
    detector: Any = "tiny"

    name = "layout"
    traits = Traits(columns=("layout", "include"), range=(0, 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.detector = load_detector(self.detector)

    def __call__(self, samples: Samples) -> Tensor:
        """(N,)"""
        scores = [torch.nan if seen is None else layout_score(*seen) for seen in self._see(samples)]
        return torch.tensor(scores, dtype=torch.float32)

    def parts(self, samples: Samples) -> list[Tensor]:
        """Per sample the values of its targets and then of its relations, (T + R,) in [0, 1]; empty where it abstains."""
        return [torch.zeros(0) if seen is None else layout_parts(*seen)[0] for seen in self._see(samples)]

    def _see(self, samples: Samples) -> list[tuple[list[Found], Layout, Rule, float] | None]:
        images = pictures_of(samples, self.name)
        layouts = [read_layout(prompt.columns) for prompt in samples.prompts]
        found = detect_in(self.detector, images, [layout.phrases if layout else [] for layout in layouts])
        aspect = images.shape[-1] / images.shape[-2]
        seen = zip(found, layouts, strict=True)
        return [None if layout is None else (objects, layout, self, aspect) for objects, layout in seen]
