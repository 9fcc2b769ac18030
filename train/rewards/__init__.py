"""How a reward model is made: `flowrl train-reward RECIPE`. One loop (`loop.py`), one file per task.

A task is a dataclass of options with prepare, batch, loss, evaluate and save: `flowrl.train.rewards.loop.Task` says what they do.
"""

from __future__ import annotations

import importlib
from typing import Any

from flowrl.config import ConfigError, unknown

_HERE = "flowrl.train.rewards"

#: Tasks by the name that a recipe uses; imported when they are asked for.
TASKS: dict[str, str] = {
    "clip": f"{_HERE}.contrastive:Contrastive",
    "preference": f"{_HERE}.preference:Preference",
    "artifact": f"{_HERE}.artifact:Artifact",
    "generative": f"{_HERE}.generative:Generative",
    "latent": f"{_HERE}.latent:Latent",
    "transport": f"{_HERE}.transport:Transport",
    "video_clip": f"{_HERE}.video_contrastive:VideoContrastive",
    "video_transport": f"{_HERE}.video_transport:VideoTransport",
    "video_preference": f"{_HERE}.video_preference:VideoPreference",
}


def find_task(name: str) -> Any:
    """The class of a task. Raises ConfigError, with the nearest name, where there is none."""
    if name not in TASKS:
        raise ConfigError(unknown("task", name, TASKS))
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
