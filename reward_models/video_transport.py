"""PISCES, arXiv 2602.01624, of whole clips: `transport` says what its two rewards are for pictures.

VideoTransport       R_q = cos(T(y), x)                        x: embedding of the clip
VideoTokenTransport  R_s = sum_ij P_ij S_ij / sum_ij P_ij      j: patches of all frames

C_ij = [1 - S_ij] + gamma |tau_i - t_j| + eta |pi_i - s_j|     tau_i, pi_i: when and where word i looks by a first plan
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.batch import Samples
from flowrl.reward_models.backbones import cosine
from flowrl.reward_models.base import Traits
from flowrl.reward_models.clips import chunked, clips_of
from flowrl.reward_models.texts import TextMemory
from flowrl.reward_models.transport import TransportMap, token_plan
from flowrl.reward_models.video_text import FRAMES, clip_encoder


class VideoTransport:
    """How near a clip is to where its text is carried among real clips, in [-1, 1]. Differentiable."""

    def __init__(
        self,
        #: What a recipe of the task video_transport wrote; the one that ships, of the embedded world, by default.
        folder: str | Path = "tiny_video_transport",
        frames: int = FRAMES,  #: Frames that an encoder of single pictures looks at, as when the map was fitted.
    ):
        self.map, self.encoder = TransportMap.load(folder, partial(clip_encoder, frames=frames))
        self.name = "video_transport"
        self.traits = Traits(needs=("clips",), range=(-1, 1), differentiable=True, licence="see the card of its encoder")
        self.memory = TextMemory(self.encoder.texts)

    def __call__(self, samples: Samples) -> Tensor:
        x = chunked(self.encoder.pictures, clips_of(samples, self.name))
        y = F.normalize(self.memory(samples.texts, x.device).float(), dim=-1)
        return cosine(self.map.to(x.device)(y), x)


class VideoTokenTransport:
    """How well the words that found a place and a time in the clip fit there, in [-1, 1]. Differentiable, not through the plan.

    A prompt without a word abstains.
    """

    def __init__(
        self,
        #: Dual encoder of pictures: an embedded one, a folder, a hub id; or package.module:Class of your own that sees clips.
        encoder: Any,
        frames: int = FRAMES,  #: Frames that an encoder of single pictures looks at.
        mass: float = 0.9,  #: How much of the words is moved, of 1; the rest, those that fit nowhere, are let go.
        gamma: float = 0.2,  #: What time costs in a second plan, from when the first one found each word; 0 for none.
        eta: float = 0.2,  #: What distance costs in a second plan, from where the first one found each word; 0 for none.
        epsilon: float = 0.05,  #: Weight of the plan's entropy: the larger, the more places share a word.
        published: bool = False,  #: The paper's scheme, in which `mass` is an exponent and not the mass moved.
    ):
        if not 0 < mass <= 1 or (published and mass == 1) or min(gamma, eta) < 0 or epsilon <= 0:
            raise ValueError(
                f"video_token_transport: mass={mass} lies in (0, 1], gamma={gamma} and eta={eta} >= 0, epsilon={epsilon} > 0"
            )
        self.encoder = clip_encoder(encoder, frames)
        self.options: dict[str, Any] = {"mass": mass, "gamma": gamma, "eta": eta, "epsilon": epsilon, "published": published}
        self.name = "video_token_transport"
        self.traits = Traits(needs=("clips",), range=(-1, 1), differentiable=True, licence="see the card of its encoder")

    def __call__(self, samples: Samples) -> Tensor:
        clips, texts = clips_of(samples, self.name), samples.texts
        rows = torch.arange(len(clips)).split(max(1, 64 // clips.shape[1]))
        return torch.cat([self.values(clips[r], [texts[i] for i in r]) for r in rows])

    def values(self, clips: Tensor, prompts: list[str]) -> Tensor:
        """clips: (n, F, 3, H, W); returns (n,) with graph, NaN where the prompt has no word."""
        S, mask = self.similarities(clips, prompts)
        times, places = (value.to(S) for value in self.encoder.layout(clips.shape[1]))
        P = token_plan(S, mask, places, times=times, **self.options)
        score = (P * S.masked_fill(~mask[:, :, None], 0.0)).sum((1, 2)) / P.sum((1, 2))
        return torch.where(mask.any(1), score, torch.nan)

    def similarities(self, clips: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Cosines of words and of patches of all frames (n, L, M), and which of the L places are words."""
        patches = F.normalize(self.encoder.patches(clips).float(), dim=-1)
        states, mask = self.encoder.words(prompts)
        return F.normalize(states.to(patches.device).float(), dim=-1) @ patches.transpose(1, 2), mask.to(patches.device)
