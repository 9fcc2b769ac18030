"""Frozen features of pictures, for rewards that compare sets of them: dual encoders, DINO, or plain pixels.

All have `dim`, `pictures(images) -> (N, dim)`, and `patches(images)` whose `shared` form (N, M, dim) lies in the same space.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl.reward_models.backbones import ClipBackbone, Resize, per_frame, resized
from flowrl.reward_models.base import place_of
from flowrl.reward_models.weights import located, unreachable

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class PixelFeatures:
    """The picture at 8 x 8 pixels, and its 16 parts at 8 x 8 pixels each: no weights, for first trials and tests."""

    dim, grid = 3 * 8 * 8, (4, 4)

    def pictures(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.float(), 8).flatten(1)

    def patches(self, images: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(images.float(), 32)
        return F.unfold(small, kernel_size=8, stride=8).transpose(1, 2)

    def shared(self, states: Tensor, of: str = "patches") -> Tensor:
        return states


class VisionBackbone(nn.Module):
    """A vision transformer of transformers with a class token (DINOv2, ViT, ...): its last states, after the norm."""

    def __init__(self, model: Any, mean: Any, std: Any, resize: Resize = "crop"):
        super().__init__()
        self.model, self.resize = model.eval(), resize
        size = model.config.image_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.grid = (self.size[0] // model.config.patch_size, self.size[1] // model.config.patch_size)
        self.dim = int(model.config.hidden_size)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @classmethod
    def load(cls, place: str | Path, resize: Resize = "crop") -> VisionBackbone:
        """From a folder or a hub id."""
        from transformers import AutoImageProcessor, AutoModel

        pixels = AutoImageProcessor.from_pretrained(str(place))
        model = AutoModel.from_pretrained(str(place), dtype=torch.float32)
        return cls(model, pixels.image_mean, pixels.image_std, resize).requires_grad_(False)

    def states(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, 1 + registers + M, dim), with graph."""
        if self.mean.device != images.device:
            self.to(images.device)
        pixels = (resized(images, self.size, self.resize) - self.mean) / self.std
        return self.model(pixel_values=pixels).last_hidden_state

    def pictures(self, images: Tensor) -> Tensor:
        return self.states(images)[:, 0]

    def patches(self, images: Tensor) -> Tensor:
        return self.states(images)[:, -self.grid[0] * self.grid[1] :]

    def shared(self, states: Tensor, of: str = "patches") -> Tensor:
        return states


def load_backbone(place: str | Path) -> ClipBackbone:
    """A dual encoder: one of those that ship (tiny_clip), a folder, or a hub id. Raises ValueError when there is none."""
    return ClipBackbone.load(place_of(place))


def load_features(spec: Any = "tiny_clip") -> Any:
    """ "pixels", the name of an embedded dual encoder, a folder or hub id of a dual encoder or a vision transformer, or features.

    Raises ValueError, in one sentence, when there is no such model.
    """
    if hasattr(spec, "pictures"):
        return spec
    if spec == "pixels":
        return PixelFeatures()
    from flowrl.reward_models import EMBEDDED

    if str(spec) in EMBEDDED:
        return load_backbone(spec)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(located(spec))
        return ClipBackbone.load(spec) if hasattr(config, "text_config") else VisionBackbone.load(spec)
    except OSError as error:
        raise ValueError(f"features={str(spec)!r}: no encoder there: {unreachable(spec, error)}") from None


def embed(features: Any, images: Tensor, chunk: int = 64) -> Tensor:
    """(N, dim) features, of unit length but for pixels, of pictures (N, 3, H, W), or frames' means of clips (N, F, 3, H, W)."""

    def one(part: Tensor) -> Tensor:
        x = per_frame(features.pictures, part).float()
        return x if isinstance(features, PixelFeatures) else F.normalize(x, dim=-1)

    x = torch.cat([one(part) for part in images.split(chunk)])
    return x.mean(1) if images.ndim == 5 else x


def picture_files(folder: str | Path) -> list[Path]:
    """The pictures in a folder and below it, by name. Raises ValueError when there are none."""
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise ValueError(f"there are no pictures ({', '.join(_SUFFIXES)}) in {folder}")
    return files
