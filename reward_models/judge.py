"""Judges: vision-language models behind a server that say how good a picture is, or which of two is better.

    YesNo       P(yes) to a question about one picture (VQAScore; ArtifactReward with the answer inverted)
    Pairwise    which of two samples of a prompt is better, all pairs in both orders (Pref-GRPO); the reward is the win rate
    Reference   P(yes, it is better) against reference pictures (RewardDance), for several tasks (OneReward)
    Rubric      several scores in words (UnifiedReward); PairwiseRubric: the winner per category (UnifiedReward-Flex)

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

__all__ = ["Pairwise", "PairwiseRubric", "Reference", "Rubric", "YesNo"]

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
    "This picture was made for the prompt: {prompt}\nRate it, each from 1 (worst) to 5 (best), decimals allowed. "
    "End with exactly these lines:\n{lines}"
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
    """Scores from 1 to 5 in words, one line each ("Alignment Score (1-5): 4.5"), weighted mean of (score - 1) / 4, in [0, 1].

    UnifiedReward 2.0 writes its three by itself; `dimensions: [Final]` reads the one of version 1. A sample whose answer lacks a
    score, repeats it differently, or has one outside 1 to 5 abstains.
    """

    #: What is rated, as the lines call it.
    dimensions: tuple[str, ...] = ("Alignment", "Coherence", "Style")
    #: Weight of each dimension; 1 where it is not named.
    weights: dict[str, float] = field(default_factory=dict)
    #: {lines} stands for the lines that end the answer, {prompt} and columns as in `judge`.
    question: str = SCORES
    #: Length of an answer, in tokens.
    max_tokens: int = 1024

    name: ClassVar[str] = "rubric"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dimensions = tuple(self.dimensions)
        check_weights(self.weights, self.dimensions)

    @property
    def traits(self) -> Traits:
        return Traits(columns=columns_of(self.question, "lines"), range=(0.0, 1.0), remote=True, licence="see model card")

    def __call__(self, samples: Samples) -> Tensor:
        lines = "\n".join(f"{name} Score (1-5): <number>" for name in self.dimensions)
        return self.each(samples, self.question, self.value, self.max_tokens, lines=lines)

    def value(self, answer: Answer) -> float:
        scores = read_scores(answer.text, self.dimensions)
        if scores is None:
            return math.nan
        weights = [self.weights.get(name, 1.0) for name in self.dimensions]
        return sum(w * (scores[name] - 1) / 4 for w, name in zip(weights, self.dimensions, strict=True)) / sum(weights)
