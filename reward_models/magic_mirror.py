"""MagicMirror, arXiv 2509.10260: what can be wrong with a picture, on three levels, and the rewards made of it.

Level 1: is the picture normal? Level 2: which kind of artifact (`TAXONOMY`'s keys). Level 3: which of its sub-kinds. An assessor
answers in text, `<think>...</think> \\boxed{json}`; `parse` reads it, `assessor_reward` is what the assessor itself is trained
with by reinforcement learning, `cleanliness` is what a picture earns for its assessment, `report` is the benchmark's table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Level 2 -> level 3, by short names. A kind without sub-kinds is its own diagnosis.
TAXONOMY: dict[str, tuple[str, ...]] = {
    "attributes": ("texture", "detail", "proportion", "color"),
    "interaction": ("lighting", "overlap", "position"),
    "human": ("limb", "trunk", "hand", "foot", "face", "multiple", "posture"),
    "animal": ("limb", "posture", "head"),
    "object": (),
    "other": (),
}

#: The assessor's words for them (MagicAssessor-7B's labels), level 2, and level 3 within each.
WORDS: dict[str, str] = {
    "attributes": "L2: Irrational Element Attributes",
    "interaction": "L2: Irrational Element Interaction",
    "human": "L2: Abnormal Human Anatomy",
    "animal": "L2: Abnormal Animal Anatomy",
    "object": "L2: Abnormal Object Morphology",
    "other": "L2: Other Irrationalities",
}
SUB_WORDS: dict[tuple[str, str], str] = {
    ("attributes", "texture"): "L3: Abnormal Material Texture",
    ("attributes", "detail"): "L3: Abnormal Detail Drawing",
    ("attributes", "proportion"): "L3: Abnormal Element Proportion",
    ("attributes", "color"): "L3: Abnormal Color Combination",
    ("interaction", "lighting"): "L3: Abnormal Light and Shadow Effect",
    ("interaction", "overlap"): "L3: Abnormal Element Overlap",
    ("interaction", "position"): "L3: Abnormal Spatial Position",
    ("human", "limb"): "L3: Limb Structure Deformity",
    ("human", "trunk"): "L3: Trunk Structure Deformity",
    ("human", "hand"): "L3: Hand Structure Deformity",
    ("human", "foot"): "L3: Foot Structure Deformity",
    ("human", "face"): "L3: Facial Structure Deformity",
    ("human", "multiple"): "L3: Abnormal Human Anatomy",
    ("human", "posture"): "L3: Abnormal and Uncoordinated Posture",
    ("animal", "limb"): "L3: Abnormal Limb Structure",
    ("animal", "posture"): "L3: Abnormal Posture Presentation",
    ("animal", "head"): "L3: Abnormal Head Structure",
}
_KINDS = {word: name for name, word in WORDS.items()}
_SUB_KINDS = {(kind, word): name for (kind, name), word in SUB_WORDS.items()}
_NORMAL, _TYPES = "Whether Normal", ("Type of Deformity", "Type of Abnormality")  # the released examples use both

#: Cost of each kind in `cleanliness`. Ours, not the paper's: broken bodies and objects are what people reject a picture for;
#: an odd overlap less so; a wrong colour or texture may be style.
COSTS: dict[str, float] = {"human": 1.0, "animal": 1.0, "object": 1.0, "interaction": 0.7, "attributes": 0.5, "other": 0.3}


@dataclass(frozen=True)
class Assessment:
    """What is wrong with one picture: level 2 -> level 3. Empty: normal."""

    artifacts: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, sub_kinds in self.artifacts.items():
            if kind not in TAXONOMY:
                raise ValueError(f"unknown kind of artifact {kind!r}; known are {', '.join(TAXONOMY)}")
            if wrong := set(sub_kinds) - set(TAXONOMY[kind]):
                raise ValueError(f"{sorted(wrong)} are no sub-kinds of {kind!r}, which are {list(TAXONOMY[kind])}")

    @classmethod
    def of(cls, *labels: str) -> Assessment:
        """From labels "kind" or "kind/sub-kind": Assessment.of("object", "attributes/color")."""
        found: dict[str, set[str]] = {}
        for label in labels:
            kind, _, sub_kind = label.partition("/")
            found.setdefault(kind, set()).update({sub_kind} if sub_kind else ())
        return cls({kind: frozenset(sub_kinds) for kind, sub_kinds in found.items()})

    @property
    def normal(self) -> bool:
        return not self.artifacts

    @property
    def labels(self) -> list[str]:
        """ "kind", and "kind/sub-kind" for each sub-kind."""
        subs = [f"{kind}/{sub}" for kind in self.artifacts for sub in sorted(self.artifacts[kind])]
        return [*self.artifacts, *subs]

    @property
    def json(self) -> str:
        """In the assessor's words, as it writes them into the box."""
        if self.normal:
            return json.dumps({_NORMAL: True})
        types = {
            WORDS[kind]: [SUB_WORDS[kind, sub] for sub in sorted(subs)] if TAXONOMY[kind] else True
            for kind, subs in self.artifacts.items()
        }
        return json.dumps({_NORMAL: False, _TYPES[0]: types})


