"""Rewards of a clip's consistency and motion, after VBench (arXiv 2311.17982); the arithmetic is in `motion`.

    subject      mean over t >= 2 of (max(0, cos(f_t, f_{t-1})) + max(0, cos(f_t, f_1))) / 2, f: DINO's class token
    background   the same, f: CLIP's picture embedding
    flicker      1 - mean |I_{t+1} - I_t|
    smoothness   how near a frame is to the middle between its neighbours, along the flow
    degree       sigma((s - 1) / softness), s: speed over the speed that VBench counts as motion

A frozen clip has the largest possible value of the first four. So each of them is multiplied by the dynamic degree, unless it is
told to stand alone, and but for prompts that ask for stillness.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.batch import Prompt, Samples
from flowrl.reward_models import motion
from flowrl.reward_models.base import Traits, as_scores, load_reward, traits_of
from flowrl.reward_models.clips import chunked, clips_of, rate_of
from flowrl.reward_models.composite import joint_traits
from flowrl.reward_models.features import load_features

DINO, CLIP = "facebook/dino-vitb16", "openai/clip-vit-base-patch32"  #: The encoders of VBench.
#: VBench's least and greatest value of each dimension, between which its table puts 0 and 1.
BOUNDS = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flicker": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
}


class DynamicDegree:
    """How surely VBench would say that the clip moves: sigma((s - 1) / softness), in (0, 1), s the speed over its threshold.

    Of each pair of frames (about 8 a second) the mean of the 5 % fastest pixels counts, and s is the speed that a quarter of the
    frames reach; the threshold is 6 pixels at 256. A frozen clip has sigma(-1 / softness): 0.018.
    """

    def __init__(
        self,
        fps: float | None = None,  #: Frames per second of the clips; unset: as the samples say.
        #: lucas_kanade, a closed form; raft, which wants `weights`; or package.module:function, (a, b) -> u in pixels.
        flow: Any = "lucas_kanade",
        weights: str | None = None,  #: File of torchvision's RAFT, large or small.
        softness: float = 0.25,  #: Of the step at the threshold; 0: VBench's own 0 or 1, without gradient.
        side: int = 128,  #: Pixels to which the shorter side of larger clips is reduced before motion is measured.
        held: bool = True,  #: Speeds count by the square of what they explain, or else noise counts as motion, as with VBench.
    ):
        if softness < 0 or side < 16:
            raise ValueError(f"dynamic_degree: softness={softness} must be 0 or more, side={side} at least 16")
        self.flow = motion.load_flow(flow, weights)
        self.name, self.fps, self.softness, self.side = "dynamic_degree", fps, softness, side
        self.held = held
        needs = ("clips", "fps") if fps is None else ("clips",)
        self.traits = Traits(needs=needs, range=(0.0, 1.0), differentiable=softness > 0)

    def __call__(self, samples: Samples) -> Tensor:
        clips = reduced(clips_of(samples, self.name, frames=2), self.side)
        fps = rate_of(samples, self.fps, self.name)
        speed = chunked(lambda part: motion.degree(part, self.flow, fps, self.held), clips)
        return ((speed - 1) / self.softness).sigmoid() if self.softness else (speed > 1).float()


class Paired:
    """What must not stand alone: a value of clips (N,) in [0, 1], times the motion in them."""

    def __init__(self, name: str, frames: int, moves: Any, scaled: bool, traits: Traits):
        self.name, self.frames, self.bounds = name, frames, BOUNDS[name] if scaled else (0.0, 1.0)
        self.of = [] if moves in (None, "none") else [load_reward(moves)]
        for gate in self.of:
            if min(traits_of(gate).range) < 0 or max(traits_of(gate).range) > 1:
                raise ValueError(f"{name}: moves={gate.name} has values in {list(traits_of(gate).range)}, not in [0, 1]")
        upper = (1.0 - self.bounds[0]) / (self.bounds[1] - self.bounds[0])
        inner = joint_traits(self.of) if self.of else traits
        self.traits = Traits(
            needs=tuple(dict.fromkeys((*traits.needs, *inner.needs))),
            range=(0.0, upper),
            differentiable=traits.differentiable and inner.differentiable,
            licence=traits.licence,
        )

    def __call__(self, samples: Samples) -> Tensor:
        clips = clips_of(samples, self.name, self.frames)
        low, high = self.bounds
        value = ((chunked(self.values, clips) - low) / (high - low)).clamp(min=0)
        for gate in self.of:
            share = as_scores(gate(samples), len(samples), gate.name).to(value)
            value = value * torch.where(torch.tensor([still(p) for p in samples.prompts], device=value.device), 1.0, share)
        return value

    def values(self, clips: Tensor) -> Tensor:
        """(n, F, 3, H, W) in [0, 1] -> (n,) in [0, 1], with graph."""
        raise NotImplementedError


class SubjectConsistency(Paired):
    """Does the subject stay the same? Cosines of DINO features with the frame before and with the first, times the motion.

    Encoders of this library see the middle square of a wide clip; VBench's DINO sees all of it.
    """

    def __init__(
        self,
        features: Any = DINO,  #: Encoder: hub id or folder of a vision transformer or dual encoder, an embedded one, or pixels.
        #: A reward in [0, 1] that multiplies it, as dynamic_degree or {name: dynamic_degree, fps: 16}; none: it stands alone, and
        #: a frozen clip is best. Prompts with a true column `static`, or of the embedded world that moves nothing, are free.
        moves: Any = "dynamic_degree",
        scaled: bool = False,  #: To VBench's table, where 0.1462 is 0 and 1 is 1.
    ):
        self.features = load_features(features)
        super().__init__("subject_consistency", 2, moves, scaled, _ENCODED)

    def values(self, clips: Tensor) -> Tensor:
        return consistency(self.features, clips)


class BackgroundConsistency(Paired):
    """Does the scene stay the same? Cosines of CLIP features with the frame before and with the first, times the motion."""

    def __init__(
        self,
        features: Any = CLIP,  #: Encoder: hub id or folder of a vision transformer or dual encoder, an embedded one, or pixels.
        #: A reward in [0, 1] that multiplies it, as dynamic_degree or {name: dynamic_degree, fps: 16}; none: it stands alone, and
        #: a frozen clip is best. Prompts with a true column `static`, or of the embedded world that moves nothing, are free.
        moves: Any = "dynamic_degree",
        scaled: bool = False,  #: To VBench's table, where 0.2615 is 0 and 1 is 1.
    ):
        self.features = load_features(features)
        super().__init__("background_consistency", 2, moves, scaled, _ENCODED)

    def values(self, clips: Tensor) -> Tensor:
        return consistency(self.features, clips)


class TemporalFlicker(Paired):
    """1 - mean absolute difference of neighbouring frames, times the motion.

    What moves differs too: VBench asks this of clips that ought to stand still.
    """

    def __init__(
        self,
        #: A reward in [0, 1] that multiplies it, as dynamic_degree or {name: dynamic_degree, fps: 16}; none: it stands alone, and
        #: a frozen clip is best. Prompts with a true column `static`, or of the embedded world that moves nothing, are free.
        moves: Any = "dynamic_degree",
        scaled: bool = False,  #: To VBench's table, where 0.6293 is 0 and 1 is 1.
    ):
        super().__init__("temporal_flicker", 2, moves, scaled, _PLAIN)

    def values(self, clips: Tensor) -> Tensor:
        return motion.flicker(clips)


class MotionSmoothness(Paired):
    """1 - mean absolute difference between a frame and the middle of its neighbours along the flow, times the motion.

    VBench asks a network for the middle frame, whose licence bars commerce; here it is two warped pictures, so that the numbers
    are of the same kind and not the same.
    """

    def __init__(
        self,
        #: lucas_kanade, a closed form; raft, which wants `weights`; or package.module:function, (a, b) -> u in pixels.
        flow: Any = "lucas_kanade",
        weights: str | None = None,  #: File of torchvision's RAFT, large or small.
        side: int = 128,  #: Pixels to which the shorter side of larger clips is reduced before motion is measured.
        #: A reward in [0, 1] that multiplies it, as dynamic_degree or {name: dynamic_degree, fps: 16}; none: it stands alone, and
        #: a frozen clip is best. Prompts with a true column `static`, or of the embedded world that moves nothing, are free.
        moves: Any = "dynamic_degree",
        scaled: bool = False,  #: To VBench's table, where 0.706 is 0 and 0.9975 is 1; made for its own interpolator.
    ):
        self.flow, self.side = motion.load_flow(flow, weights), side
        super().__init__("motion_smoothness", 3, moves, scaled, _PLAIN)

    def values(self, clips: Tensor) -> Tensor:
        return motion.smoothness(reduced(clips, self.side), self.flow)


_PLAIN = Traits(needs=("clips",), differentiable=True)
_ENCODED = Traits(needs=("clips",), differentiable=True, licence="see the card of its encoder")


def consistency(features: Any, clips: Tensor) -> Tensor:
    """(n,) in [0, 1]: the mean over frames t >= 2 of their cosines with the frame before and the first, negative ones as 0."""
    f = F.normalize(features.pictures(clips.flatten(0, 1)).float(), dim=-1).unflatten(0, clips.shape[:2])
    before, first = ((f[:, 1:] * other).sum(-1).clamp(min=0) for other in (f[:, :-1], f[:, :1]))
    return ((before + first) / 2).mean(1)


def reduced(clips: Tensor, side: int) -> Tensor:
    """Clips (N, F, 3, H, W) whose shorter side is at most `side` pixels, by area, with graph."""
    height, width = clips.shape[-2:]
    scale = side / min(height, width)
    if scale >= 1:
        return clips.float()
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    return F.interpolate(clips.flatten(0, 1).float(), size, mode="area").unflatten(0, clips.shape[:2])


def still(prompt: Prompt) -> bool:
    """Does the prompt ask for stillness: by a true column `static`, or as the embedded world does, by what each object does?"""
    items = prompt.columns.get("include")
    stands = isinstance(items, list) and bool(items) and all(isinstance(i, dict) and i.get("moves") == "still" for i in items)
    return bool(prompt.columns.get("static")) or stands
