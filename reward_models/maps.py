"""SRUM (WayneJin0918/SRUM): where a picture is good. Boxes with scores and one score of the whole become a map.

    M = 1/2;   inside box b of score s_b in [-1, 1]:  M <- max(M, (s_b + 1) / 2);   M <- M (g + 1) / 2,   g in [-1, 1]

That is the published rule ("max"). It hides bad objects: (s + 1) / 2 < 1/2 never counts against the 1/2 below it. By the rule
"min" the lowest score of the boxes over a place decides, and 1/2 holds where there is no box.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.batch import Samples
from flowrl.reward_models.base import Traits
from flowrl.reward_models.boxes import Box, Found, distinct
from flowrl.reward_models.colors import Colors
from flowrl.reward_models.detectors import detect_in, load_detector, pictures_of
from flowrl.reward_models.geneval import Spec, by_name, read_spec, terms

Rule = Literal["min", "max"]


def region_map(boxes: Sequence[Box], scores: Sequence[float], whole: float, size: tuple[int, int], rule: Rule = "min") -> Tensor:
    """M, (h, w) in [0, 1], 1 is good. boxes: (x0, y0, x1, y1) as shares of the sides; scores and whole: in [-1, 1].

    Drawn sharp, at a resolution of its own (`to_grid` makes it coarser): a box covers the pixels whose centres lie in it. Raises
    ValueError for scores outside [-1, 1].
    """
    if not all(-1 <= score <= 1 for score in (*scores, whole)):
        raise ValueError(f"scores of regions lie in [-1, 1], not {[*scores, whole]}")
    h, w = size
    y, x = (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w
    M = torch.full(size, 0.5)
    covered = torch.zeros(size, dtype=torch.bool)
    for (x0, y0, x1, y1), score in zip(boxes, scores, strict=True):
        inside = ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))
        value = torch.full((), (score + 1) / 2)
        if rule == "max":
            M = torch.where(inside, torch.maximum(M, value), M)
        else:
            M = torch.where(inside, torch.where(covered, torch.minimum(M, value), value), M)
        covered |= inside
    return M * (whole + 1) / 2


def to_grid(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, h, w) on the latent grid (N, *size): the mean over each cell, so that small objects keep their share."""
    return F.adaptive_avg_pool2d(maps[:, None], size)[:, 0]


def latent_grid(latents: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of latents (N, C, h, w), (N, C, F, h, w), or packed row by row (N, h w, C), of pictures of a size (H, W).

    Raises ValueError for packed latents that are no grid of the pictures' proportions.
    """
    if latents.ndim > 3:
        return latents.shape[-2], latents.shape[-1]
    tokens, (height, width) = latents.shape[1], size
    h = round((tokens * height / width) ** 0.5)
    if h == 0 or tokens % h or abs(tokens / h - h * width / height) >= 1:
        raise ValueError(f"{tokens} packed latents are no grid of pictures of {width} x {height} pixels")
    return h, tokens // h


def box_scores(found: Sequence[Found], spec: Spec) -> list[float]:
    """Each detection's score in [-1, 1]: the detector's own where the spec asks for the object, its negative where it does not.

    Asked for are as many of a name as the spec counts, those of the right colour and the better ones first; the rest, the
    excluded and those of other names or colours are wrong. An object that the detector cannot name is as wrong as can be.
    """
    right = [False] * len(found)
    for clause in spec.include:
        fitting = [i for i, f in enumerate(found) if f.phrase == clause.name and clause.color in (None, f.color)]
        for i in sorted(fitting, key=lambda i: -found[i].score)[: clause.count]:
            right[i] = True
    certainty = [1.0 if f.phrase == "unknown" else min(max(f.score, 0.0), 1.0) for f in found]
    return [c if good else -c for c, good in zip(certainty, right, strict=True)]


class RegionMap:
    """Which parts of a picture do what its prompt asks: a map for losses that weigh each place; its mean is a score in [0, 1].

    Boxes come from a detector and count as right or wrong by the prompt's column `include` (as in the reward `geneval`). The
    whole is the share of its demands that are met, from -1 to 1. Detections below the threshold are ignored. Prompts without
    `include` abstain, and their map is NaN.
    """

    def __init__(
        self,
        #: tiny (the embedded world), hub id or folder of a zero-shot detector, or "package.module:Class" of your own.
        detector: Any = "tiny",
        rule: Rule = "min",  #: What counts where boxes overlap: the worst of them (min), or the best, as published (max).
        threshold: float = 0.3,  #: Detections count above this score.
        #: Hub id or folder of the CLIP that names colours where the detector does not, or a function
        #: (image (3, H, W), boxes, name) -> colours.
        color: Any = "openai/clip-vit-large-patch14",
    ):
        if rule not in ("min", "max"):
            raise ValueError(f"region_map: rule={rule!r}: choose min or max")
        self.name, self.detector, self.rule, self.threshold = "region_map", load_detector(detector), rule, threshold
        self.colors = Colors(color)
        self.traits = Traits(columns=("include",), range=(0, 1))

    def map(self, samples: Samples) -> Tensor:
        """(N, H, W) in [0, 1] on the CPU, at the pictures' resolution; `to_grid` takes it to the latents'."""
        images = pictures_of(samples, self.name)
        size = (images.shape[-2], images.shape[-1])
        specs = [read_spec(prompt.columns) for prompt in samples.prompts]
        found = detect_in(self.detector, images, [spec.names if spec else [] for spec in specs])
        maps = torch.full((len(samples), *size), torch.nan)
        for i, spec in enumerate(specs):
            if spec is not None:
                strong = [f for f in found[i] if f.score > self.threshold or f.phrase == "unknown"]
                kept = self.colors(images[i], distinct(strong), {clause.name for clause in spec.include if clause.color})
                values = terms(by_name(kept, spec.names, self.threshold), spec, size[1] / size[0])
                whole = 2 * sum(values) / len(values) - 1
                maps[i] = region_map([f.box for f in kept], box_scores(kept, spec), whole, size, self.rule)
        return maps

    def __call__(self, samples: Samples) -> Tensor:
        return self.map(samples).mean((1, 2))
