"""Rewards that need no model: for first steps, for tests, and as distractors that conflict with quality."""

from __future__ import annotations

import io
import math

from torch import Tensor

from flowrl.reward_models.base import Traits


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """Mean of all pixels, in [0, 1]. Differentiable."""
    return images.float().flatten(1).mean(1)


def jpeg_size(images: list, prompts: list[str]) -> list[float]:
    """Minus the size of the picture as JPEG of quality 95, in kilobytes: compressibility (DDPO, arXiv 2305.13301)."""
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=95)
        sizes.append(-buffer.tell() / 1000)
    return sizes


brightness.traits = Traits(range=(0.0, 1.0), differentiable=True)  # type: ignore[attr-defined]
jpeg_size.traits = Traits(range=(-math.inf, 0.0))  # type: ignore[attr-defined]
jpeg_size.pil = True  # type: ignore[attr-defined]
