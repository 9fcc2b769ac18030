"""The embedded world: captions, scenes, an exact verifier, and a real Stable Diffusion 3 pipeline of thumbnail size.

>>> from flowrl.tiny import model_path, split, verify
>>> from flowrl.tiny import evaluate, models        # these import torch
>>> specs = split("test")[:4]
>>> pictures = evaluate.sample(models.load(model_path()), [s["prompt"] for s in specs], seeds=range(4))
>>> strict, dense = verify(pictures, specs)

`python -m flowrl.tiny.build --help` says how the model was made. Importing this package does not import torch.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from .render import render, render_batch
from .scenes import (
    COLORS,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZE,
    Object,
    Scene,
    Spec,
    all_specs,
    random_spec,
    sample_scene,
    split,
)
from .verify import Detection, detect, detect_batch, verify

__all__ = [
    "COLORS",
    "KINDS",
    "RELATIONS",
    "SHAPES",
    "SIZE",
    "Detection",
    "Object",
    "Scene",
    "Spec",
    "all_specs",
    "detect",
    "detect_batch",
    "model_path",
    "prompts_path",
    "random_spec",
    "render",
    "render_batch",
    "sample_scene",
    "split",
    "verify",
]


def _asset(*parts: str) -> Path:
    path = Path(str(files("flowrl.assets"))).joinpath(*parts)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; `python -m flowrl.tiny.build` makes it")
    return path


def model_path(name: str = "tiny-sd3") -> Path:
    """Folder of a shipped pipeline, tiny-sd3 or tiny-wan; its flowrl.json holds the call arguments it was trained for."""
    return _asset(name)


def prompts_path(split: str = "train") -> Path:
    """File of the specs of "train" or "test", or of "video-train" or "video-test"; one JSON object per line."""
    return _asset("prompts", f"tiny-{split}.jsonl")
