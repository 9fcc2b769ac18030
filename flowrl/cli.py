"""The command line: `flowrl train | train-reward | sample | eval | gallery | serve | plan | rewards | recipes | doctor`.

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
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "steer") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.prompts += rest  # prompts after options, which argparse leaves over
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
    names = {kind.__name__ for kind in type(error).__mro__}  # by name: their modules import torch
    return bool(names & {"RewardError", "CheckFailed", "Unservable"}) or type(error) is ValueError


class Parser(argparse.ArgumentParser):
    """Bad arguments end with one line, like all bad input; the usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"flowrl: {message} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 62:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2^62")
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

    teach = command("train-reward", run_train_reward, "train a reward model by a recipe", description=train_reward_help())
    teach.add_argument("recipe", nargs="?", help="a reward recipe that ships (see `flowrl recipes`) or a YAML file")
    teach.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options that differ, like max_steps=100 task.head=linear"
    )
    teach.add_argument("--options", metavar="TASK", help="explain a task's own options (task.NAME=...), and train nothing")

    plan = command("plan", run_plan, "show a recipe's arithmetic without loading any weight")
    plan.add_argument("recipe")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument("--processes", type=positive, default=1, help="processes that will train (default 1)")

    rewards = command("rewards", run_rewards, "list the rewards, or explain one")
    rewards.add_argument("name", nargs="?", help="a reward, to read what it does and which options it has")

    command("recipes", run_recipes, "list the recipes that ship")

    sample = command("sample", run_sample, "draw pictures from models, runs, checkpoints and LoRAs", description=SAMPLE_HELP)
    sample_options(sample)

    evaluation = command("eval", run_eval, "score a model, or two on the same prompts and seeds")
    evaluation.add_argument("model", help="as for sample: a name, a folder, a run, a checkpoint; with LoRAs: MODEL+LORA[@SCALE]")
    evaluation.add_argument("--against", help="the model to compare with: a paired table with 95 %% intervals")
    evaluation.add_argument("--rewards", nargs="+", default=["tiny_strict", "tiny_dense"], help=REWARDS_HELP)
    evaluation.add_argument("--limit", type=positive, help="prompts, spread evenly over the file (default: all)")
    evaluation.add_argument("--out", type=Path, help="write the scores as JSON")
    sampling_options(evaluation, seeds=4, prompts="tiny-test")

    gallery = command("gallery", run_gallery, "a page that puts models side by side: same prompt, same seed")
    gallery.add_argument("models", nargs="+", help="models, runs or checkpoints; the first is the base")
    gallery.add_argument("--out", type=Path, default=Path("gallery"), help="folder of the page (default gallery)")
    gallery.add_argument("--rewards", nargs="+", default=["tiny_strict", "tiny_dense"], help=REWARDS_HELP)
    gallery.add_argument("--limit", type=positive, default=48, help="prompts, spread evenly over the file (default 48)")
    gallery.add_argument("--title", default="flowrl gallery")
    sampling_options(gallery, seeds=2, prompts="tiny-test")

    serve = command("serve", run_serve, "put rewards behind HTTP, for `remote` elsewhere (docs/serving.md)")
    serve.add_argument("rewards", nargs="+", metavar="reward", help='names, folders, dotted paths, or "name key=value"')
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine only)")
    serve.add_argument("--port", type=whole, default=8000, help="default 8000; 0 takes a free one")
    serve.add_argument("--token-env", metavar="NAME", help="environment variable with the token that every request must carry")
    serve.add_argument("--open", dest="everybody", action="store_true", help="allow other machines without a token")
    serve.add_argument("--max-batch", type=positive, default=64, help="samples per request and per call (default 64)")
    serve.add_argument("--max-pixels", type=positive, default=1 << 24, help="pixels of a picture (default 16777216)")
    serve.add_argument("--max-megabytes", type=positive, default=256, help="size of a request (default 256)")
    serve.add_argument("--batch-window-ms", type=whole, default=5, help="wait for small requests to score together (default 5)")
    serve.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")

    command("doctor", run_doctor, "versions, devices, attention backends")
    return parser


REWARDS_HELP = 'rewards: names, folders, dotted paths, or "NAME key=value"; `flowrl rewards` lists them'

