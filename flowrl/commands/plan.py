"""`flowrl plan`."""

from __future__ import annotations

import argparse
from typing import Any

from flowrl.commands.common import command, positive, quiet_libraries

DESCRIPTION = """\
What a recipe takes, before anything is loaded: its arithmetic, the memory of a process while it rolls out, decodes and updates
(largest first, with what would lower it), and, from one measured denoiser call, the time. Of the model it reads the config
files only: an embedded model, a folder, or a hub id whose files are on this machine.

  flowrl plan quickstart
  flowrl plan wan21-grpo --processes 8 batch_size=2
  flowrl plan sd35-medium-nft --processes 8 --forward 0.42
"""


def add(commands: Any) -> None:
    plan = command(
        commands, "plan", run_plan, "what a recipe takes: calls, memory, time; no weight is loaded", description=DESCRIPTION
    )
    plan.add_argument("recipe")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument("--processes", type=positive, default=1, help="processes that will train (default 1)")
    plan.add_argument(
        "--forward",
        type=seconds,
        metavar="SECONDS",
        help="measured time of one denoiser call on batch_size samples, guidance included, without gradient: predicts the run's",
    )
    plan.add_argument("--no-memory", action="store_true", help="the arithmetic alone, in no time")


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


def run_plan(arguments: argparse.Namespace) -> int:
    from flowrl.config import ConfigError, load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from flowrl.train.offline import rows_of
    from flowrl.train.trainer import parts, plan_of

    if arguments.forward is not None and arguments.no_memory:
        raise ConfigError("--forward wants the operations that are counted along with the memory: leave out --no-memory")
    objective, _, _, trained = parts(recipe)
    rows_each = rows_of(recipe.data, objective.needs) if recipe.data else None
    plan = plan_of(recipe, objective, trained, arguments.processes, rows_each)
    print_columns(plan.table())
    if arguments.no_memory:
        return 0
    quiet_libraries()
    from flowrl.plan import estimate

    try:
        found = estimate(recipe, plan)
    except FileNotFoundError as error:
        print(f"\nmemory: {error}")
        return 0
    print()
    print_memory(found)
    if arguments.forward is not None:
        print()
        print_time(found, arguments.forward, recipe.max_steps)
    return 0


def print_columns(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows), flush=True)  # counting may take half a minute


def print_memory(found: Any) -> None:
    """Items, the largest first, and what they come to in each phase."""
    from flowrl.plan import PHASES, gigabytes

    rows = [(item.name, item.size, item.lower) for item in found.items]
    width = max(len("memory of a process"), *(len(name) for name, _, _ in rows))
    print(f"{'memory of a process'.ljust(width)}  {'  '.join(phase.rjust(9) for phase in PHASES)}  lowered by")
    for name, sizes, lower in [*rows, ("together, at most", found.peak, "")]:
        columns = "  ".join((gigabytes(size) if size else "").rjust(9) for size in sizes)
        print(f"{name.ljust(width)}  {columns}  {lower}".rstrip())
    print("not counted: what rewards take while they score, workspaces of operators, the GPU's context (about 0.5 GB)")
    for note in found.notes:
        print(f"not counted: {note}")


def print_time(found: Any, forward: float, steps: int) -> None:
    """From floating point operations in units of the measured call."""
    from flowrl.plan import PHASES

    each = found.seconds(forward)
    parts = ", ".join(f"{phase} {part:,.3g} s" for phase, part in zip(PHASES, each, strict=True) if part)
    hours = sum(each) * steps / 3600
    print_columns(
        [("time of a step", f"{sum(each):,.3g} s: {parts}"), (f"time of {steps} steps", f"{hours:,.3g} h, without rewards")]
    )
