"""Judges: vision-language models behind a server that say how good a picture is, or which of two is better.

    YesNo       P(yes) to a question about one picture (VQAScore; ArtifactReward with the answer inverted)
    Pairwise    which of two samples of a prompt is better, all pairs in both orders (Pref-GRPO); the reward is the win rate
    Reference   P(yes, it is better) against reference pictures (RewardDance), for several tasks (OneReward)
    Rubric      several scores in words (UnifiedReward); PairwiseRubric: the winner per category (UnifiedReward-Flex)
    Assessor    which kinds of artifacts a model trained for it names (MagicMirror)

Whatever cannot be read abstains (NaN), and is counted in `unread`; it never becomes a score. Judges favour the picture that they
see first, or last: where two are compared, the mean over both orders cancels that exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.base import Traits
from flowrl.reward_models.judge_client import Answer, Judge, check_weights, columns_of
from flowrl.reward_models.judge_pairs import Pairwise, PairwiseRubric
from flowrl.reward_models.judge_read import read_scores, yes_probability
from flowrl.reward_models.judge_reference import Reference
from flowrl.reward_models.magic_mirror import COSTS, Assessment, cleanliness, labels, parse

__all__ = ["Assessor", "Pairwise", "PairwiseRubric", "Reference", "Rubric", "YesNo"]

#: Questions by name, and whether "yes" is bad news.
PRESETS: dict[str, tuple[str, bool]] = {
    "vqa": ("Does this figure show '{prompt}'? Please answer yes or no.", False),
    "artifact": (
        "Look for defects that a camera or a careful artist would not have left: wrong anatomy, extra or missing limbs, melted "
        "or merged objects, garbled letters, seams, noise or unnatural texture. Does this picture have any? Answer yes or no.",
        True,
    ),
}
SCORES = (
    "This picture was made for the prompt: {prompt}\nRate it, each from {low} (worst) to {high} (best), decimals allowed. "
    "End with exactly these lines:\n{lines}"
)
ASSESS = (
    "Is this picture as a camera or a careful artist would have made it, or does it have artifacts? Think first, inside <think> "
    'and </think>. Then write \\boxed{{"Whether Normal": true}} if nothing is wrong with it, else '
    '\\boxed{{"Whether Normal": false, "Type of Deformity": {...}}} with each label below that applies, and with it the list of '
    "its sub-labels that do, or true where it has none.\n{labels}"
)


@dataclass(kw_only=True, eq=False)
class YesNo(Judge):
    """P(yes) / (P(yes) + P(no)) to a question about each picture, in [0, 1]; the log-odds with `logit`.

    VQAScore (arXiv 2404.01291) asks whether the picture shows the prompt; ArtifactReward (arXiv 2601.03468) takes 1 - P(yes) to
    "are there artifacts?" as a brake on reward hacking.
    """

    #: `vqa`, `artifact`, or a question of your own; {prompt} stands for the prompt, another {word} for that column of its file.
    question: str = "vqa"
    #: "yes" is bad news: the reward is P(no). The presets know.
    invert: bool | None = None
    #: log P(yes)/P(no) instead, unbounded: near 0 and 1, where probabilities saturate, it still tells samples apart.
    logit: bool = False

    name: ClassVar[str] = "judge"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.question not in PRESETS and " " not in self.question.strip():
            raise ValueError(f"question={self.question!r}: a question, or one of {', '.join(PRESETS)}")
        self.question, inverted = PRESETS.get(self.question, (self.question, False))
        self.invert = inverted if self.invert is None else self.invert

    @property
    def traits(self) -> Traits:
        bounds = (-math.inf, math.inf) if self.logit else (0.0, 1.0)
        return Traits(columns=columns_of(self.question), range=bounds, remote=True, licence="see model card")

    def __call__(self, samples: Samples) -> Tensor:
        return self.each(samples, self.question, self.value)

    def value(self, answer: Answer) -> float:
        value = yes_probability(answer.first, self.logit)
        if not self.invert:
            return value
        return -value if self.logit else 1 - value


@dataclass(kw_only=True, eq=False)
class Rubric(Judge):
    """Scores in words, one line each ("Alignment Score (1-5): 4.5"), weighted mean of (score - low) / (high - low), in [0, 1].

    UnifiedReward 2.0 writes its three by itself; `dimensions: [Final]` reads the one of version 1, and `scale: [1, 4]` with
    `dimensions: [text_faithfulness, physical_quality, text_rendering]` those of RationalRewards. What the judge says does not
    apply (N/A) is left out. A sample whose answer lacks a score, repeats it differently, or has one off the scale abstains.
    """

    #: What is rated, as the lines call it.
    dimensions: tuple[str, ...] = ("Alignment", "Coherence", "Style")
    #: Weight of each dimension; 1 where it is not named.
    weights: dict[str, float] = field(default_factory=dict)
    #: The worst and the best score.
    scale: tuple[float, float] = (1, 5)
    #: {low} and {high} stand for the scale, {lines} stands for the lines that end the answer, {prompt} and columns as in `judge`.
    question: str = SCORES
    #: Length of an answer, in tokens.
    max_tokens: int = 1024

    name: ClassVar[str] = "rubric"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dimensions = tuple(self.dimensions)
        check_weights(self.weights, self.dimensions)
        if not 0 <= self.scale[0] < self.scale[1]:
            raise ValueError(f"scale={list(self.scale)}: the worst and the best score, as in [1, 5]")

    @property
    def traits(self) -> Traits:
        columns = columns_of(self.question, "lines", "low", "high")
        return Traits(columns=columns, range=(0.0, 1.0), remote=True, licence="see model card")

    def __call__(self, samples: Samples) -> Tensor:
        low, high = (f"{bound:g}" for bound in self.scale)
        lines = "\n".join(f"{name} Score ({low}-{high}): <number>" for name in self.dimensions)
        return self.each(samples, self.question, self.value, self.max_tokens, lines=lines, low=low, high=high)

    def value(self, answer: Answer) -> float:
        scores = read_scores(answer.text, self.dimensions, self.scale) or {}
        weights = {name: self.weights.get(name, 1.0) for name, score in scores.items() if not math.isnan(score)}
        if not sum(weights.values()) > 0:
            return math.nan
        low, high = self.scale
        return sum(w * (scores[name] - low) / (high - low) for name, w in weights.items()) / sum(weights.values())


@dataclass(kw_only=True, eq=False)
class Assessor(Judge):
    """How free of artifacts a model that was trained to name them calls the picture, in [0, 1] (MagicMirror, arXiv 2509.10260).

    1 - the cost of the kinds that it names over the cost of all. MagicAssessor thinks, then writes labels of two levels as JSON;
    a sample whose answer has another form abstains. `assess` gives the labels themselves, for `magic_mirror.report`.
    """

    #: {labels} stands for the kinds and sub-kinds of artifacts, {prompt} and columns as in `judge`.
    question: str = ASSESS
    #: Of each kind (attributes, interaction, human, animal, object, other); as `magic_mirror.COSTS` has it where it is not named.
    costs: dict[str, float] = field(default_factory=dict)
    #: Length of an answer, in tokens.
    max_tokens: int = 2048

    name: ClassVar[str] = "assessor"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.costs = {**COSTS, **self.costs}
        check_weights(self.costs, tuple(COSTS), "costs")

    @property
    def traits(self) -> Traits:
        return Traits(columns=columns_of(self.question, "labels"), range=(0.0, 1.0), remote=True, licence="see model card")

    def __call__(self, samples: Samples) -> Tensor:
        return self.each(samples, self.question, self.value, self.max_tokens, labels=labels())

    def value(self, answer: Answer) -> float:
        found = parse(answer.text)
        return math.nan if found is None else cleanliness(found, self.costs)

    def assess(self, samples: Samples) -> list[Assessment | None]:
        """What is wrong with each picture; None where nobody was asked or the answer cannot be read."""
        answers = self.answers(samples, self.question, self.max_tokens, labels=labels())
        return [parse(answers[i].text) if i in answers else None for i in range(len(samples))]
