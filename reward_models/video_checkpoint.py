"""The files of VideoReward (arXiv 2501.13918), in the layout of its authors' trainer.

    model_config.json                       settings: frames, pixels, LoRA, mean and deviation of the scores
    checkpoint-STEP/model.pth               all weights (published), or
    checkpoint-STEP/adapter_model.safetensors, non_lora_state_dict.pth      those that were trained, on top of the base model's
    checkpoint-STEP/tokenizer/              with the three tokens

Weights carry the names of peft and of transformers 4; LoRA is merged as they are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowrl.reward_models.weights import is_hub_id, read, unreachable

CONFIG_FILE, TEMPLATE_FILE = "model_config.json", "template.txt"
WHOLE = ("model.pth", "model.safetensors")
PARTS = ("non_lora_state_dict.pth", "adapter_model.safetensors")


def find_folder(place: str | Path) -> Path:
    """A folder, or what a hub id holds of this layout, downloaded once. Raises ValueError where there is none."""
    path = Path(place).expanduser()
    if path.is_dir():
        return path
    if not is_hub_id(place):
        raise ValueError(f"no weights at {path}: VideoReward is a folder with {CONFIG_FILE} and checkpoint-STEP")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(place), allow_patterns=[CONFIG_FILE, TEMPLATE_FILE, "checkpoint-*/*", "base/*"]))
    except Exception as error:  # its own errors, those of its HTTP client, and of the operating system
        raise unreachable(place, error) from None


def read_facts(root: Path) -> dict[str, Any]:
    """model_config.json of a folder, or of the one that a checkpoint lies in."""
    for file in (root / CONFIG_FILE, root.parent / CONFIG_FILE):
        if file.is_file():
            try:
                facts = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file} is not JSON ({error})") from None
            if isinstance(facts, dict):
                return facts
            raise ValueError(f"{file} holds no settings")
    raise ValueError(f"{root} holds no VideoReward: it has no {CONFIG_FILE}")


def newest_checkpoint(root: Path) -> Path:
    """The folder itself where weights lie in it, or its last checkpoint-STEP that has some. Raises ValueError for none."""
    steps = {int(found.name[11:]): found for found in root.glob("checkpoint-*") if found.name[11:].isdecimal()}
    for folder in (root, *(steps[step] for step in sorted(steps, reverse=True))):
        if any((folder / name).is_file() for name in (*WHOLE, *PARTS)):
            return folder
    raise ValueError(f"{root} holds neither {WHOLE[0]} nor {PARTS[1]}, and no checkpoint-STEP that does")


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], bool]:
    """Weights by the names of `canonical`, and whether they are the whole model; else they belong on top of the base model's."""
    for name in WHOLE:
        if (folder / name).is_file():
            return {canonical(key): value for key, value in read(folder / name).items()}, True
    if missing := [name for name in PARTS if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {missing[0]}")
    return {canonical(key): value for name in PARTS for key, value in read(folder / name).items()}, False


def canonical(name: str) -> str:
    """A weight's name as Qwen2VLModel has it, with visual. or language_model. first; LoRA's without its adapter's name."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")
    inner = name.removeprefix("model.")
    if inner.startswith(("visual.", "language_model.")):
        return inner
    return name if inner == name else f"language_model.{inner}"


def lora_scale(facts: Mapping[str, Any]) -> float | None:
    """alpha / r, or alpha / sqrt r, of model_config.json's peft_lora_config; None where it has none."""
    if not facts.get("lora_enable"):
        return None
    rank = int(facts["lora_r"])
    return float(facts["lora_alpha"]) / (math.sqrt(rank) if facts.get("use_rslora") else rank)


def merged(state: Mapping[str, Tensor], scale: float | None) -> dict[str, Tensor]:
    """W + scale B A in place of W, A and B; the vocabulary's head is left out. Raises ValueError where the scale is not known."""
    plain = {name: value for name, value in state.items() if ".lora_" not in name and not name.startswith("lm_head.")}
    for name, value in state.items():
        if ".lora_" not in name or name.endswith(".lora_B.weight"):
            continue
        stem = name.removesuffix(".lora_A.weight")
        partner = state.get(f"{stem}.lora_B.weight")
        if stem == name or partner is None or f"{stem}.weight" not in plain:
            raise ValueError(f"{name} has no weight that it belongs to")
        if scale is None:
            raise ValueError(f"{name}: {CONFIG_FILE} does not say LoRA's scale (peft_lora_config)")
        weight = plain[f"{stem}.weight"]
        plain[f"{stem}.weight"] = (weight.float() + scale * partner.float() @ value.float()).to(weight.dtype)
    return plain
