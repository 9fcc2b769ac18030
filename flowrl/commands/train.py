"""`flowrl train | train-reward | recipes`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

from flowrl.commands.common import command, quiet_libraries
from flowrl.commands.rewards import print_options

R = TypeVar("R")

#: The sections of a recipe that name a class, and where their classes are.
SECTIONS = {
    "objective": "flowrl.train.objectives:OBJECTIVES",
    "transition": "flowrl.samplers:TRANSITIONS",
    "steps": "flowrl.samplers:SCHEDULES",
    "times": "flowrl.samplers:TIMES",
    "balance": "flowrl.train.balance:BALANCES",
    "watch": "flowrl.train.watch:WATCHES",
}
SECTIONS_HELP = f"explain what a section may name, and its options, and train nothing: {', '.join(SECTIONS)}"


def add(commands: Any) -> None:
    train = command(commands, "train", run_train, "train a model by a recipe", description=train_help())
    train.add_argument("recipe", nargs="?", help="a recipe that ships (see `flowrl recipes`) or a YAML file")
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="options that differ, like max_steps=20 objective.epsilon=1e-5",
    )
    train.add_argument("--options", metavar="SECTION", choices=[*SECTIONS], help=SECTIONS_HELP)

    teach = command(
        commands, "train-reward", run_train_reward, "train a reward model by a recipe", description=train_reward_help()
    )
    teach.add_argument("recipe", nargs="?", help="a reward recipe that ships (see `flowrl recipes`) or a YAML file")
    teach.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options that differ, like max_steps=100 task.head=linear"
    )
    teach.add_argument("--options", metavar="TASK", help="explain a task's own options (task.NAME=...), and train nothing")

    command(commands, "recipes", run_recipes, "list the recipes that ship: the quick start, the embedded model, large models")


def train_help() -> str:
    """Every option of a recipe, with its default, from the recipe itself."""
    from flowrl.config import Recipe, recipe_names

    start = "Train a model by a recipe. Any option can be overridden: flowrl train quickstart max_steps=20 objective.epsilon=1e-5"
    return options_help(start, recipe_names(), Recipe)


def train_reward_help() -> str:
    from flowrl.config import recipe_names
    from flowrl.train.rewards.recipe import RECIPES, RewardRecipe

    start = "Train a reward model by a recipe. Its folder is a reward: flowrl train quickstart rewards.runs/tiny_preference=1"
    return options_help(start, recipe_names(RECIPES), RewardRecipe)


def options_help(start: str, recipes: list[str], cls: Any) -> str:
    import dataclasses
    import textwrap

    lines = [start, "", f"recipes: {', '.join(recipes)}", "", "options:"]
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc, operator]
        text = f"{field.metadata['help']} [{default}]"
        lines += textwrap.wrap(text, 118, initial_indent=f"  {field.name:<28}", subsequent_indent=" " * 30)
    return "\n".join(lines)


def print_section(section: str) -> None:
    """What a section of a recipe may name, each with its options."""
    from importlib import import_module

    module, _, name = SECTIONS[section].partition(":")
    for label, made in getattr(import_module(module), name).items():
        print(f"{section}={label}: {' '.join((made.__doc__ or '').split())}")
        print_options(made, {})
        print()


def recipe_to_train(arguments: argparse.Namespace, load: Callable[..., R]) -> R:
    """The recipe that was asked for, and libraries and threads made ready. load: as `load_recipe`. Raises ConfigError."""
    from flowrl.config import ConfigError

    if arguments.recipe is None:
        raise ConfigError("no recipe: give one that ships (see `flowrl recipes`) or a YAML file")
    recipe = load(arguments.recipe, arguments.overrides)
    quiet_libraries()
    from flowrl.train.trainer import set_threads

    set_threads()
    return recipe


def run_train(arguments: argparse.Namespace) -> int:
    from flowrl.config import load_recipe

    if arguments.options:
        print_section(arguments.options)
        return 0
    recipe = recipe_to_train(arguments, load_recipe)
    from flowrl.train.trainer import Trainer

    trainer = Trainer(recipe)
    folder = trainer.train()
    if not trainer.finished:
        return 130
    if trainer.is_main:
        print(f"\nDone: {folder}\n  flowrl eval {folder} --against {recipe.model}")
        print(f"  flowrl gallery {recipe.model} {folder} --out {folder}/gallery\n  flowrl report {folder}")
    return 0


def run_train_reward(arguments: argparse.Namespace) -> int:
    from flowrl.train.rewards.recipe import load_reward_recipe

    if arguments.options:
        from flowrl.train.rewards import find_task

        task = find_task(arguments.options)
        print(f"task {arguments.options}: {(task.__doc__ or '').strip()}\n")
        print_options(task, {})
        return 0
    recipe = recipe_to_train(arguments, load_reward_recipe)
    from flowrl.train.rewards.loop import RewardTrainer

    trainer = RewardTrainer(recipe)
    trainer.train()
    return 0 if trainer.finished else 130


def run_recipes(arguments: argparse.Namespace) -> int:
    from importlib.resources import files

    from flowrl.config import recipe_names
    from flowrl.train.rewards.recipe import RECIPES

    for verb, package in (("train", "flowrl.train.recipes"), ("train-reward", RECIPES)):
        print(f"flowrl {verb}")
        for name in sorted(recipe_names(package), key=lambda name: (name != "quickstart", not name.startswith("tiny-"), name)):
            first = files(package).joinpath(f"{name}.yaml").read_text().splitlines()[0]
            print(f"  {name:<24} {first.lstrip('# ')}")
    return 0
