"""What a run leaves behind: metrics, sample pictures, checkpoints, a model card. All in one folder, readable without us.

    RUN/recipe.yaml  environment.json  metrics.jsonl  README.md  tracker/
    RUN/samples/step-000010/{0000.png, ..., samples.jsonl}
    RUN/checkpoint-50/{pytorch_lora_weights.safetensors | model/, training_state/}
    RUN/{pytorch_lora_weights.safetensors | model/}                         the result: averaged weights

A checkpoint folder appears whole or not at all: it is written beside its place, flushed to disk, and renamed.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowrl.batch import Samples
from flowrl.config import ConfigError, Recipe
from flowrl.policy import LORA_FILE, Policy

STATE = "training_state"


# ------------------------------------------------------------------------------------------------ the folder


def prepare_folder(folder: Path, recipe: Recipe, resuming: bool) -> None:
    """Make the run's folder and prove that it can be written, before any weight is loaded."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file")
    if not resuming and (folder / "metrics.jsonl").exists():
        raise ConfigError(f"output_dir {folder} holds a run already; choose another, or go on with resume_from_checkpoint=latest")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"flowrl")
            probe.flush()
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be written: {error.strerror}") from None
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
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
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


class Metrics:
    """`metrics.jsonl`, one line per step; resuming drops the lines of steps that will be taken again."""

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

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **{k: _number(v) for k, v in values.items()}}) + "\n")


def _number(value: float) -> float | None:
    """Rounded to six figures; NaN is null in JSON."""
    return None if value != value else float(f"{value:.6g}")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ samples


def write_samples(folder: Path, step: int, samples: Samples, scores: Tensor, names: Sequence[str], advantage: Tensor, limit: int = 64) -> None:
    """Pictures (clips: their frames side by side) and a table of one step: prompt, seed, every reward (N, K), advantage (N,)."""
    from flowrl.reward_models.base import to_pil

    assert samples.images is not None
    with written_whole(folder / "samples" / f"step-{step:06d}") as place:
        rows = []
        for i, picture in enumerate(to_pil(samples.images[:limit])):
            file = f"{i:04d}.png"
            (beside(picture) if isinstance(picture, list) else picture).save(place / file)
            rewards = {name: _number(float(scores[i, k])) for k, name in enumerate(names)}
            row = {"file": file, "prompt": samples.texts[i], "seed": samples.seeds[i], "group": int(samples.group[i])}
            rows.append({**row, "rewards": rewards, "advantage": _number(float(advantage[i]))})
        (place / "samples.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def beside(frames: list[Any]) -> Any:
    """Frames of a clip as one strip."""
    from PIL import Image

    strip = Image.new("RGB", (sum(frame.width for frame in frames), frames[0].height))
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * frame.width, 0))
    return strip


# ------------------------------------------------------------------------------------------------ checkpoints


