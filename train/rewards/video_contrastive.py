"""A dual encoder for the embedded world of clips: the task `clip`, whose pictures are sheets of all frames of a clip.

A clip of nine frames is a picture of three times three, so that a plain CLIP sees what moves, where and how, by the places of its
patches; captions one word apart (left for right, quickly for slowly) make the negatives hard.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl.config import ConfigError
from flowrl.data import sample_seed
from flowrl.reward_models.video_text import SheetEncoder
from flowrl.tiny.clip_captions import captioned_clips, word_tests
from flowrl.tiny.moves import all_specs
from flowrl.train.rewards.contrastive import Contrastive, tiny_clip
from flowrl.train.rewards.loop import RewardRecipe, positions

ROWS, COLUMNS = 3, 3  #: Of a sheet: the frames of an embedded clip.


def tiny_video_clip(width: int, layers: int, text_width: int, text_layers: int, dim: int, side: int = 32) -> SheetEncoder:
    """An untrained CLIP that reads sheets of frames, `side` pixels each, in patches of 8, and the words of the grammar."""
    words = {word for spec in all_specs() for word in re.findall(r"[a-z]+", spec["prompt"])}
    made = tiny_clip(width, layers, text_width, text_layers, dim, patch=8, size=ROWS * side, words=words)
    made.resize = "squash"
    return SheetEncoder(made, ROWS, COLUMNS)


@dataclass
class VideoContrastive(Contrastive):
    """Options of the task `video_clip`."""

    tried_by: ClassVar = "tiny-video-nft"

    eval_pictures: int = 0  #: Not used here.
    side: int = 32  #: Pixels of a frame on the sheet, a multiple of 8.
    held_out: int = 40  #: Held-out clips of each kind of caption.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side < 8 or self.side % 8:
            raise ConfigError(f"task.side={self.side}: a multiple of 8, the width of a patch")

    def prepare(self, recipe: RewardRecipe, device: torch.device) -> nn.Module:
        if recipe.batch_size % 2:
            raise ConfigError(f"batch_size={recipe.batch_size}: must be even, captions come in pairs")
        self.recipe, self.drawn = recipe, None
        self.encoder = tiny_video_clip(self.width, self.layers, self.text_width, self.text_layers, self.dim, self.side).to(device)
        self.module = self.encoder.backbone
        self.words = word_tests(self.held_out, seed=recipe.seed + 1)
        return self.module

    def batch(self, step: int) -> tuple[Tensor, list[str], Tensor]:
        where = positions(self.recipe)
        clips, specs, shown = captioned_clips(len(where), sample_seed(self.recipe.seed, step, where.start))
        return self.encoder.sheet(torch.from_numpy(clips)), [spec["prompt"] for spec in specs], torch.from_numpy(shown)

    def _scores(self, images: Any, prompts: list[str]) -> Tensor:
        clips = torch.as_tensor(images).to(self.module.mean.device)
        seen = torch.cat([self.encoder.pictures(part) for part in clips.split(64)])
        return F.cosine_similarity(seen, self.module.texts(prompts)).cpu()

    def save(self, folder: Path) -> None:
        self.encoder.save(folder)

    def describe(self) -> str:
        return (
            "A dual encoder for the embedded world of clips: the cosine of a clip of moving shapes and a caption. The nine frames"
            f" lie on one sheet of {ROWS} x {COLUMNS}, {self.side} pixels each, in patches of 8, before a"
            f" `transformers.CLIPModel` of {self.layers} layers of {self.width} that see and {self.text_layers} of"
            f" {self.text_width} that read, with {self.dim} shared dimensions.\n\nData: clips drawn by `flowrl.tiny.moves`, anew"
            " at every step, for training captions and captions one word away from them. Held out are captions of"
            f' `split("test")`: how often the right caption beats one that differs in one word and is false ({self.held_out}'
            " clips of each kind; a coin gets 0.5)."
        )