SAMPLE_HELP = """\
Draw pictures: one PNG for each model, prompt and seed. All that drew a picture stands inside it, its name depends on prompt and
seed alone, and the same command gives the same files: what is there already is kept, so an interrupted command goes on.

  flowrl sample tiny-sd3 "a red circle" "two blue squares" --seeds 4 --grid
  flowrl sample tiny-sd3 --prompts tiny-test --limit 20 --rewards tiny_strict tiny_dense
  flowrl sample tiny-sd3 "a red circle" --against tiny-sd3+runs/demo@0.5 runs/demo --grid
  flowrl sample stabilityai/stable-diffusion-3.5-medium+my-lora "a cat" --steps 28 --guidance 4.5 --dtype bfloat16
  flowrl sample tiny-sd3 --prompts tiny-test --limit 4 --steer none --steer fk particles=8 --rewards tiny_dense --grid
  flowrl sample --from samples/tiny-sd3/a-red-circle-a1e4a280d2-s0.png --out again
"""


def sample_options(sample: argparse.ArgumentParser) -> None:
    """Defaults are None: what is not given may come from the picture of --from."""
    what = sample.add_argument_group("what is drawn")
    what.add_argument(
        "model",
        nargs="?",
        help="an embedded name, a pipeline folder, a hub id, a run, a checkpoint; with LoRAs: MODEL+LORA[@SCALE]",
    )
    what.add_argument("prompts", nargs="*", metavar="prompt", help="prompts")
    what.add_argument("--against", nargs="+", default=[], metavar="MODEL", help="further models: same prompts, same seeds")
    what.add_argument("--prompts", dest="prompt_file", metavar="FILE", help="prompt file (.txt, .jsonl) or embedded set")
    what.add_argument("--limit", type=positive, help="prompts of the file, spread evenly over it (default: all)")
    what.add_argument("--seeds", type=positive, metavar="N", help="pictures per prompt, with seeds in a row (default 1)")
    what.add_argument(
        "--seed", type=whole, nargs="+", metavar="SEED", help="the seeds themselves, or the first of --seeds (default 0)"
    )
    what.add_argument(
        "--from", dest="source", type=Path, metavar="PICTURE", help="as this picture was drawn, but for what else is given"
    )
    how = sample.add_argument_group("how")
    how.add_argument("--steps", type=positive, help="denoising steps (default: the model's own)")
    how.add_argument("--guidance", type=float, help="guidance scale (default: the model's own)")
    how.add_argument("--height", type=positive)
    how.add_argument("--width", type=positive)
    how.add_argument(
        "--transition",
        nargs="+",
        metavar=("NAME", "key=value"),
        help="sampler: ode (default), or with noise at every step but the last: cps noise_level=0.7, ddim eta=1, flow_sde, ...",
    )
    how.add_argument("--solver", choices=("euler", "dpmpp2m"), help="how the ODE is followed (default euler; not when steering)")
    how.add_argument(
        "--steer",
        nargs="+",
        action="append",
        metavar=("METHOD", "key=value"),
        help="spend more computation on a higher reward: the first of --rewards, or reward=NAME. Repeated, one column each; "
        "`none` is the plain sampler. Prints what it cost; reports (JSON) and genealogies (PNG) go into steering/ beside the "
        "pictures. `--steer help` lists the methods",
    )
    how.add_argument("--call", nargs="+", metavar="key=value", help='further pipeline arguments, like "negative_prompt=blurry"')
    how.add_argument("--batch-size", type=positive, help="pictures per denoiser call (default: by their size, 64 at most)")
    how.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="type of the weights (default float32)")
    how.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    kept = sample.add_argument_group("what is kept")
    kept.add_argument("--out", type=Path, default=Path("samples"), help="folder (default samples), with the table samples.jsonl")
    kept.add_argument("--rewards", "--reward", nargs="+", default=[], metavar="NAME", help=REWARDS_HELP)
    kept.add_argument(
        "--grid", action="store_true", help="also a labelled sheet, grid.png: prompts x models and seeds, rewards below"
    )
    kept.add_argument("--overwrite", action="store_true", help="draw again what is there")


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


