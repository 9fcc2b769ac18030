"""The colours of what a detector found, where it does not tell them itself."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.reward_models.boxes import Box, Found


class ClipColors:
    """Names the colour of boxes with CLIP, as GenEval does: three templates per colour, the nearest of ten colours.

    GenEval greys the background by the object's mask; boxes have no mask, so that the crop is used as it is.
    """

    COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
    TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")

    def __init__(self, place: Any = "openai/clip-vit-large-patch14"):
        from flowrl.reward_models.backbones import ClipBackbone

        self.clip = place if isinstance(place, ClipBackbone) else ClipBackbone.load(place)

    def __call__(self, image: Tensor, boxes: Sequence[Box], name: str) -> list[str]:
        """image: (3, H, W) in [0, 1]; name: what is in all of the boxes. One colour per box."""
        return [self.COLORS[i] for i in self.probabilities(image, boxes, name).argmax(-1).tolist()]

    @torch.no_grad()
    def probabilities(self, image: Tensor, boxes: Sequence[Box], name: str) -> Tensor:
        """Of each of COLORS, (boxes, colours): a softmax of CLIP's logits. Arguments as in a call."""
        height, width = image.shape[-2:]
        crops = []
        for x0, y0, x1, y1 in boxes:
            left, top = min(int(x0 * width), width - 1), min(int(y0 * height), height - 1)
            right, bottom = max(left + 1, round(x1 * width)), max(top + 1, round(y1 * height))
            crop = image[None, :, top:bottom, left:right]
            crops.append(F.interpolate(crop.float(), self.clip.size, mode="bicubic", antialias=True).clamp(0, 1))
        pictures = F.normalize(self.clip.pictures(torch.cat(crops)).float(), dim=-1)
        texts = [template.format(color=color, name=name) for color in self.COLORS for template in self.TEMPLATES]
        ways = F.normalize(self.clip.texts(texts).float(), dim=-1).unflatten(0, (len(self.COLORS), len(self.TEMPLATES)))
        return (self.clip.logit_scale * pictures @ F.normalize(ways.mean(1), dim=-1).T).softmax(-1)


class Colors:
    """The colours of detections whose detector does not tell them.

    namer: hub id or folder of a CLIP, loaded when it is first asked, or a function (image (3, H, W), boxes, name) -> colours.
    """

    def __init__(self, namer: Any):
        self.given = namer

    def __call__(self, image: Tensor, found: Sequence[Found], names: Container[str]) -> list[Found]:
        """All of them, those of these names with a colour."""
        named = list(found)
        for name in dict.fromkeys(f.phrase for f in found if f.color is None and f.phrase in names):
            rows = [i for i, f in enumerate(found) if f.color is None and f.phrase == name]
            for i, color in zip(rows, self.namer(image, [found[i].box for i in rows], name), strict=True):
                named[i] = replace(found[i], color=color)
        return named

    def chances(self, image: Tensor, found: Sequence[Found], name: str, color: str) -> list[float]:
        """How likely each of them, of one name, has the colour: 1 or 0 where somebody names it, else CLIP's probability."""
        boxes = [f.box for f in found if f.color is None]
        if boxes and isinstance(self.namer, ClipColors) and color in ClipColors.COLORS:
            told = iter(self.namer.probabilities(image, boxes, name)[:, ClipColors.COLORS.index(color)].tolist())
            return [next(told) if f.color is None else float(f.color == color) for f in found]
        return [float(f.color == color) for f in self(image, found, [name])]

    @property
    def namer(self) -> Callable[[Tensor, Sequence[Box], str], list[str]]:
        if not callable(self.given):
            self.given = ClipColors(self.given)
        return self.given
