"""What the loops share, whether they train a generator or a reward model: stopping, schedules, processes, trackers."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from flowrl.config import ConfigError


class Schedule(Protocol):
    """The options of a recipe that shape its learning rate."""

    max_steps: int
    lr_warmup_steps: int
    lr_decay_from: float


class Place(Protocol):
    """Where a run stands: steps and updates done."""

    step: int
    updates: int


class Loop(Protocol):
    """A run in its folder. saved_at: step of its newest checkpoint there. finished: whether it came to its end."""

    folder: Path
    progress: Any
    saved_at: int | None
    finished: bool

    @property
    def is_main(self) -> bool: ...

    def save_checkpoint(self) -> None: ...

    def save(self) -> None: ...


def wind_up(loop: Loop, command: str) -> None:
    """The last checkpoint; then the result of a run that came to its end, or how one that was stopped goes on."""
    if loop.saved_at != loop.progress.step:
        loop.save_checkpoint()
    if loop.finished:
        loop.save()
    elif loop.is_main:
        print(
            f"Stopped after step {loop.progress.step}. "
            f"Go on with: {command} {loop.folder}/recipe.yaml resume_from_checkpoint=latest"
        )


def lr_factor(recipe: Schedule, progress: Place) -> float:
    """The learning rate of the next update over its nominal value: warm-up by updates, decay by steps."""
    warmup = min(1.0, (progress.updates + 1) / recipe.lr_warmup_steps) if recipe.lr_warmup_steps else 1.0
    left = (recipe.max_steps - progress.step) / max(1.0, recipe.max_steps * (1 - recipe.lr_decay_from))
    return warmup * min(1.0, left)


def reduce_gradients(accelerator: Any, parameters: Sequence[nn.Parameter], how: str) -> None:
    """Gradients `sum`med or averaged (`mean`) over processes, in one message, into every process' parameters.

    A parameter without a gradient in every process keeps none: AdamW then leaves it alone.
    """
    if accelerator.num_processes == 1:
        return
    has = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    flat = torch.cat([has, *((p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters)])
    has, *gradients = accelerator.reduce(flat, how).split([len(parameters), *(p.numel() for p in parameters)])
    for p, anywhere, gradient in zip(parameters, has, gradients, strict=True):
        p.grad = gradient.view_as(p) if anywhere else None


def in_any_process(accelerator: Any, *flags: bool) -> list[bool]:
    """Which flags are up in at least one process."""
    raised = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return [bool(flag) for flag in (accelerator.reduce(raised, "sum") if accelerator.num_processes > 1 else raised).tolist()]


class Interrupts:
    """Ctrl-C finishes the step and saves; a second one stops at once."""

    def __init__(self, is_main: bool):
        self.count, self.is_main = 0, is_main

    def _on_interrupt(self, signum: int, frame: Any) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
        if self.is_main:
            print("\nFinishing this step, then saving (Ctrl-C again stops at once, without saving).", flush=True)

    @contextmanager
    def counted(self) -> Iterator[None]:
        try:
            previous = signal.signal(signal.SIGINT, self._on_interrupt)
        except ValueError:  # not in the main thread
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def trackers(report_to: str) -> list[str]:
    """accelerate's trackers named in the option. Raises ConfigError for unknown and for missing ones."""
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in [kind.value for kind in LoggerType]:
            raise ConfigError(
                f"report_to={name!r}: choose among {', '.join(kind.value for kind in LoggerType if kind.value != 'all')}, none"
            )
        if name not in ("all", *map(str, get_available_trackers())):
            raise ConfigError(
                f"report_to={name!r} is not installed; installed are {', '.join(map(str, get_available_trackers()))}"
            )
    return names


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values, aligned."""
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name.ljust(width)}  {value}" for name, value in rows), flush=True)
