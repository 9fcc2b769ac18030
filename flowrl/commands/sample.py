"""`flowrl sample`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowrl.commands.common import REWARDS_HELP, command, positive, quiet_libraries, read_prompts, spread, whole

SAMPLE_HELP = """\
Draw pictures: one PNG for each model, prompt and seed; of video models clips, as animated WebP or mp4. All that drew a picture
stands inside it, its name depends on prompt and seed alone, and the same command gives the same files: what is there already is
kept, so an interrupted command goes on.

  flowrl sample tiny-sd3 "a red circle" "two blue squares" --seeds 4 --grid
  flowrl sample tiny-sd3 --prompts tiny-test --limit 20 --rewards tiny_strict tiny_dense
  flowrl sample tiny-sd3 "a red circle" --against tiny-sd3+runs/demo@0.5 runs/demo --grid
  flowrl sample stabilityai/stable-diffusion-3.5-medium+my-lora "a cat" --steps 28 --guidance 4.5 --dtype bfloat16
  flowrl sample tiny-sd3 --prompts tiny-test --limit 4 --steer none --steer fk particles=8 --rewards tiny_dense --grid
  flowrl sample --from samples/tiny-sd3/a-red-circle-a1e4a280d2-s0.png --out again
"""


def add(commands: Any) -> None:
    sample = command(
        commands, "sample", run_sample, "draw pictures from models, runs, checkpoints and LoRAs", description=SAMPLE_HELP
    )
    sample_options(sample)


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
        "--image", type=Path, metavar="FILE", help="what image-to-video models start from (prompt files: column image)"
    )
    what.add_argument(
        "--from", dest="source", type=Path, metavar="PICTURE", help="as this picture was drawn, but for what else is given"
    )
    how = sample.add_argument_group("how")
    how.add_argument("--steps", type=positive, help="denoising steps (default: the model's own)")
    how.add_argument("--guidance", type=float, help="guidance scale (default: the model's own)")
    how.add_argument("--height", type=positive)
    how.add_argument("--width", type=positive)
    how.add_argument("--fps", type=float, help="frames per second of clips (default: the model's own; Wan 16)")
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
    kept.add_argument(
        "--clip-format",
        choices=("webp", "mp4"),
        help="how clips are stored: webp, lossless (default), or mp4, small (wants PyAV)",
    )
    kept.add_argument("--rewards", "--reward", nargs="+", default=[], metavar="NAME", help=REWARDS_HELP)
    kept.add_argument(
        "--grid", action="store_true", help="also a labelled sheet, grid.png: prompts x models and seeds, rewards below"
    )
    kept.add_argument("--overwrite", action="store_true", help="draw again what is there")


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
        "fps": arguments.fps,
    }
    before: dict[str, Any] = request_of(arguments.source) if arguments.source else {}
    given = {name: before.get(name) if value is None else value for name, value in given.items()}
    prompts = [Prompt(text) for text in arguments.prompts]
    if arguments.prompt_file:
        prompts += spread(read_prompts(arguments.prompt_file), arguments.limit)
    if arguments.image:
        shared = {"image": str(arguments.image.resolve())}
        prompts = [replace(prompt, columns={**shared, **prompt.columns}) for prompt in prompts]
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
        clip_format=arguments.clip_format or ("mp4" if arguments.source and arguments.source.suffix == ".mp4" else "webp"),
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
