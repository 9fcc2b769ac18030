"""PISCES, arXiv 2602.01624, of clips: the task `transport` between embeddings of texts and of whole clips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl.clip_pairs import load_clip
from flowrl.config import ConfigError
from flowrl.data import load_prompts
from flowrl.reward_models.video_text import FRAMES, SheetEncoder, clip_encoder
from flowrl.tiny.moves import random_spec, render_clip, sample_clip
from flowrl.train.rewards.transport import Transport


@dataclass
class VideoTransport(Transport):
    """Options of the task `video_transport`."""

    pairs: str = "tiny"  #: `tiny` draws clips; else a .jsonl file of {"prompt": ..., "video": path}, relative to the file.
    frames: int = FRAMES  #: Frames that an encoder of single pictures looks at.

    def _encoder(self) -> Any:
        return clip_encoder(self.backbone, self.frames)

    def _drawn(self, count: int, split: str, rng: np.random.Generator) -> tuple[Tensor, Tensor, list[str]]:
        specs = [random_spec(rng, split) for _ in range(count)]
        prompts = [spec["prompt"] for spec in specs]
        return self._embedded((torch.from_numpy(render_clip(sample_clip(spec, rng), rng)) for spec in specs), prompts)

    def _read(self) -> tuple[Tensor, Tensor, list[str]]:
        rows = load_prompts(self.pairs)
        if not all(isinstance(row.columns.get("video"), str) for row in rows):
            raise ConfigError(f'task.pairs={self.pairs}: every line wants a "video", the path of a clip')
        files = [Path(self.pairs).parent / row.columns["video"] for row in rows]
        return self._embedded((load_clip(file)[0] for file in files), [row.text for row in rows])

    def _facts(self) -> dict[str, Any]:
        sheet = {"sheet": [self.encoder.rows, self.encoder.columns]} if isinstance(self.encoder, SheetEncoder) else {}
        return {"reward": "video_transport", "options": {"frames": self.frames}, **sheet}

    def describe(self) -> str:
        return super().describe().replace("picture", "clip").replace("drawn scenes", "drawn clips")
