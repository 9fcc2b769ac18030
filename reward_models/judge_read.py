"""Reading what a judge answered: a word from its tokens; winner, scores or rubric from its text. What is unclear is not guessed.

Of a text, only the part after a model's thoughts (`</think>`) counts, and inside `<answer>` where there is one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

#: The fixed categories of a rubric by what else they are called; anything else is D.
CATEGORIES = {"A": ("semantic", "alignment"), "B": ("quality",), "C": ("aesthetic",)}
#: The least probability that a word is taken to have, so that log-odds stay finite.
LEAST = 1e-9


def word_probability(candidates: Sequence[tuple[str, float]], first: str, second: str, logit: bool = False) -> float:
    """P(first) / (P(first) + P(second)) as the first token of an answer; NaN where neither is among the candidates.

    candidates: (token, log-probability). A word is the sum of its spellings: with and without a space before it, and in any case
    unless it is one letter ("A" is an answer, "a" begins a sentence). logit: log-odds instead, unbounded.

    If only one word is listed, a spelling of the other is at most as likely as the least likely token of the list, and as what
    the list leaves of 1. The smaller of the two stands for it: the answer proves that much certainty, and not more. Read as 0, a
    missing "yes" would be the best score that a question about defects can give.
    """
    one, two = _log_mass(candidates, first), _log_mass(candidates, second)
    if one is None and two is None:
        return math.nan
    if one is None or two is None:
        listed = [math.exp(p) for _, p in candidates]
        bound = math.log(max(min(*listed, 1 - sum(listed)) if len(listed) > 1 else 1 - listed[0], LEAST))
        one, two = bound if one is None else one, bound if two is None else two
    assert one is not None and two is not None
    gap = one - two
    return gap if logit else (1 + math.tanh(gap / 2)) / 2


def yes_probability(candidates: Sequence[tuple[str, float]], logit: bool = False) -> float:
    """P(yes) / (P(yes) + P(no)); see word_probability."""
    return word_probability(candidates, "yes", "no", logit)


def read_winner(text: str, first: str, second: str) -> float:
    """1 or 0 where the last line names the first or the second as the winner, 1/2 for a tie, NaN where it is unclear.

    "Answer: A", "Image 2 is better than Image 1", "It is a tie". One letter must be a capital: "a" begins a sentence.
    """
    lines = [line for line in _final(text).splitlines() if line.strip()]
    if not lines:
        return math.nan
    names = "|".join(re.escape(name) if len(name) == 1 else f"(?i:{re.escape(name)})" for name in (first, second))
    choice = rf"(?<!\w)((?i:(?:an?\s+)?(?:tie|draw))|{names})(?!\w)"
    said = re.findall(rf"{choice}\W+(?i:is(?: the)? (?:better|best|winner)|wins|looks better)", lines[-1])
    said += re.findall(rf"(?i:winner|answer|better|best)(?i:\W+(?:is|one|image|picture))*\W+{choice}", lines[-1])
    verdicts = {_winner(name, first, second) for name in said or re.findall(choice, lines[-1])}
    return verdicts.pop() if len(verdicts) == 1 else math.nan


def read_scores(text: str, dimensions: Sequence[str], scale: tuple[float, float] = (1, 5)) -> dict[str, float] | None:
    """Scores by dimension, from lines like "Style Score (1-5): 3.5" or "**Style**: 4/5"; None unless all are clear.

    NaN is what does not apply ("N/A"). Not clear: missing, off the scale, twice with different numbers, or more than a number
    behind the colon.
    """
    scores: dict[str, float] = {}
    for name in dimensions:
        line = rf"^[^\w\n]*{re.escape(name)}(?:\s+score)?(?:\s*\(\d+\s*[-\u2013]\s*\d+\))?[*_ \t]*:[*_ \t]*"
        found = re.findall(line + r"([^\n]*)$", _final(text), re.IGNORECASE | re.MULTILINE)
        numbers = {_score(rest, scale) for rest in found}
        number = numbers.pop() if len(numbers) == 1 else None
        if number is None:
            return None
        scores[name] = number
    return scores


def read_rubric(text: str, first: str, second: str) -> tuple[float, dict[str, float]] | None:
    """(overall, {category: win}) from the last JSON object with categories and a winner; wins are 1, 0, or 1/2 for the first.

    Categories are known by their letter A to D, or by name, so that "Category A", "A. Semantic" and "semantic alignment" are the
    same one in every pair. One without a winner has that of its points, which must sum to 10. None where the overall winner, A, B
    or C is missing or unclear, or a category stands twice.
    """
    told = [found for found in _objects(_final(text)) if isinstance(found.get("categories"), list)]
    if not told:
        return None
    overall = _winner(told[-1].get("winner"), first, second)
    wins: dict[str, float] = {}
    for category in told[-1]["categories"]:
        if not isinstance(category, dict):
            return None
        slot = _slot(str(category.get("name", "")))
        if slot in wins:
            return None
        named = category.get("cat_winner")
        wins[slot] = _points(category.get("dims")) if named is None else _winner(named, first, second)
    if not CATEGORIES.keys() <= wins.keys() or any(map(math.isnan, (overall, *wins.values()))):
        return None
    return overall, wins


_SPACES = " \t\r\n\u2581\u0120\u010a"  # as SentencePiece and byte-level vocabularies write them


def _log_mass(candidates: Sequence[tuple[str, float]], word: str) -> float | None:
    """Log of the summed probability of a word's spellings; None where none is listed."""

    def canonical(token: str) -> str:
        token = token.strip(_SPACES)
        return token if len(word) == 1 else token.casefold()

    listed = [p for token, p in candidates if canonical(token) == canonical(word)]
    if not listed:
        return None
    largest = max(listed)
    return largest + math.log(sum(math.exp(p - largest) for p in listed))


