"""PISCES, arXiv 2602.01624, of clips: the task `transport` between embeddings of texts and of whole clips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from flowrl.clip_pairs import load_clip
from flowrl.reward_models.video_text import FRAMES, SheetEncoder, clip_encoder
from flowrl.tiny.moves import GRAMMAR, Spec, render_clip, sample_clip
from flowrl.train.rewards.transport import Transport


@dataclass
class VideoTransport(Transport):
    """Options of the task `video_transport`."""

    tried_by: ClassVar = "tiny-video-nft"
    grammar: ClassVar = GRAMMAR
    column: ClassVar = "video"
    wanted: ClassVar = 'a "video", the path of a clip'

    pairs: str = "tiny"  #: `tiny` draws clips; else a .jsonl file of {"prompt": ..., "video": path}, relative to the file.
    frames: int = FRAMES  #: Frames that an encoder of single pictures looks at.

    def _encoder(self) -> Any:
        return clip_encoder(self.backbone, self.frames)

    def _draw(self, spec: Spec, rng: np.random.Generator) -> np.ndarray:
        return render_clip(sample_clip(spec, rng), rng)

    def _load(self, file: Path) -> Tensor:
        return load_clip(file)[0]

    def _facts(self) -> dict[str, Any]:
        sheet = {"sheet": [self.encoder.rows, self.encoder.columns]} if isinstance(self.encoder, SheetEncoder) else {}
        return {"reward": "video_transport", "options": {"frames": self.frames}, **sheet}

    def describe(self) -> str:
        return super().describe().replace("picture", "clip").replace("drawn scenes", "drawn clips")
