"""A dual encoder for the embedded world: symmetric cross-entropy of captions and pictures in a batch (CLIP, arXiv 2103.00020).

Every second caption of a batch is one word away from its neighbour, so that the batch's own negatives are hard. Captions that a
picture shows as well as its own ("a star" of a red star) are no negatives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl.config import ConfigError
from flowrl.data import sample_seed
from flowrl.pairs import load_picture
from flowrl.reward_models.backbones import ClipBackbone
from flowrl.reward_models.base import REWARD_FILE
from flowrl.tiny import SIZE
from flowrl.tiny.pairs import captioned_scenes, word_tests
from flowrl.train.rewards.loop import RewardRecipe, Score, positions
from flowrl.train.rewards.losses import accuracy_within

MEAN_STD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  #: Of the pixels: [0, 1] becomes [-1, 1].


def tiny_clip(
    width: int,
    layers: int,
    text_width: int,
    text_layers: int,
    dim: int,
    patch: int = 8,
    size: int = SIZE,
    words: Iterable[str] | None = None,
) -> ClipBackbone:
    """An untrained CLIP with a tokenizer of these words, by default those of the embedded world. Heads are 32 wide."""
    from transformers import CLIPConfig, CLIPModel

    from flowrl.tiny.models import MAX_TOKENS, make_tokenizer

    tokenizer = make_tokenizer(words)
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **_tower(text_width, text_layers),
    }
    vision = {"image_size": size, "patch_size": patch, **_tower(width, layers)}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim)
    return ClipBackbone(CLIPModel(config), tokenizer, *MEAN_STD)


def _tower(width: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 32),
    }


def contrastive_loss(logits: Tensor, shown: Tensor) -> Tensor:
    """Mean over pictures and captions of the cross-entropy of the right partner.

    logits: (B, B), rows are pictures. shown: (B, B) bool, which picture shows which caption: besides the diagonal these are left
    out, being neither right nor wrong.
    """
    logits = logits.masked_fill(shown & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device), -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@dataclass
class Contrastive:
    """Options of the task `clip`."""

    width: int = 96  #: Of the vision tower, a multiple of 32.
    layers: int = 4  #: Of the vision tower.
    text_width: int = 64  #: Of the text tower, a multiple of 32.
    text_layers: int = 2  #: Of the text tower.
    dim: int = 64  #: Of the shared space.
    eval_pictures: int = 4  #: Pictures that the embedded generator draws for each held-out caption; 0 for none.

    module: ClipBackbone = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("width", "text_width"):
            if getattr(self, name) < 32 or getattr(self, name) % 32:
                raise ConfigError(f"task.{name}={getattr(self, name)}: a multiple of 32, the width of a head")

    def prepare(self, recipe: RewardRecipe, device: torch.device) -> nn.Module:
        from flowrl.tiny.pairs import drawn_tests

        if recipe.batch_size % 2:
            raise ConfigError(f"batch_size={recipe.batch_size}: must be even, captions come in pairs")
        self.recipe = recipe
        self.module = tiny_clip(self.width, self.layers, self.text_width, self.text_layers, self.dim).to(device)
        self.words = word_tests(100, seed=recipe.seed + 1)
        self.drawn = drawn_tests(self.eval_pictures) if self.eval_pictures else None
        return self.module

    def batch(self, step: int) -> tuple[Tensor, list[str], Tensor]:
        where = positions(self.recipe)
        images, specs, shown = captioned_scenes(len(where), sample_seed(self.recipe.seed, step, where.start))
        return torch.from_numpy(images), [spec["prompt"] for spec in specs], torch.from_numpy(shown)

    def loss(self, batch: tuple[Tensor, list[str], Tensor]) -> tuple[Tensor, dict[str, float]]:
        images, prompts, shown = batch
        device = self.module.mean.device
        pictures = F.normalize(self.module.pictures(images.to(device)).float(), dim=-1)
        texts = F.normalize(self.module.texts(prompts).float(), dim=-1)
        scale = self.module.model.logit_scale.clamp(max=np.log(100.0)).exp()
        logits = scale * pictures @ texts.T
        alike = torch.arange(len(prompts), device=device).view(-1, 2).flip(1).flatten()  # the caption one word away
        right = (logits.diagonal() > logits.gather(1, alike[:, None])[:, 0]).float().mean()
        return contrastive_loss(logits, shown.to(device)), {"accuracy": float(right.detach()), "scale": float(scale.detach())}

    def _scores(self, images: Any, prompts: list[str]) -> Tensor:
        pictures = torch.cat(
            [self.module.pictures(load_picture(part).to(self.module.mean.device)) for part in torch.as_tensor(images).split(128)]
        )
        return F.cosine_similarity(pictures, self.module.texts(prompts)).cpu()

    def evaluate(self) -> dict[str, Score]:
        """accuracy: of the right caption against one a word away, on held-out captions; then of each kind of caption.
        drawn: of generated pictures, how often one that shows its caption beats one that does not."""
        images, right, wrong = self.words
        wins = self._scores(images, [s["prompt"] for s in right]) > self._scores(images, [s["prompt"] for s in wrong])
        result = {"accuracy": Score.mean(wins)}
        for kind in dict.fromkeys(spec["kind"] for spec in right):
            result[kind] = Score.mean(wins[[spec["kind"] == kind for spec in right]])
        if self.drawn:
            prompts, pictures, strict = self.drawn
            scores = self._scores(pictures.flatten(0, 1), [p for p in prompts for _ in range(pictures.shape[1])]).view(
                strict.shape
            )
            result["drawn"] = Score(*accuracy_within(scores, strict))
        return result

    def save(self, folder: Path) -> None:
        import json

        self.module.save(folder)
        (folder / REWARD_FILE).write_text(json.dumps({"reward": "clip_score", "options": {}}, indent=2) + "\n")

    def describe(self) -> str:
        return DESCRIPTION.format(
            width=self.width, layers=self.layers, text_width=self.text_width, text_layers=self.text_layers, dim=self.dim
        )


DESCRIPTION = """\
A CLIP for the embedded world: the cosine of a picture of coloured shapes and a caption.

A `transformers.CLIPModel` for 64 x 64 pixels in patches of 8: {layers} layers of {width} that see and {text_layers} of
{text_width} that read, with {dim} shared dimensions.

Data: scenes drawn by `flowrl.tiny.render`, anew at every step, for training captions and captions one word away from them; none
is a caption of `split("test")`. Held out are those: `accuracy` is how often the right caption beats one that differs in one word
and is false (100 pictures of each kind; a coin gets 0.5); `drawn` how often, of two pictures that `tiny-sd3` drew for one
caption, the one that shows it beats the one that does not, by the exact verifier.
"""
