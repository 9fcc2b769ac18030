"""Rewards that compare a picture with its prompt in one embedding space: CLIPScore, PickScore, HPSv2, aesthetics, and our own.

All are differentiable with respect to the pixels, score clips frame by frame, and read no more of a prompt than their tokenizer
does (they warn about the rest). None needs the wheel of its authors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.batch import Samples
from flowrl.reward_models.backbones import (
    ClipBackbone,
    DualEncoder,
    Frames,
    LinearStack,
    OpenClipBackbone,
    Resize,
    check_frames,
    cosine,
    score_pictures,
)
from flowrl.reward_models.base import REWARD_FILE, Traits, place_of
from flowrl.reward_models.preference_network import PreferenceNetwork
from flowrl.reward_models.texts import PromptLimit, TextMemory
from flowrl.reward_models.weights import fill, find_file, read


@dataclass(frozen=True)
class Preset:
    """Published weights: the hub id, the file in it where it is one, where the tokenizer is if elsewhere."""

    model: str
    file: str = ""
    processor: str = ""
    licence: str = "see model card"

    def licence_of(self, model: str | Path) -> str:
        return self.licence if str(model) == self.model else "see model card"

    def processor_of(self, model: str | Path) -> str:
        """Where the tokenizer is for a copy of these weights."""
        own = not self.processor or (Path(model) / "tokenizer_config.json").is_file()
        return str(model) if own else self.processor


CLIP = Preset("openai/clip-vit-large-patch14", licence="see model card (code: MIT)")
PICKSCORE = Preset(
    "yuvalkirstain/PickScore_v1",
    processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    licence="see model card (code: MIT)",
)
HPS = {
    "2.0": Preset("xswu/HPSv2", "HPS_v2_compressed.pt", licence="see model card (code: Apache-2.0)"),
    "2.1": Preset("xswu/HPSv2", "HPS_v2.1_compressed.pt", licence="see model card (code: Apache-2.0)"),
}
#: The file is that of the authors' repository, sac+logos+ava1-l14-linearMSE.pth, under the name that it has on the hub.
AESTHETIC = Preset("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", licence="see model card (code: Apache-2.0)")


class EmbeddingReward:
    """What the rewards of this file share: an encoder, prompts encoded once, clips by frame, a warning for cut prompts."""

    def __init__(self, name: str, encoder: DualEncoder, frames: Frames, traits: Traits):
        self.name, self.encoder, self.frames, self.traits = name, encoder, check_frames(frames), traits
        self.memory = TextMemory(encoder.texts)
        self.limit = PromptLimit(encoder.context, encoder.lengths)

    def __call__(self, samples: Samples) -> Tensor:
        return score_pictures(self.values, samples, self.frames)

    def values(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(M, 3, H, W) in [0, 1] and M prompts -> (M,), with graph."""
        raise NotImplementedError

    def features(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Of the pictures, with graph, and of the prompts, without: (M, D) each, not normalised."""
        self.limit(self.name, prompts)
        pictures = self.encoder.pictures(images)
        return pictures, self.memory(prompts, images.device)

    @property
    def truncated(self) -> float:
        """Share of the distinct prompts so far that the tokenizer cut, in [0, 1]."""
        return self.limit.share


class ClipScore(EmbeddingReward):
    """cos(picture, prompt): CLIPScore (arXiv 2104.08718) without its factor and its floor. Usually 0.15 to 0.4 with CLIP.

    CLIP's own processor crops the centre, so that the sides of a wide picture are not seen.
    """

    def __init__(
        self,
        model: str | Path = CLIP.model,  #: Folder or hub id of a CLIP, SigLIP or other dual encoder of transformers.
        resize: Resize | None = None,  #: crop, pad or squash; unset: as its processor does.
        frames: Frames = "mean",  #: How a clip's frames count: mean, min (the worst one), or softmin (mostly the worst ones).
        folder: str | Path | None = None,  #: An encoder that `flowrl train-reward` made, in place of `model`.
    ):
        model = place_of(folder or model)
        traits = Traits(range=(-1.0, 1.0), differentiable=True, licence=CLIP.licence_of(model))
        super().__init__("clip_score", ClipBackbone.load(model, resize), frames, traits)

    def values(self, images: Tensor, prompts: list[str]) -> Tensor:
        return cosine(*self.features(images, prompts))


class PickScore(EmbeddingReward):
    """exp(scale) cos(picture, prompt) / 26 by a CLIP-H trained on choices of users (arXiv 2305.01569). Usually 0.7 to 0.9."""

    def __init__(
        self,
        model: str | Path = PICKSCORE.model,  #: Folder or hub id.
        #: Folder or hub id of the tokenizer; unset: the model's folder where it has one, else CLIP-H's, as none was published.
        processor: str | Path | None = None,
        frames: Frames = "mean",  #: How a clip's frames count: mean, min (the worst one), or softmin (mostly the worst ones).
    ):
        traits = Traits(differentiable=True, licence=PICKSCORE.licence_of(model))
        encoder = ClipBackbone.load(model, "crop", processor or PICKSCORE.processor_of(model))
        super().__init__("pickscore", encoder, frames, traits)

    def values(self, images: Tensor, prompts: list[str]) -> Tensor:
        assert isinstance(self.encoder, ClipBackbone)
        return self.encoder.logit_scale * cosine(*self.features(images, prompts)) / 26


class HPSv2(EmbeddingReward):
    """cos(picture, prompt) by a ViT-H-14 trained on rankings (arXiv 2306.09341). Usually 0.2 to 0.36; compare within one prompt.

    The whole picture counts: its long side is resized and the rest padded with black.
    """

    def __init__(
        self,
        version: str | float = "2.1",  #: 2.0 or 2.1, whose scores are not comparable.
        model: str | Path = HPS["2.1"].model,  #: The checkpoint file, a folder that holds it, or its hub id.
        architecture: str = "ViT-H-14",  #: Name of the network in open_clip.
        frames: Frames = "mean",  #: How a clip's frames count: mean, min (the worst one), or softmin (mostly the worst ones).
    ):
        if str(version) not in HPS:
            raise ValueError(f"version={version}: choose 2.0 or 2.1")
        preset = HPS[str(version)]
        traits = Traits(range=(-1.0, 1.0), differentiable=True, licence=preset.licence_of(model))
        super().__init__("hpsv2", OpenClipBackbone.load(architecture, model, preset.file, "pad"), frames, traits)

    def values(self, images: Tensor, prompts: list[str]) -> Tensor:
        return cosine(*self.features(images, prompts))


class Aesthetic(EmbeddingReward):
    """LAION's aesthetic predictor, version 2: a linear head on the normalised CLIP-L feature. 1 to 10, usually 4.5 to 7.

    The prompt does not count.
    """

    def __init__(
        self,
        #: The head's file (sac+logos+ava1-l14-linearMSE.pth), a folder that holds aesthetic-model.pth, or its hub id.
        model: str | Path = AESTHETIC.model,
        clip: str | Path = CLIP.model,  #: Folder or hub id of the CLIP that the head was trained on.
        frames: Frames = "mean",  #: How a clip's frames count: mean, min (the worst one), or softmin (mostly the worst ones).
    ):
        path = find_file(model, AESTHETIC.file)
        encoder = ClipBackbone.load(clip, "crop")
        super().__init__("aesthetic", encoder, frames, Traits(differentiable=True, licence=AESTHETIC.licence_of(model)))
        self.head = LinearStack(encoder.dim).requires_grad_(False)
        fill(self.head, read(path), path)

    def values(self, images: Tensor, prompts: list[str]) -> Tensor:
        features = F.normalize(self.encoder.pictures(images).float(), dim=-1)
        return self.head.to(features.device)(features)


class PreferenceModel(EmbeddingReward):
    """A reward model of our own training: the score of its head, or mean - kappa * standard deviation of a gaussian head."""

    def __init__(
        self,
        folder: str | Path,  #: What `flowrl train-reward tiny-preference`, or another recipe of the task, wrote.
        kappa: float = 0.0,  #: How much doubt costs: standard deviations of a gaussian head that are taken off its mean.
        frames: Frames = "mean",  #: How a clip's frames count: mean, min (the worst one), or softmin (mostly the worst ones).
    ):
        folder = Path(place_of(folder))
        self.network = PreferenceNetwork.load(folder)
        self.kappa = kappa
        if kappa and self.network.head != "gaussian":
            raise ValueError(f"kappa={kappa} wants a gaussian head, and {folder} has the head {self.network.head}")
        licence = json.loads((folder / REWARD_FILE).read_text(encoding="utf-8")).get("licence", "")
        super().__init__("preference", self.network.backbone, frames, Traits(differentiable=True, licence=licence))

    def values(self, images: Tensor, prompts: list[str]) -> Tensor:
        values = self._compare(images, prompts)
        return values if values.ndim == 1 else values[:, 0] - self.kappa * values[:, 1].exp()

    def distribution(self, samples: Samples) -> Tensor:
        """(N, 2): mean and standard deviation of a gaussian head (of clips: over the frames' means)."""
        if self.network.head != "gaussian":
            raise ValueError(f"reward {self.name!r} has no gaussian head")
        values = score_pictures(self._compare, samples)
        return torch.stack([values[:, 0], values[:, 1].exp()], dim=1)

    def _compare(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.network.to(images.device).compare(*self.features(images, prompts))
