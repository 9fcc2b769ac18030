"""How the generator is updated: the loop, the objectives, advantages. Names are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowrl.train.advantages import advantages
    from flowrl.train.objectives import GRPO, OBJECTIVES
    from flowrl.train.trainer import Trainer

__all__ = ["GRPO", "OBJECTIVES", "Trainer", "advantages"]


def __getattr__(name: str) -> Any:
    """Objectives and advantages are plain tensor functions and come without diffusers; recipes come without torch."""
    import importlib

    if name in ("GRPO", "OBJECTIVES"):
        return getattr(importlib.import_module("flowrl.train.objectives"), name)
    if name == "Trainer":
        return importlib.import_module("flowrl.train.trainer").Trainer
    if name == "advantages":
        return importlib.import_module("flowrl.train.advantages").advantages
    raise AttributeError(f"module 'flowrl.train' has no attribute {name!r}")
