"""What a run leaves behind: metrics, sample pictures, checkpoints, a model card. All in one folder, readable without us.

    RUN/recipe.yaml  environment.json  metrics.jsonl  alarms.jsonl  README.md  tracker/
    RUN/samples/step-000010/{0000.png (.webp, .mp4), ..., samples.jsonl}
    RUN/watch/step-000031.png
    RUN/checkpoint-50/{pytorch_lora_weights.safetensors | model/, training_state/}
    RUN/{pytorch_lora_weights.safetensors | model/}                         the result: averaged weights

What is read again appears whole or not at all: it is written beside its place, flushed to disk, and renamed; what goes is
renamed first. Whatever moment a run is killed at, only names that begin with `.writing-` are left over.
"""

from __future__ import annotations

import json
import os
import pickle
import platform
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowrl.batch import Samples
from flowrl.clips import FORMS, RATE, SMALL, clip_bytes
from flowrl.config import ConfigError, Recipe
from flowrl.policy import LORA_FILE, Policy
from flowrl.reward_models.base import LearningReward

STATE = "training_state"
UNFINISHED = ".writing-"


# ------------------------------------------------------------------------------------------------ the folder


def prepare_folder(folder: Path, checkpoint: Path | None) -> None:
    """Make the run's folder and prove that it can be written, before any weight is loaded; clear what a killed run left."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file")
    going_on = lies_in(checkpoint, folder)
    if not going_on and (folder / "metrics.jsonl").exists():
        rest = "go on with resume_from_checkpoint=latest" if checkpoints(folder) else "remove it: it has no checkpoint"
        raise ConfigError(f"output_dir {folder} holds a run already; choose another, or {rest}")
    if checkpoint is not None and going_on and (newest := checkpoints(folder)[-1]).name != checkpoint.resolve().name:
        raise ConfigError(
            f"output_dir {folder} holds {newest.name}, which is later than {checkpoint.name}: "
            "remove it, or go on in another output_dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"flowrl")
            probe.flush()
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be written: {error.strerror}") from None
    for leftover in list(folder.rglob(f"{UNFINISHED}*")):
        shutil.rmtree(leftover, ignore_errors=True)


def lies_in(checkpoint: Path | None, folder: Path) -> bool:
    """Whether a run in `folder` that starts from this checkpoint goes on with what is there."""
    return checkpoint is not None and checkpoint.resolve().parent == folder.resolve()


class RunRecipe(Protocol):
    """What a recipe of any kind says about its run."""

    output_dir: str
    resume_from_checkpoint: str | None

    def to_yaml(self) -> str: ...


def write_facts(folder: Path, recipe: RunRecipe) -> None:
    """What is trained, and on what."""
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    write_text(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")


def environment() -> dict[str, str]:
    """Versions and hardware, for the record."""
    packages = ("flowrl-diffusion", "torch", "diffusers", "transformers", "accelerate", "peft", "numpy")
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"python": platform.python_version(), **found, "device": device, "threads": str(torch.get_num_threads())}


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    with writing(path), unfinished(path.parent) as temporary:
        (temporary / path.name).write_text(text, encoding="utf-8")
        move(temporary / path.name, path)


class Lines:
    """A file of JSON lines, each of a step; resuming drops the lines of steps that will be taken again."""

    def __init__(self, path: Path, from_step: int):
        self.path = path
        if path.exists():
            kept = []
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # a line cut short when the run was killed
                    continue
                if row["step"] <= from_step:
                    kept.append(line)
            write_text(path, "".join(line + "\n" for line in kept))

    def append(self, step: int, row: Mapping[str, Any]) -> None:
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")


class Metrics(Lines):
    """`metrics.jsonl`, one line per step."""

    def write(self, step: int, values: dict[str, float]) -> None:
        self.append(step, {k: _number(v) for k, v in values.items()})


def _number(value: float) -> float | None:
    """Rounded to six figures; NaN is null in JSON."""
    return None if value != value else float(f"{value:.6g}")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ samples


#: A saved step holds at most so many pictures, and of clips at most so many pixels, but FEWEST of them at least.
MOST_SAMPLES, MOST_PIXELS, FEWEST = 64, 1 << 27, 8
#: Of saved clips whose longer side has more than `flowrl.clips.SMALL` pixels, which without loss would take ten times the place.
QUALITY = 90


def write_samples(
    folder: Path, step: int, samples: Samples, scores: Tensor, names: Sequence[str], advantage: Tensor, clip_format: str = "webp"
) -> None:
    """Pictures or clips, and a table of one step: prompt, seed, every reward (N, K), advantage (N,).

    clip_format: webp, small clips without loss, or mp4.
    """
    from flowrl.reward_models.base import to_pil

    images = samples.images
    assert images is not None
    limit, quality = MOST_SAMPLES, QUALITY if max(images.shape[-2:]) > SMALL else None
    if images.ndim == 5:
        limit = min(limit, max(FEWEST, MOST_PIXELS // (images[0].numel() // 3)))
    with written_whole(folder / "samples" / f"step-{step:06d}") as place:
        rows = []
        for i, picture in enumerate(to_pil(images[:limit])):
            if isinstance(picture, list):
                file = f"{i:04d}{FORMS[clip_format]}"
                (place / file).write_bytes(clip_bytes(picture, samples.fps or RATE, clip_format, quality=quality))
            else:
                file = f"{i:04d}.png"
                picture.save(place / file)
            rewards = {name: _number(float(scores[i, k])) for k, name in enumerate(names)}
            row = {"file": file, "prompt": samples.texts[i], "seed": samples.seeds[i], "group": int(samples.group[i])}
            rows.append({**row, "rewards": rewards, "advantage": _number(float(advantage[i]))})
        (place / "samples.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )


def beside(frames: list[Any]) -> Any:
    """Frames of a clip as one strip."""
    from PIL import Image

    strip = Image.new("RGB", (sum(frame.width for frame in frames), frames[0].height))
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * frame.width, 0))
    return strip


# ------------------------------------------------------------------------------------------------ checkpoints


@contextmanager
def unfinished(parent: Path):
    """A new folder in `parent` that is gone afterwards, unless it was moved."""
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=parent))
    os.chmod(temporary, 0o755)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def written_whole(place: Path):
    """A folder that is filled under a temporary name, flushed and renamed; an error leaves nothing behind."""
    with writing(place), unfinished(place.parent) as temporary:
        yield temporary
        move(temporary, place)


@contextmanager
def writing(path: Path):
    """Name the file in the errors of a disk: those of a full one do not, and torch and safetensors have errors of their own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path} cannot be written: {getattr(cause, 'strerror', None) or cause}") from error


