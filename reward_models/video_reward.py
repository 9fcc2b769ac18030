"""VideoReward (arXiv 2501.13918): Qwen2-VL reads a clip and three criteria, each of which ends in a token of its own.

    r_d = (w_d . h_d - mean_d) / std_d        h_d: last hidden state at the token of d = VQ, MQ, TA
    r   = sum_d weight_d r_d

VQ is visual quality, MQ quality of motion, TA agreement with the text. Attention is causal, and the prompt stands behind the
tokens of VQ and MQ: these two are blind to it. Frames become patches with graph; no file is written or read on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.base import Traits, nearest
from flowrl.reward_models.clips import Once, clips_of, rate_of
from flowrl.reward_models.preference import Preset
from flowrl.reward_models.video_reward_inputs import HEADS, TEMPLATE, TOKENS, Settings, frame_indices, frame_size, read_template
from flowrl.reward_models.video_reward_network import VideoRewardNetwork

__all__ = [
    "HEADS",
    "TEMPLATE",
    "TOKENS",
    "Settings",
    "VideoReward",
    "VideoRewardNetwork",
    "frame_indices",
    "frame_size",
    "read_template",
]

PRESET = Preset("KwaiVGI/VideoReward", licence="see model card (Apache-2.0; code: MIT)")


class VideoReward:
    """Visual quality, quality of motion and agreement with the text of clips, in deviations from the mean of the authors' data.

    Rewards of one folder share its weights, and read the same clips once: `{vq: {name: video_reward, dimensions: VQ}, mq: ...}`
    costs no more than the sum. The published weights were trained with the authors' prompt; the one here says the same in other
    words, so that scores differ from the published ones: `template` takes the original.
    """

    def __init__(
        self,
        model: str | Path = PRESET.model,  #: Folder in the published layout, or its hub id.
        #: VQ, MQ, TA, a list of them, or weights as {VQ: 1, MQ: 0.5}; the scores are added up.
        dimensions: Any = HEADS,
        base: str | Path | None = None,  #: Folder or hub id of the Qwen2-VL; unset: as model_config.json says.
        #: A text file with {text_prompt} and the three tokens in it, or the authors' prompt_template.py, which is not run.
        template: str | Path | None = None,
        fps: float | None = None,  #: Frames per second of the clips; unset: as the samples say.
        sampled_fps: float | None = None,  #: Frames per second that it looks at; unset: as model_config.json says (2).
        num_frames: int | None = None,  #: Frames that it looks at, of any clip, in place of a rate.
        batch_size: int = 4,  #: Clips in one forward pass.
        dtype: str = "bfloat16",  #: Of the weights: float32, bfloat16 or float16.
        folder: str | Path | None = None,  #: What `flowrl train-reward` wrote, in place of `model`.
    ):
        if sampled_fps is not None and num_frames is not None:
            raise ValueError(f"video_reward: sampled_fps={sampled_fps:g} and num_frames={num_frames}: one or the other")
        self.weights = torch.tensor([weights_of(dimensions)[head] for head in HEADS])
        place = folder or model
        names = (str(value) if value is not None else None for value in (base, template))
        self.network = _network(str(place), *names, dtype)
        self.read = _reader(self.network, fps, sampled_fps, num_frames, batch_size)
        self.name = "video_reward"
        timed = num_frames is None and fps is None and (sampled_fps is not None or self.network.settings.num_frames is None)
        needs = ("clips", "fps") if timed else ("clips",)
        self.traits = Traits(needs=needs, differentiable=True, licence=PRESET.licence_of(place))

    def __call__(self, samples: Samples) -> Tensor:
        scores = self.read(samples)
        return (scores * self.weights.to(scores)).sum(1)

    def scores(self, samples: Samples) -> Tensor:
        """VQ, MQ, TA, (N, 3), in deviations from the mean on the authors' clips, with graph."""
        return self.read(samples)


def weights_of(dimensions: Any) -> dict[str, float]:
    """Weights of VQ, MQ and TA, 0 for those that are not named. Raises ValueError for other names."""
    named = (
        dimensions
        if isinstance(dimensions, Mapping)
        else dict.fromkeys([dimensions] if isinstance(dimensions, str) else dimensions, 1.0)
    )
    for name in named:
        if name not in HEADS:
            raise ValueError(f"video_reward: unknown dimension {name!r}{nearest(str(name), HEADS)}")
    if not any(named.values()):
        raise ValueError("video_reward: dimensions names none of VQ, MQ and TA")
    return {head: float(named.get(head, 0.0)) for head in HEADS}


@lru_cache(maxsize=2)
def _network(place: str, base: str | None, template: str | None, dtype: str) -> VideoRewardNetwork:
    return VideoRewardNetwork.load(place, base, template, dtype)


@lru_cache(maxsize=8)
def _reader(network: VideoRewardNetwork, fps: float | None, rate: float | None, count: int | None, batch_size: int) -> Once:
    def read(samples: Samples) -> Tensor:
        clips = clips_of(samples, "video_reward", frames=2)
        timed = count is None and (rate is not None or network.settings.num_frames is None)
        own = rate_of(samples, fps, "video_reward") if timed else None
        network.to(clips.device)
        parts = []
        for rows in torch.arange(len(clips)).split(batch_size):
            seen = [network.sampled(clips[i], own, rate, count) for i in rows]
            parts.append(network(seen, [samples.texts[i] for i in rows]))
        return network.standardised(torch.cat(parts))

    return Once(read)