def run_train_reward(arguments: argparse.Namespace) -> int:
    from flowrl.config import ConfigError
    from flowrl.train.rewards.recipe import load_reward_recipe

    if arguments.options:
        from flowrl.train.rewards import find_task

        task = find_task(arguments.options)
        print(f"task {arguments.options}: {(task.__doc__ or '').strip()}\n")
        print_options(task, {})
        return 0
    if arguments.recipe is None:
        raise ConfigError("no recipe: give one that ships (see `flowrl recipes`) or a YAML file")
    recipe = load_reward_recipe(arguments.recipe, arguments.overrides)
    quiet_libraries()
    from flowrl.train.rewards.loop import RewardTrainer
    from flowrl.train.trainer import set_threads

    set_threads()
    trainer = RewardTrainer(recipe)
    trainer.train()
    return 0 if trainer.finished else 130


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
    from flowrl.train.rewards.recipe import RECIPES

    for command, package in (("train", "flowrl.train.recipes"), ("train-reward", RECIPES)):
        print(f"flowrl {command}")
        for name in recipe_names(package):
            first = files(package).joinpath(f"{name}.yaml").read_text().splitlines()[0]
            print(f"  {name:<24} {first.lstrip('# ')}")
    return 0


def run_rewards(arguments: argparse.Namespace) -> int:
    import inspect
    import shlex

    quiet_libraries()
    from flowrl.reward_models import EMBEDDED, REWARDS
    from flowrl.reward_models.base import embedded_folder, find_reward

    if arguments.name is None:
        for name in REWARDS:
            print(f"{name:<20} {(find_reward(name)[0].__doc__ or '').strip().splitlines()[0]}")
        print("\ntrained on the embedded world, ready to use:")
        for name in EMBEDDED:
            print(f"{name:<20} {first_sentence((embedded_folder(name) / 'README.md').read_text(encoding='utf-8'))}")
        return 0
    found, implied = find_reward(arguments.name)
    options = [] if not inspect.isclass(found) else list(inspect.signature(found).parameters.values())
    print(f"{arguments.name}\n\n{inspect.cleandoc(found.__doc__ or '')}\n")
    print_options(found, implied)
    needed = [f"{option.name}: ..." for option in options if option.default is option.empty and option.name not in implied]
    value = "{" + ", ".join(["weight: 1", *needed]) + "}" if needed else "1"
    print(f"\n  flowrl train quickstart rewards.{arguments.name}={shlex.quote(value)}")
    return 0


def first_sentence(card: str) -> str:
    """What a model card says first, on one line: it starts after the front matter and the title."""
    paragraphs = card.split("---\n", 2)[-1].strip().split("\n\n")
    said = " ".join(next(part for part in paragraphs if not part.startswith("#")).split())
    return said.split(". ")[0].rstrip(".:") + "."


def print_options(of: Any, implied: dict[str, Any]) -> None:
    """The options of a class, with their defaults and what is said of them. implied: values that a name implies."""
    import inspect
    import textwrap

    said = option_comments(of)
    for option in inspect.signature(of).parameters.values() if inspect.isclass(of) else []:
        default = implied.get(option.name, option.default)
        shown = "required" if default is option.empty else "" if "factory" in repr(default) else str(default)
        text = f"{shown:<12} {said.get(option.name, '')}".rstrip()
        print("\n".join(textwrap.wrap(text, 118, initial_indent=f"  {option.name:<20} ", subsequent_indent=" " * 36)))


def option_comments(of: Any) -> dict[str, str]:
    """What the `#:` comments above, or behind, the options of a class say, by option: the fields of a dataclass and its bases, or
    the parameters of `__init__`."""
    import dataclasses
    import inspect
    import re
    import textwrap

    comments: dict[str, str] = {}
    if not inspect.isclass(of):
        return comments
    if dataclasses.is_dataclass(of):
        sources = [inspect.getsource(cls) for cls in reversed(inspect.getmro(of)) if cls.__module__ != "builtins"]
    elif inspect.isfunction(of.__init__):
        sources = [textwrap.dedent(inspect.getsource(of.__init__)).split("\n)")[0]]
    else:
        sources = []
    for source in sources:
        above: list[str] = []
        for line in source.splitlines():
            if line.strip().startswith("#:"):
                above.append(line.strip()[2:].strip())
            elif field := re.match(r"    (\w+): .*?(?:  #: (.*))?$", line):
                comments[field[1]] = " ".join([*above, field[2] or ""]).strip() or comments.get(field[1], "")
                above = []
            elif line.strip():
                above = []
    return comments


