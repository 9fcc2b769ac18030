"""What one may ask of a grammar of captions, whichever world they describe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

Spec = dict[str, Any]  #: See `scenes` and `moves`.


class Grammar:
    """Captions of several kinds, as specs: all, those of two fixed splits, a random one, those that differ in one word.

    splits: asked once, for "all", "train" and "test". alike: groups of words that may stand for one another.
    """

    def __init__(self, kinds: Sequence[str], splits: Callable[[], dict[str, list[Spec]]], alike: Sequence[Sequence[str]]):
        self.kinds, self.alike, self._make = kinds, alike, splits

    @cached_property
    def _splits(self) -> dict[str, list[Spec]]:
        return self._make()

    @cached_property
    def _by_prompt(self) -> dict[str, Spec]:
        return {spec["prompt"]: spec for spec in self._splits["all"]}

    def all_specs(self) -> list[Spec]:
        """Every sentence of the grammar; `split` hands out subsets of it."""
        return list(self._splits["all"])

    def split(self, name: str) -> list[Spec]:
        """The specs of "train" or "test": fixed lists, every kind in both, no combination of "test" in "train"."""
        if name not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', not {name!r}")
        return list(self._splits[name])

    def random_spec(self, rng: np.random.Generator, split: str = "train", weights: dict[str, float] | None = None) -> Spec:
        """One spec: the kind by `weights` (default: uniform over the kinds), then uniform within the kind."""
        kinds = list(self.kinds)
        w = np.array([1.0 if weights is None else weights.get(kind, 0.0) for kind in kinds])
        kind = kinds[rng.choice(len(kinds), p=w / w.sum())]
        specs = [spec for spec in self.split(split) if spec["kind"] == kind]
        return specs[rng.integers(len(specs))]

    def neighbours(self, spec: Spec, but: str | None = "test") -> list[Spec]:
        """The captions of the grammar that differ from this one in one word, without those of the split `but`."""
        left_out = {s["prompt"] for s in self.split(but)} if but else set()
        words, found = spec["prompt"].split(), []
        for i, word in enumerate(words):
            others = next((group for group in self.alike if word in group), ())
            found += [" ".join([*words[:i], other, *words[i + 1 :]]) for other in others if other != word]
        return [self._by_prompt[prompt] for prompt in found if prompt in self._by_prompt and prompt not in left_out]
