"""Which weights: a model as users name it, with LoRAs on top, found before anything is loaded.

Source.parse("tiny-sd3")                            an embedded name, a pipeline folder, a hub id, a run, a checkpoint
Source.parse("tiny-sd3+runs/demo@0.5+style.safetensors")    with LoRAs: runs, folders, files, hub ids, each with its scale
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.config import ConfigError, unknown
from flowrl.policy import LORA_FILE, Policy, resolve_model
from flowrl.record import load_trained, trained_parts


@dataclass(frozen=True)
class Source:
    """A model and the LoRAs on it, each with its scale: `MODEL`, `MODEL+LORA`, `MODEL+LORA@0.5+LORA`."""

    text: str
    model: str
    loras: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Source:
        if "+" not in text or Path(text).exists():
            return cls(text, text)
        model, *loras = text.split("+")
        parsed = []
        for lora in loras:
            path, _, scale = lora.rpartition("@") if "@" in lora and not Path(lora).exists() else (lora, "", "1")
            try:
                parsed.append((path, float(scale)))
            except ValueError:
                raise ConfigError(f"{text}: {scale!r} is not a LoRA's scale; write MODEL+LORA@0.5") from None
        if not model or not all(path for path, _ in parsed):
            raise ConfigError(f"{text}: write MODEL+LORA, or MODEL+LORA@0.5")
        return cls(text, model, tuple(parsed))

    @property
    def label(self) -> str:
        return "+".join(
            [_short(self.model), *(_short(path) + (f"@{scale:g}" if scale != 1 else "") for path, scale in self.loras)]
        )

    @property
    def base(self) -> str:
        """The model that this is, or that it was trained from."""
        return trained_parts(self.model)[0]

    def check(self) -> None:
        """Raise FileNotFoundError or ConfigError for what can be told without loading weights."""
        resolve_model(self.base)
        for path, _ in self.loras:
            lora_file(path)

    def digest(self) -> str | None:
        """A short name of the weights: the same for the same files. None for a hub model that is not here yet."""
        model, lora = trained_parts(self.model)
        parts = [_digest(resolve_model(model)), *([_digest(lora)] if lora else [])]
        parts += [f"{_digest(lora_file(path))}@{scale:g}" for path, scale in self.loras]
        if any(part.startswith("None") for part in map(str, parts)):
            return None
        return hashlib.sha256("+".join(map(str, parts)).encode()).hexdigest()[:10]

    def open(self, dtype: str = "float32", device: str | None = None, **call: Any) -> Policy:
        """The policy, with its LoRAs on. call: arguments of the pipeline. Raises ConfigError for what does not fit the model."""
        policy = load_trained(self.model, dtype=dtype, device=device, **call)
        for name in policy.call:
            if name not in policy.call_names:
                raise ConfigError(unknown(f"argument of {policy.name}", name, policy.call_names))
        names, scales = (["policy"], [1.0]) if policy.has_lora else ([], [])
        for i, (path, scale) in enumerate(self.loras):
            names, scales = [*names, f"lora{i}"], [*scales, scale]
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs are what is wanted
                    policy.pipe.load_lora_weights(str(lora_file(path)), adapter_name=names[-1])
            except (RuntimeError, ValueError, AttributeError, KeyError) as error:
                raise ConfigError(f"LoRA {path} does not fit {self.model}: {str(error).strip().splitlines()[0]}") from None
            if not any(names[-1] in adapters for adapters in policy.pipe.get_list_adapters().values()):
                raise ConfigError(
                    f"LoRA {path} does not fit {self.model}: none of its weights belongs to a part of {policy.name}"
                )
        if self.loras:
            policy.pipe.set_adapters(names, scales)
            policy.pipe.to(policy.device)
        return policy


def lora_file(path: str) -> Path | str:
    """Where a LoRA lies: a run or checkpoint of ours, a folder, a file, or a hub id. Raises with the cause."""
    place = Path(path)
    if (place / "recipe.yaml").is_file() or (place / "training_state").is_dir():
        _, lora = trained_parts(place)
        if lora is None:
            raise ConfigError(f"{path} trained all weights: it is a model of its own, not a LoRA")
        return lora
    if place.is_file():
        return place
    if place.is_dir():
        found = sorted(place.glob("*.safetensors"))
        if (place / LORA_FILE).is_file():
            return place
        if len(found) != 1:
            raise FileNotFoundError(
                f"there is no {LORA_FILE} in {path}" + (f"; name one of its {len(found)} files" if found else "")
            )
        return found[0]
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no LoRA at {path} (hub ids look like owner/name)")
    return path


def _short(path: str) -> str:
    """The last part of a path that exists; a checkpoint with its run's name."""
    place = Path(path)
    if not place.exists():
        return path
    place = place.absolute() if place.name not in ("", "..") else place.resolve()
    if place.name.startswith("checkpoint-"):
        return f"{place.parent.name}/{place.name}"
    return place.stem if place.is_file() else place.name


def _digest(place: Path | str) -> str | None:
    """Weights by content: whole where small, and otherwise their sizes and pieces all over them. A hub id by its commit."""
    if isinstance(place, str):
        from huggingface_hub import try_to_load_from_cache

        found = next((f for f in ("model_index.json", LORA_FILE) if isinstance(try_to_load_from_cache(place, f), str)), None)
        return f"{place}@{Path(str(try_to_load_from_cache(place, found))).parent.name}" if found else None
    piece, pieces = 1 << 20, 16
    digest = hashlib.sha256()
    files = [place] if place.is_file() else sorted([*place.glob("*.safetensors"), *place.glob("*/*.safetensors")])
    for file in files:
        size = file.stat().st_size
        digest.update(f"{'' if file == place else file.relative_to(place).as_posix()} {size} ".encode())
        with file.open("rb") as content:
            for start in range(0, size, max(piece, -(-size // pieces))):
                content.seek(start)
                digest.update(content.read(piece))
    return digest.hexdigest()