def run_sample(arguments: argparse.Namespace) -> int:
    from flowrl.config import ConfigError

    if arguments.steer and ["help"] in arguments.steer:
        return list_steers()
    seeds = seeds_of(arguments)
    transition = section(arguments.transition, "transition")
    steers = [None if words == ["none"] else section(words, "steer") for words in arguments.steer or []]
    call = section(["call", *arguments.call], "call") if arguments.call else None
    if arguments.model is None and arguments.source is None:
        raise ConfigError("no model: give one (tiny-sd3), or --from PICTURE")
    quiet_libraries()
    import torch

    from flowrl.batch import Prompt
    from flowrl.sample import Settings, request_of, sample_to_folder

    given = {
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "height": arguments.height,
        "width": arguments.width,
        "transition": transition,
        "call": {key: value for key, value in (call or {}).items() if key != "name"} or None,
        "dtype": arguments.dtype,
        "solver": arguments.solver,
    }
    before: dict[str, Any] = request_of(arguments.source) if arguments.source else {}
    given = {name: before.get(name) if value is None else value for name, value in given.items()}
    prompts = [Prompt(text) for text in arguments.prompts]
    if arguments.prompt_file:
        prompts += spread(read_prompts(arguments.prompt_file), arguments.limit)
    if before and not prompts:
        prompts = [Prompt(before["prompt"], before["columns"])]
    if before and before["steer"] and not steers:
        steers = [{**before["steer"], "reward": before["steer_reward"]}]
    if arguments.device:
        try:
            torch.empty(0, device=arguments.device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"--device {arguments.device}: {str(error).splitlines()[0]}") from None
    result = sample_to_folder(
        [arguments.model or before["model"], *arguments.against],
        read_prompts(prompts),
        arguments.out,
        seeds=seeds or [before.get("seed", 0)],
        settings=Settings(**{name: value for name, value in given.items() if value is not None}),
        steers=steers or [None],
        rewards=arguments.rewards,
        grid=arguments.grid,
        overwrite=arguments.overwrite,
        batch_size=arguments.batch_size,
        device=arguments.device,
        progress=True,
    )
    report_samples(result)
    return 0


def seeds_of(arguments: argparse.Namespace) -> list[int]:
    """--seed 3 7 11, --seeds 4 (0 to 3), or --seed 100 --seeds 4 (100 to 103); nothing where neither is given."""
    from flowrl.config import ConfigError

    named = arguments.seed or []
    if not arguments.seeds:
        return named
    if len(named) > 1:
        raise ConfigError(f"--seeds {arguments.seeds} counts on from one --seed, but {len(named)} are given: leave --seeds out")
    first = named[0] if named else 0
    return list(range(first, first + arguments.seeds))


def section(words: list[str] | None, what: str) -> dict[str, Any] | None:
    """{name: fk, particles: 8} from `fk particles=8`. Values are JSON where they can be, and text otherwise."""
    import json

    import yaml

    from flowrl.config import ConfigError

    if not words:
        return None
    name, *pairs = words
    values: dict[str, Any] = {"name": name}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(
                f"--{what}: {pair!r} is not key=value" + ("; prompts stand right after the model" if " " in pair else "")
            )
        try:
            values[key] = yaml.safe_load(text) if text.startswith(("{", "[")) else json.loads(text)
        except (ValueError, yaml.YAMLError):
            values[key] = text
    return values


def list_steers() -> int:
    import dataclasses

    from flowrl.samplers.steering import STEERS

    for name, cls in STEERS.items():
        options = [f"{f.name}={'none' if f.default is None else f.default}" for f in dataclasses.fields(cls)]
        print(f"{name}: {(cls.__doc__ or '').strip().splitlines()[0]}\n    {'  '.join(options)}\n")
    return 0


