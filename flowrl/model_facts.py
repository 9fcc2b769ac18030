"""What can be told of a model before its weights are loaded: does it draw clips, of how many frames, at what rate, from what.

facts = ModelFacts.read("models/wan")          # of model_index.json, vae/config.json and flowrl.json; None where there are none
facts.draws_clips, facts.fps({})               # True, 16.0
facts.check_frames(34)                         # ConfigError: 33 or 37
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowrl.clips import check_rate
from flowrl.config import ConfigError

DEFAULTS_FILE = "flowrl.json"
#: Arguments by which a pipeline starts from pictures, each a column of the prompts.
CONDITIONS = ("image", "last_image")
#: Frames per second of pipelines that have no argument for it, by the longest beginning of the class name that fits: what their
#: makers' examples say. Wan 2.2 of 5 billion weights, which spreads its times over tokens, draws 24.
RATES = {
    "Allegro": 15, "AnimateDiff": 8, "AnyFlow": 16, "ChronoEdit": 16, "CogVideoX": 8, "ConsisID": 8, "Cosmos2_5": 16,
    "EasyAnimate": 8, "Helios": 24, "HunyuanVideo": 24, "HunyuanVideoFramepack": 30, "HunyuanSkyreels": 24, "Kandinsky5": 24,
    "LucyEdit": 24, "Mochi": 30, "MotifVideo": 24, "SanaVideo": 16, "SkyReelsV2": 24, "TextToVideoSD": 8, "Wan": 16,
    "WanAnimate": 30,
}  # fmt: skip


def _ratio(default: int) -> Callable[[Mapping[str, Any]], int]:
    return lambda config: int(config.get("temporal_compression_ratio") or default)


def _of_ltx(config: Mapping[str, Any]) -> int:
    return int(
        config.get("temporal_compression_ratio") or config.get("patch_size_t", 1) * 2 ** sum(config["spatio_temporal_scaling"])
    )


#: Frames of a latent frame, of causal autoencoders, by class: their first latent frame is one frame, each further one so many.
STRIDES: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "AutoencoderKLWan": lambda config: int(config.get("scale_factor_temporal") or 4),
    "AutoencoderKLHunyuanVideo": _ratio(4),
    "AutoencoderKLHunyuanVideo15": _ratio(4),
    "AutoencoderKLCogVideoX": _ratio(4),
    "AutoencoderKLCosmos": _ratio(8),
    "AutoencoderKLMochi": lambda config: math.prod(config.get("temporal_expansions", (1, 2, 3))),
    "AutoencoderKLLTXVideo": _of_ltx,
    "AutoencoderKLLTX2Video": _of_ltx,
}


@dataclass(frozen=True)
class ModelFacts:
    """A pipeline as its configuration describes it.

    pipeline: the name of its class. parameters: of its call, empty for a class that is not known here. config: its own. vae:
    class and configuration of its autoencoder. call, rate: of its flowrl.json.
    """

    pipeline: str
    parameters: Mapping[str, inspect.Parameter] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    vae: tuple[str, Mapping[str, Any]] = ("", {})
    call: Mapping[str, Any] = field(default_factory=dict)
    rate: float | None = None

    @classmethod
    def of(cls, pipe: Any, call: Mapping[str, Any] | None = None, rate: float | None = None) -> ModelFacts:
        """Of a pipeline that is loaded."""
        vae = getattr(pipe, "vae", None)
        named = (type(vae).__name__, dict(getattr(vae, "config", {})))
        parameters = inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters
        return cls(type(pipe).__name__, parameters, dict(pipe.config), named, call or {}, rate)

    @classmethod
    def read(cls, place: Path | str) -> ModelFacts | None:
        """Of a pipeline's folder, or of a hub id, whose model_index.json may be fetched. None where there is none to be had.

        Raises ConfigError for a flowrl.json that does not read.
        """
        index = _json_of(place, "model_index.json")
        if index is None:
            return None
        import diffusers

        named = index.get("_class_name", "")
        name = str(named[-1] if isinstance(named, list) else named)  # a pipeline with code of its own: [module, class]
        pipeline = getattr(diffusers, name, None)
        parameters = {} if pipeline is None else inspect.signature(inspect.unwrap(pipeline.__call__)).parameters
        vae = _json_of(place, "vae/config.json") or {}
        call, rate = defaults_of(place) if isinstance(place, Path) else ({}, None)
        return cls(name, parameters, index, (str(vae.get("_class_name", "")), vae), call, rate)

    @property
    def draws_clips(self) -> bool:
        return "num_frames" in self.parameters

    @property
    def num_frames(self) -> int | None:
        """Of a clip where the call does not say; None where the pipeline decides otherwise, or draws pictures."""
        given = self.call.get("num_frames")
        return given if given is not None else self._default("num_frames")

    @property
    def rate_argument(self) -> str | None:
        """The argument by which the pipeline itself is told the frame rate."""
        return next((name for name in ("frame_rate", "fps") if self.draws_clips and name in self.parameters), None)

    def fps(self, call: Mapping[str, Any]) -> float | None:
        """Frames per second of what a call draws; None of pictures, and where nobody says."""
        if not self.draws_clips:
            return None
        argument = self.rate_argument
        if argument and call.get(argument) is not None:
            return check_rate(call[argument], argument)
        if self.rate is not None:
            return self.rate
        if argument and self._default(argument) is not None:
            return float(self._default(argument))
        if self.pipeline.startswith("Wan") and self.config.get("expand_timesteps"):
            return 24.0
        fitting = [name for name in RATES if self.pipeline.startswith(name)]
        return float(RATES[max(fitting, key=len)]) if fitting else None

    @property
    def stride(self) -> int | None:
        """Frames of a latent frame after the first, which is one frame; None where any number is taken, or nobody knows."""
        name, config = self.vae
        return STRIDES[name](config) if self.draws_clips and name in STRIDES else None

    def check_frames(self, num_frames: Any) -> None:
        """Raise ConfigError for a number of frames that the autoencoder cannot take, with those beside it."""
        if type(num_frames) is not int or num_frames < 1:
            raise ConfigError(f"num_frames={num_frames!r}: a whole number, 1 at least")
        if not self.draws_clips:
            if self.parameters:
                raise ConfigError(f"num_frames={num_frames}: {self.pipeline} draws pictures; leave it out")
            return
        stride = self.stride
        if stride and (num_frames - 1) % stride:
            below = (num_frames - 1) // stride * stride + 1
            near = f"{below} and {below + stride}"
            raise ConfigError(f"num_frames={num_frames}: {self.vae[0]} takes {stride} k + 1 frames; the nearest are {near}")

    def check_fps(self, fps: float) -> None:
        """Raise ValueError for what is no frame rate, ConfigError for one of pictures."""
        check_rate(fps)
        if self.parameters and not self.draws_clips:
            raise ConfigError(f"fps={fps:g}: {self.pipeline} draws pictures; leave it out")

    @property
    def conditions(self) -> tuple[str, ...]:
        """Arguments by which it can start from pictures."""
        return tuple(name for name in CONDITIONS if name in self.parameters)

    @property
    def needed_conditions(self) -> tuple[str, ...]:
        """Those without which it cannot be called."""
        to_video = any(part in self.pipeline for part in ("ImageToVideo", "Image2Video", "I2V"))
        bare = inspect.Parameter.empty
        return tuple(name for name in self.conditions if self._default(name) is bare or (name == "image" and to_video))

    def _default(self, name: str) -> Any:
        return self.parameters[name].default if name in self.parameters else None


def defaults_of(folder: Path) -> tuple[dict[str, Any], float | None]:
    """Call arguments and frames per second of a model's flowrl.json; empty and None where there is none. Raises ConfigError."""
    file = folder / DEFAULTS_FILE
    if not file.is_file():
        return {}, None
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        rate = said.get("fps")
        return dict(said["call"]), None if rate is None else check_rate(rate)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'{file} is not {{"call": {{...}}, "fps": ...}}: {error}') from None


def _json_of(place: Path | str, name: str) -> dict[str, Any] | None:
    """A JSON file of a folder, or of a hub id."""
    file = Path(place, name)
    if isinstance(place, str):
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(place, name))
        except Exception:  # the hub, the network, its proxies: whatever it is, loading the weights will say it
            return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