def flush(*paths: Path) -> None:
    """Files and folders to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def move(source: Path, place: Path) -> None:
    """Put a finished file or folder into place, over what is there."""
    flush(*source.rglob("*"), source)
    if place.is_dir():
        remove(place)
    os.replace(source, place)
    flush(place.parent)


def remove(folder: Path) -> None:
    """Delete a folder; a kill in between leaves no half of it under its name."""
    with unfinished(folder.parent) as doomed:
        os.rename(folder, doomed)


@dataclass
class Progress:
    """Where a run stands: steps and updates done, samples drawn, seconds spent training."""

    step: int = 0
    updates: int = 0
    images: int = 0
    seconds: float = 0.0


class Stateful(Protocol):
    """A part of the loop that a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save_weights(policy: Policy, folder: Path, weights: str) -> None:
    """The trained weights as users load them: a LoRA file, or a pipeline in `model/`."""
    policy.save(folder if policy.has_lora else folder / "model", weights)


def save_result(policy: Policy, folder: Path) -> None:
    """The averaged weights, into the run's folder beside what is there."""
    with writing(folder), unfinished(folder) as temporary:
        save_weights(policy, temporary, "ema")
        for path in temporary.iterdir():
            move(path, folder / path.name)


def save_checkpoint(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    progress: Progress,
    limit: int,
    learning: Mapping[str, LearningReward] | None = None,
    keeping: Mapping[str, Stateful] | None = None,
) -> Path:
    """Everything a run needs to go on bit for bit, under `checkpoint-STEP`; then the oldest beyond `limit` go.

    learning: the rewards that learn during the run, by name. keeping: whatever else has a state, by name.
    """
    place = folder / f"checkpoint-{progress.step}"
    with written_whole(place) as temporary:
        state = temporary / STATE
        state.mkdir()
        save_file({key: p.detach().contiguous() for key, p in policy.trainable().items()}, state / "policy.safetensors")
        for name, tensors in policy.snapshots.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, state / f"snapshot-{name}.safetensors")
        with (state / "optimizer.pt").open("wb") as file:
            torch.save(optimizer.state_dict(), file)
        torch.save({"torch": torch.get_rng_state()}, state / "rng.pt")
        if learning:
            torch.save({name: reward.state_dict() for name, reward in learning.items()}, state / "rewards.pt")
        if keeping:
            torch.save({name: part.state_dict() for name, part in keeping.items()}, state / "loop.pt")
        python = random.getstate()
        numpy_state: Any = np.random.get_state()
        facts = {
            "progress": vars(progress),
            "recipe": vars(recipe),
            "python_rng": [python[0], list(python[1]), python[2]],
            "numpy_rng": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        }
        (state / "state.json").write_text(json.dumps(facts))
        save_weights(policy, temporary, "ema" if "ema" in policy.snapshots else "policy")
    prune(folder, limit)
    return place


