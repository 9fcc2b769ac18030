"""Which of two samples is better: Pref-GRPO with a judge, arXiv 2508.20751, and the rubric of UnifiedReward-Flex, 2602.02380."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowrl.batch import Prompt, Samples
from flowrl.reward_models.base import Traits
from flowrl.reward_models.judge_client import Answer, Judge, Order, Picture, check_choice, check_weights, columns_of, fill
from flowrl.reward_models.judge_read import read_rubric, read_winner, word_probability
from flowrl.reward_models.win_rate import Strength, coin, schedule, strengths

BETTER = (
    "Both pictures were made for this prompt: {prompt}\n"
    "Which one follows the prompt more closely and looks better? Answer with one word: {first} or {second}."
)
FLEX = """Both pictures were made for this prompt: {prompt}
Compare them in the categories A (semantic: what the prompt asks for), B (quality: sharpness, structure, defects) and
C (aesthetics: composition, light, style); add a category D if this prompt calls for one of its own. In every category choose
the two or three points that matter for this prompt, and share 10 points between the pictures on each. End with one JSON object:
{"categories": [{"name": "A", "dims": [{"name": "...", "score_1": 0, "score_2": 10}], "cat_winner": "{first}"}],
 "winner": "{first}"}
where a winner is "{first}", "{second}" or "tie"."""


@dataclass(kw_only=True, eq=False)
class Pairwise(Judge):
    """Pref-GRPO, arXiv 2508.20751: samples of one prompt are compared in pairs; the reward is the share of comparisons won.

        w_ij = (P(A | i, j) + 1 - P(A | j, i)) / 2 = 1 - w_ji          r_i = mean over the opponents j of w_ij, in [0, 1]

    The mean over a group is 1/2. A pair of which one order cannot be read is left out: the other order alone would bring back the
    bias that the mean takes out. A sample alone in its group abstains.
    """

    #: {first} and {second} stand for `words`, {prompt} and columns as in `judge`.
    question: str = BETTER
    #: What the two pictures are called.
    words: tuple[str, str] = ("A", "B")
    #: token: from the probabilities of `words` as the first token. text: from the winner that the answer names (1, 0, or 1/2).
    answer: Literal["token", "text"] = "token"
    #: both: every pair twice. random: once, by a coin that depends on the two seeds; half the questions, bias becomes noise.
    order: Order = "both"
    #: Opponents of each sample; unset: the whole group, G (G - 1) / 2 pairs.
    opponents: int | None = None
    #: win_rate, or bradley_terry: log-strengths that account for who the opponents were, for few opponents.
    strength: Strength = "win_rate"
    #: Length of an answer in text, in tokens.
    max_tokens: int = 1024

    name: ClassVar[str] = "pairwise"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.words = (str(self.words[0]), str(self.words[1]))
        for option, known in (("answer", ("token", "text")), ("order", ("both", "random"))):
            check_choice(option, getattr(self, option), known)
        check_choice("strength", self.strength, ("win_rate", "bradley_terry"))
        if self.opponents is not None and self.opponents < 1:
            raise ValueError(f"opponents={self.opponents}: at least 1, or unset for the whole group")

    @property
    def traits(self) -> Traits:
        return Traits(
            arity="group",
            columns=columns_of(self.question, "first", "second"),
            range=(0.0, 1.0) if self.strength == "win_rate" else (-math.inf, math.inf),
            remote=True,
            licence="see model card",
        )

    def __call__(self, samples: Samples) -> Tensor:
        assert samples.images is not None
        wins = self.wins(samples, self.pictures(samples.images))
        rewards = torch.full((len(samples),), torch.nan)
        for places in samples.by_group():
            rewards[places] = strengths(self.strength, wins[places][:, places]).float()
        return rewards

    def wins(self, samples: Samples, pictures: list[Picture]) -> Tensor:
        """(N, N) fp64 in [0, 1], how surely i beats j; NaN where they did not meet or an answer cannot be read."""
        pairs = []
        for places in samples.by_group():
            group = places.tolist()
            for a, b in schedule([samples.seeds[i] for i in group], self.opponents):
                pairs.append((group[a], group[b]))
        asked: list[tuple[int, int]] = []
        questions: list[list[str | Picture]] = []
        for i, j in pairs:
            text = self.text(samples.prompts[i])
            if text is None:
                continue
            for first, second in self.orders(i, j, samples.seeds):
                asked.append((first, second))
                questions.append([f"{self.words[0]}:", pictures[first], f"{self.words[1]}:", pictures[second], text])
        tokens = self.answer == "token"
        answers = self.ask(questions, tokens, 1 if tokens else self.max_tokens)
        wins = torch.full((2, len(samples), len(samples)), torch.nan, dtype=torch.float64)
        for (first, second), p in zip(asked, self.read([self.value(a) for a in answers], answers), strict=True):
            wins[0, first, second], wins[1, second, first] = p, 1 - p
        return wins.mean(0) if self.order == "both" else wins.nanmean(0)

    def text(self, prompt: Prompt) -> str | None:
        return fill(self.question, prompt, first=self.words[0], second=self.words[1])

    def orders(self, i: int, j: int, seeds: list[int]) -> list[tuple[int, int]]:
        if self.order == "both":
            return [(i, j), (j, i)]
        i, j = sorted((i, j), key=lambda k: seeds[k])
        return [(i, j)] if coin(seeds[i], seeds[j]) else [(j, i)]

    def value(self, answer: Answer) -> float:
        """How surely the first of the two wins."""
        if self.answer == "token":
            return word_probability(answer.first, *self.words)
        return read_winner(answer.text, *self.words)


@dataclass(kw_only=True, eq=False)
class PairwiseRubric(Pairwise):
    """UnifiedReward-Flex, arXiv 2602.02380: a pair is compared by criteria that the judge chooses for the prompt.

        w_ij = (w_o overall + w_d mean_c win_c) / (w_o + w_d)

    over the categories A semantic, B quality, C aesthetics, and D if the judge adds one; each win is 1, 0, or 1/2 for a tie.
    """

    question: str = FLEX
    words: tuple[str, str] = ("Image 1", "Image 2")
    #: text: winners are read off the rubric that the answer ends with.
    answer: Literal["token", "text"] = "text"
    #: Of the overall winner (`overall`) and of the mean over categories (`categories`); 1 where not named.
    weights: dict[str, float] = field(default_factory=dict)
    max_tokens: int = 4096

    name: ClassVar[str] = "pairwise_rubric"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("answer", self.answer, ("text",))
        check_weights(self.weights, ("overall", "categories"))

    def value(self, answer: Answer) -> float:
        found = read_rubric(answer.text, *self.words)
        if found is None:
            return math.nan
        overall, categories = found
        w_o, w_d = self.weights.get("overall", 1.0), self.weights.get("categories", 1.0)
        return (w_o * overall + w_d * sum(categories.values()) / len(categories)) / (w_o + w_d)