def labels() -> str:
    """All of the assessor's labels, a line each with its sub-labels."""
    subs = {kind: "; ".join(SUB_WORDS[kind, sub] for sub in TAXONOMY[kind]) for kind in TAXONOMY}
    return "\n".join(f"{WORDS[kind]}{f' ({subs[kind]})' if subs[kind] else ''}" for kind in TAXONOMY)


def parse(answer: str) -> Assessment | None:
    """The assessor's answer, or None where its format is wrong.

    Right is: a closed <think> block, then a \\boxed{...} that holds JSON with the key "Whether Normal" alone when that is true,
    and, when it is false, with the known labels beside it: a list of sub-kinds, or anything for kinds that have none.
    """
    thought = re.search(r"<think>.*?</think>", answer, re.DOTALL)
    start = answer.find("\\boxed{", thought.end()) if thought else -1
    if start < 0:
        return None
    try:
        # The JSON object has braces of its own, inside those of the box or instead of them.
        text = answer[start + len("\\boxed{") :].lstrip()
        value, end = json.JSONDecoder().raw_decode(text if text.startswith("{") else "{" + text)
    except ValueError:
        return None
    if text.startswith("{") and not text[end:].lstrip().startswith("}"):
        return None
    return _assessment(value)


def _assessment(value: Any) -> Assessment | None:
    if not isinstance(value, dict) or not isinstance(value.get(_NORMAL), bool):
        return None
    if value[_NORMAL]:
        return Assessment() if len(value) == 1 else None
    types = next((value[name] for name in _TYPES if name in value), None)
    if len(value) != 2 or not isinstance(types, dict) or not types or not set(types) <= set(_KINDS):
        return None
    artifacts = {}
    for word, subs in types.items():
        kind = _KINDS[word]
        if not TAXONOMY[kind]:
            artifacts[kind] = frozenset[str]()
            continue
        if not isinstance(subs, list) or not all((kind, sub) in _SUB_KINDS for sub in subs):
            return None
        artifacts[kind] = frozenset(_SUB_KINDS[kind, sub] for sub in subs)
    return Assessment(artifacts)


# ------------------------------------------------------------------------------------------------ rewards


