"""Clips and texts in one space: what a dual encoder of pictures says of whole clips, and the reward that is their cosine.

    frames      the mean of the frames' embeddings: sees what is there, and not in which order
    sheet       all frames on one picture, side by side and line by line: its places are times, and order is seen

An encoder of one's own (InternVideo2, ViCLIP, ...) is an object, or "package.module:Class", with `pictures(clips) -> (n, D)` and
`texts(prompts) -> (n, D)`; for plans between words and patches also `patches(clips) -> (n, M, D)`,
`words(prompts) -> (n, L, D), (n, L)` and `layout(frames) -> (M,), (M, 2)`.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl.batch import Samples
from flowrl.reward_models.backbones import ClipBackbone, cosine
from flowrl.reward_models.base import REWARD_FILE, Traits, embedded_folder
from flowrl.reward_models.clips import chunked, clips_of
from flowrl.reward_models.features import load_backbone
from flowrl.reward_models.texts import PromptLimit, TextMemory
from flowrl.reward_models.transport import places

FRAMES = 8  #: Of a clip that an encoder of single pictures looks at, unless told otherwise.


def spread(clips: Tensor, count: int) -> Tensor:
    """`count` frames of clips (n, F, 3, H, W), evenly from the first to the last; frames repeat where there are fewer."""
    return clips[:, torch.linspace(0, clips.shape[1] - 1, count).round().long()]


class FramesEncoder(nn.Module):
    """A dual encoder of pictures, frame by frame. count: frames that it looks at."""

    def __init__(self, backbone: ClipBackbone, count: int = FRAMES):
        super().__init__()
        self.backbone, self.count = backbone, count

    @property
    def dim(self) -> int:
        return self.backbone.dim

    @property
    def mean(self) -> Tensor:
        return self.backbone.mean

    def pictures(self, clips: Tensor) -> Tensor:
        """(n, F, 3, H, W) in [0, 1] -> (n, D), the mean of the frames' unit embeddings, with graph."""
        seen = spread(clips, self.count)
        return F.normalize(self.backbone.pictures(seen.flatten(0, 1)).float(), dim=-1).unflatten(0, seen.shape[:2]).mean(1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(n, D), not normalised."""
        return self.backbone.texts(prompts)

    def patches(self, clips: Tensor) -> Tensor:
        """(n, F, 3, H, W) -> (n, M, D): patches of the frames, in the space of the words, with graph."""
        seen = spread(clips, self.count)
        states = self.backbone.shared(self.backbone.patches(seen.flatten(0, 1)), "patches")
        return states.unflatten(0, seen.shape[:2]).flatten(1, 2)

    def words(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(n, L, D) in the space of the patches, and which of the L places are words."""
        states, mask = self.backbone.words(prompts)
        return self.backbone.shared(states, "words"), mask

    def layout(self, frames: int) -> tuple[Tensor, Tensor]:
        """When (M,) and where (M, 2) the patches of a clip are, in [0, 1]; from first frame to last. frames: of the clip."""
        cells = places(*self.backbone.grid)
        times = torch.linspace(0, 1, self.count) if self.count > 1 else torch.zeros(1)
        return times.repeat_interleave(len(cells)), cells.repeat(self.count, 1)

    def save(self, folder: str | Path) -> None:
        """The encoder's own files; `clip_encoder` of them is this."""
        self.backbone.save(folder)


class SheetEncoder(FramesEncoder):
    """The frames as one picture of `rows` times `columns`; a patch lies in one frame, and its place on the sheet is its time."""

    def __init__(self, backbone: ClipBackbone, rows: int, columns: int):
        super().__init__(backbone, rows * columns)
        if backbone.grid[0] % rows or backbone.grid[1] % columns:
            raise ValueError(f"sheet={rows}x{columns}: the encoder's {backbone.grid} patches do not divide into as many frames")
        self.rows, self.columns = rows, columns

    def sheet(self, clips: Tensor) -> Tensor:
        """(n, F, 3, H, W) -> (n, 3, rows H, columns W), frames line by line."""
        x = spread(clips, self.count).unflatten(1, (self.rows, self.columns))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def pictures(self, clips: Tensor) -> Tensor:
        return self.backbone.pictures(self.sheet(clips))

    def patches(self, clips: Tensor) -> Tensor:
        return self.backbone.shared(self.backbone.patches(self.sheet(clips)), "patches")

    def layout(self, frames: int) -> tuple[Tensor, Tensor]:
        at = places(*self.backbone.grid) * torch.tensor([self.rows, self.columns])
        cell = at.floor()
        times = (cell[:, 0] * self.columns + cell[:, 1]) / max(1, self.count - 1)
        return times, at - cell

    def save(self, folder: str | Path) -> None:
        """Beside the encoder's own files, reward.json says how the sheet is laid out."""
        super().save(folder)
        card = {"reward": "video_text", "options": {}, "sheet": [self.rows, self.columns]}
        (Path(folder) / REWARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def clip_encoder(spec: Any, frames: int = FRAMES) -> Any:
    """A dual encoder of pictures by an embedded name, a folder or a hub id, as an encoder of clips; or one of the user's own.

    frames: that are looked at, where the folder does not say that it reads sheets. Raises ValueError where there is none.
    """
    from flowrl.reward_models import EMBEDDED

    if hasattr(spec, "pictures"):
        return spec
    if isinstance(spec, str) and ":" in spec and "/" not in spec and "\\" not in spec:
        try:
            return pkgutil.resolve_name(spec)()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"encoder={spec!r} cannot be imported: {error}") from None
    if frames < 1:
        raise ValueError(f"frames={frames}: one at least")
    backbone = load_backbone(spec)
    place = embedded_folder(str(spec)) if str(spec) in EMBEDDED else Path(spec)
    card = place / REWARD_FILE
    sheet = json.loads(card.read_text(encoding="utf-8")).get("sheet") if card.is_file() else None
    return SheetEncoder(backbone, *sheet) if sheet else FramesEncoder(backbone, frames)


class VideoText:
    """cos(clip, prompt) of a dual encoder: the video reward of T2V-Turbo, with an encoder of one's choice. Differentiable.

    An encoder of pictures sees what is in the frames, and nothing of their order.
    """

    def __init__(
        self,
        #: Dual encoder of pictures: an embedded one, a folder, a hub id; or package.module:Class of your own that sees clips.
        encoder: Any = "openai/clip-vit-large-patch14",
        frames: int = FRAMES,  #: Frames that it looks at, evenly spread.
        folder: str | Path | None = None,  #: What `flowrl train-reward` wrote, in place of `encoder`.
    ):
        self.encoder = clip_encoder(folder or encoder, frames)
        self.name = "video_text"
        self.traits = Traits(needs=("clips",), range=(-1.0, 1.0), differentiable=True, licence="see the card of its encoder")
        self.memory = TextMemory(self.encoder.texts)
        backbone = getattr(self.encoder, "backbone", None)
        self.limit = PromptLimit(backbone.context, backbone.lengths) if backbone is not None else None

    def __call__(self, samples: Samples) -> Tensor:
        clips = clips_of(samples, self.name)
        if self.limit is not None:
            self.limit(self.name, samples.texts)
        seen = chunked(self.encoder.pictures, clips)
        return cosine(self.memory(samples.texts, seen.device), seen)