@contextmanager
def written_whole(place: Path):
    """A folder that is filled under a temporary name, flushed and renamed; an error leaves nothing behind."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=place.parent))
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.chmod(temporary, 0o755)
        if place.exists():
            shutil.rmtree(place)
        os.rename(temporary, place)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@dataclass
class Progress:
    """Where a run stands: steps and updates done, samples drawn, seconds spent training."""

    step: int = 0
    updates: int = 0
    images: int = 0
    seconds: float = 0.0


def save_weights(policy: Policy, folder: Path, weights: str) -> None:
    """The trained weights as users load them: a LoRA file, or a pipeline in `model/`."""
    policy.save(folder if policy.has_lora else folder / "model", weights)


def save_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, recipe: Recipe, progress: Progress, limit: int) -> Path:
    """Everything a run needs to go on bit for bit, under `checkpoint-STEP`; then the oldest beyond `limit` go."""
    place = folder / f"checkpoint-{progress.step}"
    with written_whole(place) as temporary:
        state = temporary / STATE
        state.mkdir()
        save_file({key: p.detach().contiguous() for key, p in policy.trainable().items()}, state / "policy.safetensors")
        for name, tensors in policy.snapshots.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, state / f"snapshot-{name}.safetensors")
        torch.save(optimizer.state_dict(), state / "optimizer.pt")
        torch.save({"torch": torch.get_rng_state()}, state / "rng.pt")
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
    for old in checkpoints(folder)[:-limit] if limit else []:
        shutil.rmtree(old, ignore_errors=True)
    return place


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and (path / STATE / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(recipe: Recipe) -> Path | None:
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


#: Options that a checkpoint fixes: with another value its weights do not fit or mean something else.
FIXED = ("model", "lora", "train", "lora_rank", "lora_alpha", "lora_targets", "objective", "seed")


def check_resumable(checkpoint: Path, recipe: Recipe) -> list[str]:
    """Compare the checkpoint's recipe with the run's. Raises ConfigError when they cannot go together; returns what else changed."""
    saved = json.loads((checkpoint / STATE / "state.json").read_text())["recipe"]
    ours = json.loads(json.dumps(vars(recipe)))
    for name in FIXED:
        if saved.get(name) != ours[name]:
            raise ConfigError(f"{checkpoint} was trained with {name}={saved.get(name)!r}, this recipe says {ours[name]!r}; start a new run instead")
    ignored = ("resume_from_checkpoint", "output_dir", "max_steps", "max_minutes")
    return [f"{name}: {saved.get(name)!r} -> {ours[name]!r}" for name in ours if name not in ignored and saved.get(name) != ours[name]]


def load_checkpoint(checkpoint: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> Progress:
    """Put weights, snapshots, optimiser and random states back. Raises ConfigError when the weights are of another model."""
    state = checkpoint / STATE
    weights = load_file(state / "policy.safetensors")
    trainable = policy.trainable()
    differing = sorted(set(weights) ^ set(trainable)) or [key for key, p in trainable.items() if p.shape != weights[key].shape]
    if differing:
        raise ConfigError(f"{checkpoint} is of another model: {len(differing)} weights differ in name or shape, first {differing[0]}")
    with torch.no_grad():
        for key, parameter in trainable.items():
            parameter.copy_(weights[key])
    for file in state.glob("snapshot-*.safetensors"):
        policy.snapshots[file.stem.removeprefix("snapshot-")] = {k: v.to(policy.device) for k, v in load_file(file).items()}
    optimizer.load_state_dict(torch.load(state / "optimizer.pt", weights_only=True, map_location=policy.device))
    facts = json.loads((state / "state.json").read_text())
    torch.set_rng_state(torch.load(state / "rng.pt", weights_only=True)["torch"])
    version_, words, gauss = facts["python_rng"]
    random.setstate((version_, tuple(words), gauss))
    name, keys, *rest = facts["numpy_rng"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    return Progress(**facts["progress"])


def load_trained(source: str | Path, **options: Any) -> Policy:
    """A policy from anything that can be looked at: a run's folder, a checkpoint, a LoRA folder's run, or a plain model.

    options go to `Policy.load`. Raises FileNotFoundError or ConfigError with the cause.
    """
    path = Path(source)
    if (path / STATE / "state.json").is_file():
        base = json.loads((path / STATE / "state.json").read_text())["recipe"]["model"]
    elif (path / "recipe.yaml").is_file():
        base = yaml.safe_load((path / "recipe.yaml").read_text())["model"]
        if not (path / LORA_FILE).is_file() and not (path / "model").is_dir():
            found = checkpoints(path)
            if not found:
                raise ConfigError(f"run {path} has no result and no checkpoint yet")
            path = found[-1]
    else:
        return Policy.load(source, **options)
    if (path / LORA_FILE).is_file():
        return Policy.load(base, lora=path, **options)
    return Policy.load(path / "model", **options)


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
    pipeline, call = type(policy.pipe).__name__, ", ".join(f"{k}={v!r}" for k, v in policy.call.items() if k != "num_inference_steps")
    load = f'pipe = DiffusionPipeline.from_pretrained("{recipe.model}")\npipe.load_lora_weights("{folder}")'
    if not policy.has_lora:
        load = f'pipe = DiffusionPipeline.from_pretrained("{folder}/model")'
    facts = environment()
    text = CARD.format(
        model=recipe.model,
        name=folder.name,
        modality="video" if recipe.num_frames else "image",
        tags="lora" if policy.has_lora else "full",
        method=recipe.objective.get("name"),
        images=progress.images,
        steps=progress.step,
        minutes=progress.seconds / 60,
        rewards=", ".join(f"{name} ({value if not isinstance(value, dict) else value.get('weight', 1)})" for name, value in recipe.rewards.items()),
        prompts=recipe.prompts,
        per_step=recipe.prompts_per_step,
        generations=recipe.num_generations,
        transition=recipe.transition,
        inference_steps=recipe.num_inference_steps,
        window=recipe.steps,
        trained=f"LoRA of rank {recipe.lora_rank}" if policy.has_lora else "all weights of the denoiser",
        seed=recipe.seed,
        device=facts["device"],
        usage=f"from diffusers import DiffusionPipeline  # {pipeline}\n\n{load}\nimage = pipe(prompt, {call}).images[0]",
        versions=", ".join(f"{k} {facts[k]}" for k in ("torch", "diffusers", "peft")),
        folder=folder,
    )
    write_text(folder / "README.md", text)


#: A hook that the loop calls after each step: hook(trainer, step, metrics).
Hook = Callable[[Any, int, dict[str, float]], None]
__all__ = ["LORA_FILE", "Hook", "Metrics", "Progress"]
