"""What commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: Held-out prompts and exact rewards of the embedded worlds: what is drawn and scored where nothing is said.
PICTURES = ("tiny-test", ("tiny_strict", "tiny_dense"))
CLIPS = ("tiny-video-test", ("tiny_video_strict", "tiny_video_dense"))
REWARDS_HELP = 'rewards: names, folders, dotted paths, or "NAME key=value"; `flowrl rewards` lists them'


def command(commands: Any, name: str, run: Callable[..., int], help: str, **kwargs: Any) -> argparse.ArgumentParser:
    """A subcommand, to which options are added. run: takes the arguments, returns the exit code."""
    sub = commands.add_parser(
        name,
        help=help,
        description=kwargs.pop("description", help),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **kwargs,
    )
    sub.set_defaults(run=run)
    return sub


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 62:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2^62")
    return int(text)


def world_of(models: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Prompts and rewards where nothing is said: of clips, where all models are tiny-wan or were trained from it; of pictures."""
    from flowrl.sources import Source

    moving = models and all(Source.parse(model).base == "tiny-wan" for model in models)
    return CLIPS if moving else PICTURES


def sampling_options(parser: argparse.ArgumentParser, seeds: int, batch_size: int | None = 64) -> None:
    group = parser.add_argument_group("sampling (always by the ODE)")
    group.add_argument(
        "--prompts",
        dest="prompt_file",
        help=f"prompt file (.txt, .jsonl) or embedded set (default {PICTURES[0]}; of tiny-wan {CLIPS[0]})",
    )
    group.add_argument("--seeds", type=positive, default=seeds, help=f"samples per prompt (default {seeds})")
    group.add_argument("--seed", type=int, default=0, help="first seed (default 0)")
    group.add_argument("--steps", type=positive, default=None, help="denoising steps (default: the model's own, or 28)")
    group.add_argument("--guidance", type=float, default=None, help="guidance scale (default: the model's own)")
    group.add_argument("--height", type=positive, default=None)
    group.add_argument("--width", type=positive, default=None)
    group.add_argument("--num-frames", type=positive, default=None, help="frames of clips (default: the model's own)")
    group.add_argument("--fps", type=float, default=None, help="frames per second of clips (default: the model's own)")
    usual = batch_size or "by their size, 64 at most"
    group.add_argument("--batch-size", type=positive, default=batch_size, help=f"samples per denoiser call (default {usual})")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="type of the weights")
    group.add_argument("--device", default=None, help="cpu, cuda, ... (default: a GPU if there is one)")


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


def size_of(arguments: argparse.Namespace) -> dict[str, int]:
    """Arguments of the pipeline that say how large a picture or clip is, where they are given."""
    return {name: value for name in ("height", "width", "num_frames") if (value := getattr(arguments, name)) is not None}


def open_model(model: str, arguments: argparse.Namespace, prompts: Sequence[Any] = ()) -> Any:
    """The policy. Raises ConfigError, before weights are loaded, for frames, rates and prompts that do not suit it."""
    quiet_libraries()
    import torch

    from flowrl.sample import Settings, facts_for
    from flowrl.sources import Source

    source, size = Source.parse(model), size_of(arguments)
    facts_for(source, prompts, Settings(call=size, fps=arguments.fps))
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    policy = source.open(arguments.dtype, device, **size)
    if arguments.fps is not None:
        policy.set_fps(arguments.fps)
    return policy


def protocol(arguments: argparse.Namespace, call: dict[str, Any]) -> Any:
    """What the arguments say, and otherwise the defaults of a model's call."""
    from flowrl.evaluate import Protocol

    steps = arguments.steps or call.get("num_inference_steps", 28)
    guidance = arguments.guidance if arguments.guidance is not None else call.get("guidance_scale")
    return Protocol(str(arguments.prompt_file), steps, guidance, arguments.seeds, arguments.seed, dtype=arguments.dtype)


def is_averaged(model: str) -> bool | None:
    """Whether a model's weights are averages, as those of runs and checkpoints are; None for other models."""
    from flowrl.sources import Source

    source = Source.parse(model)
    places = [Path(source.model), *(Path(path) for path, _ in source.loras)]
    ours = any((place / "recipe.yaml").is_file() or (place / "training_state").is_dir() for place in places)
    return True if ours else None


def evaluate_models(
    models: list[str], arguments: argparse.Namespace, keep_images: bool = False, limit: int | None = None
) -> list[Any]:
    """Every model under the protocol of the first one's defaults."""
    from flowrl.reward_models import load_reward
    from flowrl.reward_models.base import short_labels

    prompts = spread(read_prompts(arguments.prompt_file), limit)
    specs = short_labels(arguments.rewards)
    rewards = {label: load_reward(name) for name, label in specs.items()}
    results, shared = [], None
    for model in models:
        policy = open_model(model, arguments, prompts)
        shared = shared or protocol(arguments, policy.call)
        results.append(evaluate_model(model, policy, prompts, rewards, shared, arguments.batch_size, keep_images=keep_images))
    return results


def evaluate_model(
    model: str, policy: Any, prompts: list[Any], rewards: dict[str, Any], shared: Any, batch_size: int, **options: Any
) -> Any:
    """One model that is open, as its pictures look in files. options: of `flowrl.evaluate.evaluate`."""
    from dataclasses import replace

    from flowrl.evaluate import evaluate
    from flowrl.sources import Source

    source = Source.parse(model)
    shared = replace(shared, ema=is_averaged(model))
    result = evaluate(
        policy, prompts, rewards, shared, name=source.label, batch_size=batch_size, progress=True, rounded=True, **options
    )
    result.weights = source.digest()
    return result
