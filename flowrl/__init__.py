"""flowrl: align image and video generators (diffusion, flow matching) with rewards.

from flowrl import Policy, Trainer, load_recipe
Trainer(load_recipe("quickstart")).train()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Policy", "Recipe", "Trainer", "load_recipe"]

if TYPE_CHECKING:
    from flowrl.config import Recipe, load_recipe
    from flowrl.policy import Policy
    from flowrl.train.trainer import Trainer

_HOMES = {
    "Policy": "flowrl.policy",
    "Recipe": "flowrl.config",
    "Trainer": "flowrl.train.trainer",
    "load_recipe": "flowrl.config",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `flowrl --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'flowrl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