def _final(text: str) -> str:
    text = text.rpartition("</think>")[2]
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return answers[-1] if answers else text


def _score(text: str, scale: tuple[float, float]) -> float | None:
    """A number on the scale and nothing else, but for what it is out of and what typesets it; NaN for what does not apply."""
    if re.fullmatch(r"(?i:n/a|not applicable)[*_.\s]*", text):
        return math.nan
    number = re.fullmatch(rf"(\d+(?:\.\d+)?)(?:\s*/\s*{scale[1]:g})?[*_.\s]*", text)
    return float(number[1]) if number and scale[0] <= float(number[1]) <= scale[1] else None


def _winner(name: Any, first: str, second: str) -> float:
    """1, 0 or 1/2 for the name of a winner, NaN for anything else."""
    if isinstance(name, bool) or not isinstance(name, str | int):
        return math.nan
    told = str(name).strip().casefold()
    if told in (first.casefold(), "1", "first", "image 1"):
        return 1.0
    if told in (second.casefold(), "2", "second", "image 2"):
        return 0.0
    return 0.5 if re.fullmatch(r"(an? )?(tie|draw|equal)", told) else math.nan


def _slot(name: str) -> str:
    letter = re.match(r"\W*(?i:category\s+)?([A-D])\b", name)
    if letter:
        return letter[1]
    return next((slot for slot, words in CATEGORIES.items() if any(word in name.casefold() for word in words)), "D")


def _points(dims: Any) -> float:
    """The winner by the sum of points, of which each criterion shares out 10."""
    try:
        points = [(float(dim["score_1"]), float(dim["score_2"])) for dim in dims]
    except (TypeError, KeyError, ValueError):
        return math.nan
    if not points or not all(a >= 0 and b >= 0 and abs(a + b - 10) < 1e-6 for a, b in points):
        return math.nan
    lead = sum(a - b for a, b in points)
    return 0.5 if abs(lead) < 1e-6 else float(lead > 0)


def _objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects of a text, whatever stands around them."""
    found, place, decoder = [], text.find("{"), json.JSONDecoder()
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
            found.append(value)
        except (ValueError, RecursionError):
            end = place + 1
        place = text.find("{", end)
    return found