def assessor_reward(answer: str, truth: Assessment, consistent: bool = True) -> dict[str, float]:
    """The reward of section 4.2 that trains the assessor: r_c (8 format + 4 binary + 2 kinds + 1 sub-kinds), at most 15.

    Parts in [0, 1] and their weighted sum `total`. A wrong format earns nothing; the wrong verdict earns the format alone; a
    normal picture has no kinds to earn with, so at most 12. consistent: does the answer follow from the thought (r_c)? Another
    model judges that; False takes everything away. Sub-kinds count within the kinds that both name, once a kind is earned.
    """
    parts = dict.fromkeys(("format", "binary", "kinds", "sub_kinds"), 0.0)
    found = parse(answer)
    if found is not None and consistent:
        parts["format"] = 1.0
        parts["binary"] = float(found.normal == truth.normal)
        if parts["binary"] and not truth.normal:
            parts["kinds"] = _overlap(set(found.artifacts), set(truth.artifacts))
            if parts["kinds"] > 0:
                both = set(found.artifacts) & set(truth.artifacts)
                parts["sub_kinds"] = _overlap(
                    {(kind, sub) for kind in both for sub in found.artifacts[kind]},
                    {(kind, sub) for kind in both for sub in truth.artifacts[kind]},
                )
    weights = {"format": 8, "binary": 4, "kinds": 2, "sub_kinds": 1}
    return {**parts, "total": sum(weights[name] * value for name, value in parts.items())}


def _overlap(found: set, truth: set) -> float:
    """1 for the same labels, else 0.6 for each hit less 0.3 for each missing or surplus one, within [0, 1]; no hit is 0."""
    hits, wrong = len(found & truth), len(found ^ truth)
    if hits and not wrong:
        return 1.0
    return min(1.0, max(0.0, 0.6 * hits - 0.3 * wrong))


def cleanliness(assessment: Assessment, costs: Mapping[str, float] = COSTS) -> float:
    """Reward of a picture for the generator, in [0, 1]: 1 - the summed cost of its kinds over that of all kinds. Not the paper's.

    Sub-kinds do not count: assessors name them right too seldom (F1 of about 0.3) to be trained on.
    """
    return 1 - sum(costs[kind] for kind in assessment.artifacts) / sum(costs.values())


# ------------------------------------------------------------------------------------------------ report


@dataclass(frozen=True)
class Report:
    """Rates over pictures. count: pictures; valid: those whose assessment could be read; rates: label -> share of the valid."""

    count: int
    valid: int
    rates: Mapping[str, float]

    @property
    def score(self) -> float:
        """Share of normal pictures in percent: MagicBench's overall score."""
        return 100 * (1 - self.rates["artifact"])

    def scores(self) -> dict[str, float]:
        """100 (1 - rate) for the whole and each kind, as MagicBench prints them."""
        return {name: 100 * (1 - self.rates[name]) for name in ("artifact", *TAXONOMY)}

    def as_dict(self) -> dict[str, Any]:
        return {"count": self.count, "valid": self.valid, "score": self.score, "rates": dict(self.rates)}

    def table(self) -> str:
        """The rates as a Markdown table; kinds that never occur have one line, their sub-kinds none."""
        lines = ["| artifact | pictures | share |", "|---|---:|---:|"]
        for name, rate in self.rates.items():
            kind, _, sub = name.partition("/")
            if sub and not rate:
                continue
            lines.append(f"| {'· ' + sub if sub else kind} | {round(rate * self.valid)} | {100 * rate:.1f} % |")
        return "\n".join([*lines, "", f"Score {self.score:.1f} over {self.valid} of {self.count} pictures.", ""])


def report(assessments: Sequence[Assessment | None], missing: Sequence[str | None] | None = None) -> Report:
    """The multi-level report of one model's pictures. None: an assessment that could not be read; it is counted, not guessed.

    missing: per picture, the kind ("human", "animal", "object") of a subject that the prompt asks for and the picture lacks, or
    None; as in MagicBench, that is an artifact of its kind, whatever the assessor says. Raises ValueError for no valid picture.
    """
    lacks = missing if missing is not None else [None] * len(assessments)
    labels = [[kind] if kind else None if found is None else found.labels for found, kind in zip(assessments, lacks, strict=True)]
    valid = [names for names in labels if names is not None]
    if not valid:
        raise ValueError(f"none of the {len(assessments)} assessments can be read")
    counts = {"artifact": sum(bool(names) for names in valid)}
    for kind, subs in TAXONOMY.items():
        for name in (kind, *(f"{kind}/{sub}" for sub in subs)):
            counts[name] = sum(name in names for names in valid)
    return Report(len(assessments), len(valid), {name: count / len(valid) for name, count in counts.items()})