def prune(folder: Path, limit: int) -> None:
    """Remove the oldest checkpoints beyond `limit`; 0 keeps all."""
    for old in checkpoints(folder)[:-limit] if limit else []:
        remove(old)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and (path / STATE / "state.json").is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(recipe: RunRecipe) -> Path | None:
    """The folder that `resume_from_checkpoint` means. Raises ConfigError when there is none."""
    wanted = recipe.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted == "latest":
        found = checkpoints(Path(recipe.output_dir))
        if not found:
            raise ConfigError(f"resume_from_checkpoint=latest: no checkpoint in {recipe.output_dir}")
        return found[-1]
    if not (Path(wanted) / STATE / "state.json").is_file():
        raise ConfigError(f"resume_from_checkpoint: {wanted} is not a checkpoint of flowrl (no {STATE}/state.json)")
    return Path(wanted)


def read_state(checkpoint: Path, *more: str) -> dict[str, Any]:
    """Progress, recipe and `more` of a checkpoint's state. Raises ConfigError when they cannot be read."""
    try:
        facts = json.loads((checkpoint / STATE / "state.json").read_text())
        return {name: facts[name] for name in ("progress", "recipe", *more)}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{checkpoint} is not a whole checkpoint of flowrl: {STATE}/state.json cannot be read") from None


#: Options that a checkpoint fixes: with another value its weights do not fit or mean something else.
FIXED = ("model", "lora", "train", "lora_rank", "lora_alpha", "lora_targets", "objective", "seed")


def check_resumable(checkpoint: Path, recipe: RunRecipe, fixed: Sequence[str] = FIXED) -> list[str]:
    """Compare the checkpoint's recipe with the run's. Raises ConfigError when they cannot go together; returns what changed."""
    saved = read_state(checkpoint)["recipe"]
    ours = json.loads(json.dumps(vars(recipe)))
    for name in fixed:
        if saved.get(name) != ours[name]:
            raise ConfigError(
                f"{checkpoint} was trained with {name}={saved.get(name)!r}, this recipe says {ours[name]!r}: start a new run"
            )
    ignored = ("resume_from_checkpoint", "output_dir", "max_steps", "max_minutes")
    return [
        f"{name}: {saved.get(name)!r} -> {ours[name]!r}" for name in ours if name not in ignored and saved.get(name) != ours[name]
    ]