def report_samples(result: Any) -> None:
    """Where the pictures are, their mean rewards, what steering cost."""
    from flowrl.evaluate import text_table

    columns = list(dict.fromkeys(row["column"] for row in result.rows))
    names = list(result.rows[0]["rewards"])
    if names:
        table = []
        for column in columns:
            scores = [row["rewards"] for row in result.rows if row["column"] == column]
            means = [[v for row in scores if (v := row[name]) is not None] for name in names]
            table.append([column, *(f"{sum(m) / len(m):.3f}" if m else "-" for m in means), str(len(scores))])
        print(text_table(["mean", *names, "pictures"], table), end="\n\n")
    for column, lines in result.accounts.items():
        width = max((len(name) for name, _ in lines), default=0)
        print(column, *(f"  {name.ljust(width)}  {value}" for name, value in lines), sep="\n", end="\n\n")
    if result.repeated:
        print(f"{result.repeated} repeated prompts were drawn once")
    kept = len(result.rows) - result.drawn
    count = f"{len(result.rows)} picture{'s' if len(result.rows) > 1 else ''}"
    print(f"{count} in {result.folder}" + (f" ({kept} of them there already)" if kept else ""))
    for sheet in result.sheets:
        print(sheet)


def run_eval(arguments: argparse.Namespace) -> int:
    import json

    from flowrl.evaluate import comparison_rows, score_rows, text_table
    from flowrl.record import write_text

    if arguments.out:
        make_folder(arguments.out.parent)
    models = [arguments.model, *([arguments.against] if arguments.against else [])]
    results = evaluate_models(models, arguments, limit=arguments.limit)
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
    from flowrl.sample import Settings, command_of, request_for

    check_replaceable(arguments.out)
    make_folder(arguments.out.parent)
    results = evaluate_models(arguments.models, arguments, keep_images=True, limit=arguments.limit)
    cells = []
    for model, result in zip(arguments.models, results, strict=True):
        assert result.samples is not None and result.samples.images is not None
        for i, picture in enumerate(to_pil(result.samples.images)):
            p, s = divmod(i, arguments.seeds)
            scores = {name: None if (v := float(result.scores[p, s, k])) != v else v for k, name in enumerate(result.rewards)}
            image = beside(picture) if isinstance(picture, list) else picture
            prompt = result.prompts[p]
            steps, guidance = result.protocol.num_inference_steps, result.protocol.guidance_scale
            settings = Settings(steps, guidance, arguments.height, arguments.width, dtype=arguments.dtype)
            details = {
                "steps": str(steps),
                "guidance": str(guidance),
                "noise seed": str(result.seeds[p][s]),
                "command": command_of(request_for(model, prompt, result.seeds[p][s], settings)),
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


def run_serve(arguments: argparse.Namespace) -> int:
    from flowrl.config import ConfigError
    from flowrl.reward_models.wire import Limits
    from flowrl.serve import serve

    if arguments.port > 65535:
        raise ConfigError(f"--port {arguments.port}: a port is at most 65535")
    quiet_libraries()
    serve(
        arguments.rewards,
        arguments.host,
        arguments.port,
        token_env=arguments.token_env,
        everybody=arguments.everybody,
        limits=Limits(arguments.max_batch, arguments.max_pixels, arguments.max_megabytes),
        window=arguments.batch_window_ms / 1000,
        device=arguments.device,
    )
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


def spread(prompts: list[Any], limit: int | None) -> list[Any]:
    """At most `limit` prompts, evenly from the whole list."""
    return [prompts[i * len(prompts) // limit] for i in range(limit)] if limit and len(prompts) > limit else prompts


def make_folder(folder: Path) -> None:
    from flowrl.config import ConfigError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made: {error.strerror}") from None


def open_model(model: str, arguments: argparse.Namespace) -> Any:
    quiet_libraries()
    import torch

    from flowrl.sources import Source

    size = {k: v for k, v in {"height": arguments.height, "width": arguments.width}.items() if v is not None}
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Source.parse(model).open(arguments.dtype, device, **size)


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
    from flowrl.reward_models.base import short_labels
    from flowrl.sources import Source

    prompts = spread(read_prompts(arguments.prompt_file), limit)
    rewards = {label: load_reward(name) for name, label in short_labels(arguments.rewards).items()}
    results, shared = [], None
    for model in models:
        policy = open_model(model, arguments)
        shared = shared or protocol(arguments, policy)
        name = Source.parse(model).label
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
