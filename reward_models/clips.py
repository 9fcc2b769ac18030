"""What rewards of clips share: the clips themselves, their frame rate, and what is read of them once for several rewards."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from flowrl.batch import Prompt, Samples
from flowrl.reward_models.base import RewardError


def clips_of(samples: Samples, name: str, frames: int = 1) -> Tensor:
    """The clips (N, F, 3, H, W). Raises RewardError for pictures, for samples that are not decoded, and for too few frames."""
    if samples.images is None or samples.images.ndim != 5:
        raise RewardError(f"reward {name!r} scores clips (N, F, 3, H, W)")
    if samples.images.shape[1] < frames:
        raise RewardError(f"reward {name!r} wants clips of {frames} frames or more, and these have {samples.images.shape[1]}")
    return samples.images


def rate_of(samples: Samples, fps: float | None, name: str) -> float:
    """Frames per second: of the samples, or the reward's option where they do not say. Raises RewardError where neither says, and
    where they contradict each other."""
    rate = samples.fps if fps is None else fps
    if fps is not None and samples.fps is not None and not math.isclose(fps, samples.fps, rel_tol=0.01):  # 24 and 23.976 are one
        raise RewardError(
            f"reward {name!r} is set to fps={fps:g}, and these clips have {samples.fps:g} frames per second: leave the option out"
        )
    if rate is None:
        raise RewardError(f"reward {name!r} wants the frame rate of the clips: set its option fps")
    if not (math.isfinite(rate) and rate > 0):
        raise RewardError(f"reward {name!r}: fps={rate} is no frame rate")
    return float(rate)


def chunked(function: Callable[[Tensor], Tensor], clips: Tensor, pictures: int = 64) -> Tensor:
    """A function of clips (n, F, 3, H, W) -> (n, ...), a few clips at a time so that long ones fit: (N, ...) fp32."""
    parts = [function(part) for part in clips.split(max(1, pictures // clips.shape[1]))]
    return torch.cat(parts).float() if parts else torch.zeros(0)


class Once:
    """A function of samples whose last result is kept for as long as its samples are: rewards side by side read it once.

    Where a gradient is asked for, or the pictures have changed, it is computed anew.
    """

    def __init__(self, function: Callable[[Samples], Tensor]):
        self.function = function
        self.images: Callable[[], Tensor | None] = lambda: None
        self.key: tuple[int, float | None, list[Prompt]] = (0, None, [])
        self.result = torch.empty(0)

    def __call__(self, samples: Samples) -> Tensor:
        images = samples.images
        if images is None or images.is_inference() or (torch.is_grad_enabled() and images.requires_grad):
            return self.function(samples)
        key = (images._version, samples.fps, samples.prompts)
        if self.images() is not images or self.key != key:
            self.result = self.function(samples)
            self.images, self.key = weakref.ref(images), (*key[:2], list(samples.prompts))
        return self.result.clone()