@contextmanager
def reading(checkpoint: Path):
    """A file that cannot be read becomes a ConfigError that names the checkpoint."""
    try:
        yield
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{checkpoint} is damaged: {error}") from None


def put_weights(checkpoint: Path, weights: dict[str, Tensor], places: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's tensors into those of a model. Raises ConfigError when names or shapes differ."""
    differing = sorted(set(weights) ^ set(places)) or [key for key, place in places.items() if place.shape != weights[key].shape]
    if differing:
        raise ConfigError(
            f"{checkpoint} is of another model: {len(differing)} weights differ in name or shape, first {differing[0]}"
        )
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(weights[key])


def load_reward_states(checkpoint: Path, learning: Mapping[str, LearningReward]) -> None:
    """Put back what rewards had learnt. Raises ConfigError when the checkpoint holds other learning rewards."""
    file = checkpoint / STATE / "rewards.pt"
    with reading(checkpoint):
        states = torch.load(file, weights_only=True) if file.is_file() else {}
    if set(states) != set(learning):
        raise ConfigError(
            f"{checkpoint} holds the state of rewards that learn: {sorted(states) or 'none'}, this recipe has "
            f"{sorted(learning) or 'none'}: start a new run"
        )
    for name, reward in learning.items():
        reward.load_state_dict(states[name])


def load_states(checkpoint: Path, keeping: Mapping[str, Stateful]) -> None:
    """Put back the state of parts of the loop; those that the checkpoint knows nothing of start as new."""
    file = checkpoint / STATE / "loop.pt"
    with reading(checkpoint):
        states = torch.load(file, weights_only=True) if file.is_file() else {}
    for name, part in keeping.items():
        if name in states:
            part.load_state_dict(states[name])


def load_checkpoint(checkpoint: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> Progress:
    """Put weights, snapshots, optimiser and random states back.

    Raises ConfigError when the weights are of another model or a file is damaged.
    """
    state, facts = checkpoint / STATE, read_state(checkpoint, "python_rng", "numpy_rng")
    with reading(checkpoint):
        weights = load_file(state / "policy.safetensors")
        snapshots = {file.stem.removeprefix("snapshot-"): load_file(file) for file in state.glob("snapshot-*.safetensors")}
        optimizer_state = torch.load(state / "optimizer.pt", weights_only=True, map_location=policy.device)
        random_state = torch.load(state / "rng.pt", weights_only=True)["torch"]
    put_weights(checkpoint, weights, policy.trainable())
    for name, tensors in snapshots.items():  # copied: where a file's tensors lie in memory decides a matmul's last bits
        policy.snapshots[name] = {key: tensor.to(policy.device, copy=True) for key, tensor in tensors.items()}
    optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(random_state)
    version_, words, gauss = facts["python_rng"]
    random.setstate((version_, tuple(words), gauss))
    name, keys, *rest = facts["numpy_rng"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    return Progress(**facts["progress"])


def trained_parts(source: str | Path) -> tuple[str, Path | None]:
    """The model and the LoRA folder on top of it (None: none) that a run's folder, a checkpoint, or a plain model stands for.

    Raises ConfigError with the cause; whether a plain model exists is `flowrl.policy.resolve_model`'s to say.
    """
    path = Path(source)
    if (path / STATE / "state.json").is_file():
        recipe = read_state(path)["recipe"]
    elif (path / "recipe.yaml").is_file():
        recipe = yaml.safe_load((path / "recipe.yaml").read_text())
        if "model" not in recipe:
            raise ConfigError(f"{path} is a run of train-reward: a reward, rewards.{path}=1, not a model")
        if not (path / LORA_FILE).is_file() and not (path / "model").is_dir():
            found = checkpoints(path)
            if not found:
                raise ConfigError(f"run {path} has no result and no checkpoint yet")
            path = found[-1]
    else:
        return str(source), None
    base = recipe.get("model", "")
    return (base, path) if (path / LORA_FILE).is_file() else (str(path / "model"), None)


def load_trained(source: str | Path, **options: Any) -> Policy:
    """A policy from anything that can be looked at: a run's folder, a checkpoint, a LoRA folder's run, or a plain model.

    options go to `Policy.load`. Raises FileNotFoundError or ConfigError with the cause.
    """
    model, lora = trained_parts(source)
    return Policy.load(model, lora=lora, **options)


# ------------------------------------------------------------------------------------------------ model card

CARD = """---
base_model: {model}
library_name: diffusers
tags: [flowrl, text-to-{modality}, {tags}]
---

# {name}

{model} aligned with flowrl ({method}) on {images} generated {modality}s, {steps} steps, {minutes:.1f} minutes.

| | |
|---|---|
| rewards (weight) | {rewards} |
| prompts | {prompts}, {per_step} per step x {generations} generations |
| sampler in training | {transition}, {inference_steps} steps, stochastic: {window} |
| trained | {trained} |
| seed | {seed} |
| hardware | {device} |

## Use

```python
{usage}
```

## Reproduce

`flowrl train recipe.yaml`, with the `recipe.yaml` beside this file ({versions}).

Rewards are proxies: look at the pictures (`flowrl gallery {model} {folder}`) and at rewards that were not trained on.
"""


def write_model_card(folder: Path, policy: Policy, recipe: Recipe, progress: Progress) -> None:
    """README.md of the run: what was done, how to use it, how to repeat it."""
    clips, pipeline = policy.facts.draws_clips, type(policy.pipe).__name__
    call = ", ".join(f"{k}={v!r}" for k, v in policy.call.items() if k != "num_inference_steps")
    call = ", ".join([*(f"{name}={name}" for name in policy.facts.needed_conditions), *([call] if call else [])])
    drawn = f"image = pipe(prompt, {call}).images[0]"
    if clips:
        drawn = f'frames = pipe(prompt, {call}).frames[0]\nexport_to_video(frames, "clip.mp4", fps={policy.fps or RATE:g})'
    load = f'pipe = DiffusionPipeline.from_pretrained("{recipe.model}")\npipe.load_lora_weights("{folder}")'
    if not policy.has_lora:
        load = f'pipe = DiffusionPipeline.from_pretrained("{folder}/model")'
    facts = environment()
    text = CARD.format(
        model=recipe.model,
        name=folder.name,
        modality="video" if clips else "image",
        tags="lora" if policy.has_lora else "full",
        method=recipe.objective.get("name"),
        images=progress.images,
        steps=progress.step,
        minutes=progress.seconds / 60,
        rewards=", ".join(
            f"{name} ({value if not isinstance(value, dict) else value.get('weight', 1)})"
            for name, value in recipe.rewards.items()
        ),
        prompts=recipe.prompts,
        per_step=recipe.prompts_per_step,
        generations=recipe.num_generations,
        transition=recipe.transition,
        inference_steps=recipe.num_inference_steps,
        window=recipe.steps,
        trained=f"LoRA of rank {recipe.lora_rank}" if policy.has_lora else "all weights of the denoiser",
        seed=recipe.seed,
        device=facts["device"],
        usage=f"from diffusers import DiffusionPipeline  # {pipeline}\n"
        + ("from diffusers.utils import export_to_video\n" if clips else "")
        + f"\n{load}\n{drawn}",
        versions=", ".join(f"{k} {facts[k]}" for k in ("torch", "diffusers", "peft")),
        folder=folder,
    )
    write_text(folder / "README.md", text)


#: A hook that the loop calls after each step: hook(trainer, step, metrics).
Hook = Callable[[Any, int, dict[str, float]], None]
__all__ = ["LORA_FILE", "Hook", "Metrics", "Progress"]
