"""The recipe of `flowrl train-reward`: every option, typed and documented. No torch: the command line asks it for help."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from flowrl.config import ConfigError, option, read_recipe
from flowrl.train.rewards import TASKS

RECIPES = "flowrl.train.rewards.recipes"


@dataclass
class RewardRecipe:
    """All options of `flowrl train-reward`. The section `task` is a name plus that task's own fields."""

    sections: ClassVar = ("task",)

    task: dict[str, Any] = option({"name": "preference"}, f"What is learnt, one of {', '.join(TASKS)}, and its options.")

    # -- optimiser
    learning_rate: float = option(1e-4, "AdamW's learning rate.")
    adam_beta2: float = option(0.99, "AdamW's second beta.")
    weight_decay: float = option(0.01, "AdamW's weight decay.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    lr_warmup_steps: int = option(20, "Steps over which the learning rate rises linearly from 0.")
    lr_decay_from: float = option(0.5, "Part of max_steps after which the learning rate falls linearly to 0.")
    ema_decay: float = option(
        0.99, "Decay of the averaged weights that are evaluated and saved, per step; warmed up as (1 + n) / (10 + n)."
    )
    batch_size: int = option(64, "Examples (pairs, lists, pictures) per step, over all processes.")
    autocast: Literal["bfloat16"] | None = option(None, "Compute the loss under autocast with this type.")
    max_steps: int = option(500, "Training steps.")
    max_minutes: float | None = option(None, "Stop after this many minutes of training, whichever comes first; none by default.")
    seed: int = option(0, "Seed of everything random: order, noise, initial weights.")

    # -- what is kept
    output_dir: str = option("runs/reward", "Folder of the run, and of the reward model.")
    eval_steps: int = option(100, "Steps between evaluations on held-out data; 0 evaluates at the end only.")
    checkpointing_steps: int = option(200, "Steps between checkpoints; 0 keeps only the last state.")
    checkpoints_total_limit: int = option(1, "Checkpoints kept.")
    report_to: str = option("tensorboard", "Trackers, comma separated, by accelerate's names (tensorboard, wandb, ...), or none.")
    resume_from_checkpoint: str | None = option(None, "Checkpoint folder to go on from, or `latest` of output_dir.")

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm", "batch_size", "max_steps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ConfigError(f"max_minutes={self.max_minutes}: must be positive")
        whole = ("weight_decay", "lr_warmup_steps", "seed", "eval_steps", "checkpointing_steps", "checkpoints_total_limit")
        for name in whole:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must not be negative")
        for name in ("ema_decay", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must lie in [0, 1)")
        if not 0 <= self.lr_decay_from <= 1:
            raise ConfigError(f"lr_decay_from={self.lr_decay_from}: must lie in [0, 1]")
        if not self.output_dir.strip():
            raise ConfigError("output_dir is empty")

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


def load_reward_recipe(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> RewardRecipe:
    """A recipe from a shipped name, a YAML file or a mapping, with `key=value` overrides. Raises ConfigError in one sentence."""
    return read_recipe(RewardRecipe, RECIPES, source, overrides)
