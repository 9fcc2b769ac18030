"""The command line: `flowrl train | sample | eval | gallery | plan | recipes | doctor`.

Imports stay inside the commands, so that `flowrl --help` answers at once. Bad input ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

DESCRIPTION = """\
Align image and video generators (diffusion, flow matching) with rewards.

  flowrl train quickstart                                  reinforcement learning on the embedded model, in minutes
  flowrl eval runs/quickstart --against tiny-sd3           the same prompts and seeds, before and after
  flowrl gallery tiny-sd3 runs/quickstart --out gallery    a page of pictures side by side
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    # Before torch is loaded: threads that spin while they wait bring small models to a standstill on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the folder that a reward's dotted path starts from
    if not hasattr(arguments, "run"):
        parser.print_help()
        return 0
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print("flowrl: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("FLOWRL_TRACEBACK") or not is_users(error):
            raise
        print(f"flowrl: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def is_users(error: Exception) -> bool:
    """Whether an error is the input's (one line is enough) or ours (the traceback is wanted)."""
    import errno

    from flowrl.config import ConfigError

    if isinstance(
        error,
        ConfigError | FileNotFoundError | PermissionError | FileExistsError | NotADirectoryError | IsADirectoryError,
    ):
        return True
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT) or type(error) is OSError
    return type(error).__name__ in ("RewardError", "CheckFailed", "Unservable") or type(error) is ValueError


class Parser(argparse.ArgumentParser):
    """Bad arguments end with one line, like all bad input; the usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"flowrl: {message} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    from flowrl import __version__

    parser = Parser(prog="flowrl", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"flowrl {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Any, help: str, **kwargs: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=kwargs.pop("description", help),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )
        sub.set_defaults(run=run)
        return sub

    train = command("train", run_train, "train a model by a recipe", description=train_help())
    train.add_argument("recipe", help="a recipe that ships (see `flowrl recipes`) or a YAML file")
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="options that differ, like max_steps=20 objective.epsilon=1e-5",
    )

    plan = command("plan", run_plan, "show a recipe's arithmetic without loading any weight")
    plan.add_argument("recipe")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument("--processes", type=positive, default=1, help="processes that will train (default 1)")

    command("recipes", run_recipes, "list the recipes that ship")

    sample = command("sample", run_sample, "sample pictures from a model, a run or a checkpoint")
    sample.add_argument("model", help="an embedded name, a pipeline folder, a hub id, a run, or a checkpoint")
    sample.add_argument("prompts", nargs="*", help="prompts (or --prompts FILE)")
    sample.add_argument("--out", type=Path, default=Path("samples"), help="folder of the pictures (default samples)")
    sampling_options(sample, seeds=1, prompts=None)

    evaluation = command("eval", run_eval, "score a model, or two on the same prompts and seeds")
    evaluation.add_argument("model")
    evaluation.add_argument("--against", help="the model to compare with: a paired table with 95 %% intervals")
    evaluation.add_argument("--rewards", nargs="+", default=["tiny_strict", "tiny_dense"], help="rewards by name or dotted path")
    evaluation.add_argument("--out", type=Path, help="write the scores as JSON")
    sampling_options(evaluation, seeds=4, prompts="tiny-test")

    gallery = command("gallery", run_gallery, "a page that puts models side by side: same prompt, same seed")
    gallery.add_argument("models", nargs="+", help="models, runs or checkpoints; the first is the base")
    gallery.add_argument("--out", type=Path, default=Path("gallery"), help="folder of the page (default gallery)")
    gallery.add_argument("--rewards", nargs="+", default=["tiny_strict", "tiny_dense"])
    gallery.add_argument("--limit", type=positive, default=48, help="prompts, spread evenly over the file (default 48)")
    gallery.add_argument("--title", default="flowrl gallery")
    sampling_options(gallery, seeds=2, prompts="tiny-test")

    command("doctor", run_doctor, "versions, devices, attention backends")
    return parser


def sampling_options(parser: argparse.ArgumentParser, seeds: int, prompts: str | None) -> None:
    group = parser.add_argument_group("sampling (always by the ODE)")
    group.add_argument(
        "--prompts",
        dest="prompt_file",
        default=prompts,
        help="prompt file (.txt, .jsonl) or embedded set" + (f" (default {prompts})" if prompts else ""),
    )
    group.add_argument("--seeds", type=positive, default=seeds, help=f"samples per prompt (default {seeds})")
    group.add_argument("--seed", type=int, default=0, help="first seed (default 0)")
    group.add_argument("--steps", type=positive, default=None, help="denoising steps (default: the model's own, or 28)")
    group.add_argument("--guidance", type=float, default=None, help="guidance scale (default: the model's own)")
    group.add_argument("--height", type=positive, default=None)
    group.add_argument("--width", type=positive, default=None)
    group.add_argument("--batch-size", type=positive, default=64, help="samples per denoiser call (default 64)")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="type of the weights")
    group.add_argument("--device", default=None, help="cpu, cuda, ... (default: a GPU if there is one)")


def train_help() -> str:
    """Every option of a recipe, with its default, from the recipe itself."""
    import dataclasses
    import textwrap

    from flowrl.config import Recipe, recipe_names

    lines = [
        "Train a model by a recipe. Any option can be overridden: flowrl train quickstart max_steps=20 objective.epsilon=1e-5",
        "",
    ]
    lines += [f"recipes: {', '.join(recipe_names())}", "", "options:"]
    for field in dataclasses.fields(Recipe):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc, operator]
        text = f"{field.metadata['help']} [{default}]"
        lines += textwrap.wrap(text, 118, initial_indent=f"  {field.name:<28}", subsequent_indent=" " * 30)
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ commands


def run_train(arguments: argparse.Namespace) -> int:
    from flowrl.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    quiet_libraries()
    from flowrl.train.trainer import Trainer, set_threads

    set_threads()
    trainer = Trainer(recipe)
    folder = trainer.train()
    if not trainer.finished:
        return 130
    if trainer.is_main:
        print(f"\nDone: {folder}\n  flowrl eval {folder} --against {recipe.model}")
        print(f"  flowrl gallery {recipe.model} {folder} --out {folder}/gallery")
    return 0


def run_plan(arguments: argparse.Namespace) -> int:
    from flowrl.config import Plan, load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from flowrl.train.trainer import parts

    *_, trained = parts(recipe)
    rows = Plan(recipe, arguments.processes, len(trained)).check().table()
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))
    return 0


def run_recipes(arguments: argparse.Namespace) -> int:
    from importlib.resources import files

    from flowrl.config import recipe_names

    for name in recipe_names():
        first = files("flowrl.train.recipes").joinpath(f"{name}.yaml").read_text().splitlines()[0]
        print(f"{name:<24} {first.lstrip('# ')}")
    return 0


def run_sample(arguments: argparse.Namespace) -> int:
    from flowrl.evaluate import evaluate
    from flowrl.record import beside
    from flowrl.reward_models.base import to_pil

    prompts = read_prompts(arguments.prompts or arguments.prompt_file or [])
    make_folder(arguments.out)
    policy = open_model(arguments.model, arguments)
    result = evaluate(
        policy,
        prompts,
        {},
        protocol(arguments, policy),
        name=arguments.model,
        batch_size=arguments.batch_size,
        keep_images=True,
        progress=True,
    )
    assert result.samples is not None and result.samples.images is not None
    for i, picture in enumerate(to_pil(result.samples.images)):
        file = arguments.out / f"{i // arguments.seeds:04d}-{i % arguments.seeds}.png"
        (beside(picture) if isinstance(picture, list) else picture).save(file)
    print(f"{len(result.samples)} pictures in {arguments.out}")
    return 0


def run_eval(arguments: argparse.Namespace) -> int:
    import json

    from flowrl.evaluate import comparison_rows, score_rows, text_table
    from flowrl.record import write_text

    if arguments.out:
        make_folder(arguments.out.parent)
    results = evaluate_models([arguments.model, *([arguments.against] if arguments.against else [])], arguments)
    model, base = results[0], results[-1]
    if arguments.against:
        for reward in model.rewards:
            print(text_table(*comparison_rows(base, model, reward)), end="\n\n")
    else:
        print(text_table(*score_rows(model)))
    if arguments.out:
        write_text(arguments.out, json.dumps([result.to_json() for result in results], ensure_ascii=False, indent=1) + "\n")
    return 0


def run_gallery(arguments: argparse.Namespace) -> int:
    from flowrl.evaluate import comparison_rows, score_rows
    from flowrl.gallery import Cell, Table, write_gallery
    from flowrl.gallery.page import check_replaceable
    from flowrl.record import beside
    from flowrl.reward_models.base import to_pil

    check_replaceable(arguments.out)
    make_folder(arguments.out.parent)
    results = evaluate_models(arguments.models, arguments, keep_images=True, limit=arguments.limit)
    cells = []
    for result in results:
        assert result.samples is not None and result.samples.images is not None
        for i, picture in enumerate(to_pil(result.samples.images)):
            p, s = divmod(i, arguments.seeds)
            scores = {name: None if (v := float(result.scores[p, s, k])) != v else v for k, name in enumerate(result.rewards)}
            image = beside(picture) if isinstance(picture, list) else picture
            prompt = result.prompts[p]
            details = {
                "steps": str(result.protocol.num_inference_steps),
                "guidance": str(result.protocol.guidance_scale),
                "noise seed": str(result.seeds[p][s]),
            }
            cells.append(Cell(result.model, prompt.text, s, image, scores, prompt.columns.get("kind"), details))
    base = results[0]
    tables = [
        Table(f"{other.model} against {base.model}: {reward}", *comparison_rows(base, other, reward))
        for other in results[1:]
        for reward in base.rewards
    ]
    if len(results) == 1:
        tables = [Table(base.model, *score_rows(base))]
    shared = base.protocol
    subtitle = f"{len(base.prompts)} {shared.prompts} prompts, {shared.seeds} seeds, {shared.num_inference_steps} ODE steps"
    page = write_gallery(arguments.out, cells, title=arguments.title, subtitle=subtitle, tables=tables)
    print(f"{page}")
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    from flowrl.record import environment

    for name, value in environment().items():
        print(f"{name:<18} {value}")
    import torch
    from diffusers.models.attention_dispatch import AttentionBackendName

    print(f"{'GPU':<18} {'yes' if torch.cuda.is_available() else 'none: runs on the CPU'}")
    print(f"{'backends':<18} {', '.join(sorted(b.value for b in AttentionBackendName if not b.value.startswith('_')))}")
    return 0


# ------------------------------------------------------------------------------------------------ shared steps


def quiet_libraries() -> None:
    """Loading bars and advice of the libraries below would drown ours."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def read_prompts(source: Any) -> Any:
    from flowrl.config import ConfigError
    from flowrl.data import load_prompts

    if not source:
        raise ConfigError('no prompts: give them as arguments ("a red circle") or as --prompts FILE')
    return load_prompts(source)


def make_folder(folder: Path) -> None:
    from flowrl.config import ConfigError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made: {error.strerror}") from None


def open_model(model: str, arguments: argparse.Namespace) -> Any:
    quiet_libraries()
    import torch

    from flowrl.record import load_trained

    call = {k: v for k, v in {"height": arguments.height, "width": arguments.width}.items() if v is not None}
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_trained(model, dtype=arguments.dtype, device=device, **call)


def protocol(arguments: argparse.Namespace, policy: Any) -> Any:
    from flowrl.evaluate import Protocol

    steps = arguments.steps or policy.call.get("num_inference_steps", 28)
    guidance = arguments.guidance if arguments.guidance is not None else policy.call.get("guidance_scale")
    return Protocol(str(arguments.prompt_file), steps, guidance, arguments.seeds, arguments.seed)


def evaluate_models(
    models: list[str], arguments: argparse.Namespace, keep_images: bool = False, limit: int | None = None
) -> list[Any]:
    """Every model under the protocol of the first one's defaults."""
    from flowrl.evaluate import evaluate
    from flowrl.reward_models import load_reward

    prompts = read_prompts(arguments.prompt_file)
    if limit and len(prompts) > limit:
        prompts = [prompts[i * len(prompts) // limit] for i in range(limit)]
    rewards = {name: load_reward(name) for name in arguments.rewards}
    results, shared = [], None
    for model in models:
        policy = open_model(model, arguments)
        shared = shared or protocol(arguments, policy)
        name = Path(model).name if Path(model).exists() else model
        results.append(
            evaluate(
                policy,
                prompts,
                rewards,
                shared,
                name=name,
                batch_size=arguments.batch_size,
                keep_images=keep_images,
                progress=True,
            )
        )
    return results


if __name__ == "__main__":
    sys.exit(main())
