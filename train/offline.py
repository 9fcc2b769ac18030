"""Data in place of rollouts: preference pairs, or pictures with captions, as latents in the rows that objectives read.

pairs       two rows each, the preferred one first: advantages 1 and -1, times the pair's weight; ties are left out
pictures    one row each, advantage 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl.batch import Prompt, Samples
from flowrl.config import ConfigError, Recipe
from flowrl.data import sample_seed
from flowrl.pairs import Source, load_pairs, load_picture
from flowrl.policy import Policy
from flowrl.train.objectives.base import Needs

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass
class Data:
    """Rows of data by item: `rows` pictures each. Latents are kept once they were encoded."""

    items: list[tuple[Source, ...]]
    prompts: list[Prompt]
    weights: list[float]
    skipped: int = 0  #: Ties.
    latents: dict[int, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.items[0])

    @classmethod
    def load(cls, source: str, needs: Needs) -> Data:
        """Raises ConfigError, with file and row, for what cannot be read, and for an objective that has no use for data."""
        if needs.points != "noised":
            raise ConfigError(
                f"data={source}: this objective learns from its own samples; those that take data: dpo, kto, sft, ..."
            )
        folder = Path(source)
        captioned = sorted(p for p in folder.glob("*") if p.suffix.lower() in PICTURES and p.with_suffix(".txt").is_file())
        try:
            if folder.is_dir() and captioned:
                texts = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in captioned]
                data = cls([(path,) for path in captioned], [Prompt(text) for text in texts], [1.0] * len(texts))
            else:
                data = cls._of_pairs(source)
        except (OSError, ValueError) as error:
            raise ConfigError(f"data: {error}") from None
        if needs.unit == "pair" and data.rows != 2:
            raise ConfigError(f"data={source}: this objective compares two pictures of a prompt, and these are single pictures")
        return data

    @classmethod
    def _of_pairs(cls, source: str) -> Data:
        pairs = load_pairs(source)
        strict = [pair for pair in pairs if pair.label != 0.5]
        if not strict:
            raise ValueError(f"all {len(pairs)} pairs of {source} are ties: they teach nothing")
        ordered = [(p.first, p.second) if p.label > 0.5 else (p.second, p.first) for p in strict]
        weights = [p.weight * abs(2 * p.label - 1) for p in strict]
        return cls(list(ordered), [Prompt(p.prompt) for p in strict], weights, len(pairs) - len(strict))

    def batch(self, places: Sequence[tuple[int, int]], policy: Policy, recipe: Recipe, step: int) -> tuple[Samples, Tensor]:
        """The items at (position in the step, number of the item), as rows of samples, and their advantages."""
        latents = torch.cat([self._encoded(item, policy) for _, item in places])
        rows = [(position, item, row) for position, item in places for row in range(self.rows)]
        signs = [self.weights[item] * (1 if row == 0 else -1) for _, item, row in rows]
        samples = Samples(
            [self.prompts[item] for _, item, _ in rows],
            [sample_seed(recipe.seed, step, position, row) for position, _, row in rows],
            torch.tensor([step * recipe.prompts_per_step + position for position, _, _ in rows]),
            latents.to(policy.device),
        )
        return samples, torch.tensor(signs)

    def _encoded(self, item: int, policy: Policy) -> Tensor:
        if item not in self.latents:
            pictures = [load_picture(source) for source in self.items[item]]
            size = (int(policy.call.get("height", pictures[0].shape[-2])), int(policy.call.get("width", pictures[0].shape[-1])))
            pictures = [_resized(picture, size) for picture in pictures]
            self.latents[item] = policy.latents_of(torch.stack(pictures).to(policy.device)).cpu()
        return self.latents[item]


def _resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Scaled to cover (height, width), and its middle: what a pipeline of this size can draw."""
    if picture.shape[-2:] == size:
        return picture
    scale = max(size[0] / picture.shape[-2], size[1] / picture.shape[-1])
    shape: Any = [max(side, round(own * scale)) for side, own in zip(size, picture.shape[-2:], strict=True)]
    grown = torch.nn.functional.interpolate(picture[None], shape, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = ((own - side) // 2 for side, own in zip(size, grown.shape[-2:], strict=True))
    return grown[..., top : top + size[0], left : left + size[1]]
