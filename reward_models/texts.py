"""Prompts as a text tower sees them: encoded once, and no further than it reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


class PromptLimit:
    """Counts the prompts that a tokenizer cuts, and warns the first time: what is cut off is neither scored nor trained.

    lengths: tokens of each prompt if none were cut. limit: how many the text tower reads.
    """

    def __init__(self, limit: int, lengths: Callable[[Sequence[str]], list[int]]):
        self.limit, self.lengths = limit, lengths
        self.cut: dict[str, bool] = {}

    def __call__(self, name: str, prompts: Sequence[str]) -> None:
        """name: of the reward, for the warning."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.cut]
        if not new:
            return
        warned = any(self.cut.values())
        self.cut |= {prompt: length > self.limit for prompt, length in zip(new, self.lengths(new), strict=True)}
        count = sum(self.cut.values())
        if count and not warned:
            _log.warning(
                "flowrl: reward %s reads %d tokens of a prompt, and %d of the %d prompts so far are longer (%.0f%%); the rest of "
                "them is not scored. First: %r",
                name, self.limit, count, len(self.cut), 100 * self.share, next(p for p in new if self.cut[p])[:80],
            )  # fmt: skip

    @property
    def share(self) -> float:
        """Of the distinct prompts so far, in [0, 1]."""
        return sum(self.cut.values()) / max(1, len(self.cut))


class TextMemory:
    """Features of prompts (N, D) from a frozen text tower, each distinct prompt encoded once; the oldest go first."""

    def __init__(self, encode: Callable[[list[str]], Tensor], keep: int = 16384):
        self.encode, self.keep = encode, keep
        self.known: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        if missing:
            with torch.inference_mode(False), torch.no_grad():  # they outlive the mode of this call
                self.known |= dict(zip(missing, self.encode(missing), strict=True))
        features = torch.stack([self.known[prompt].to(device) for prompt in prompts])
        for prompt in list(self.known)[: max(0, len(self.known) - self.keep)]:
            del self.known[prompt]
        return features
