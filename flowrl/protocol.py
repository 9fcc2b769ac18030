"""What an evaluation holds fixed. Two scores compare when their protocols agree, and `differences` says where they do not.

Protocol("tiny-test", 20, 1.0, seeds=4)    # `evaluate` completes it: digest of the prompts, size, versions of the rewards
differences(ours, theirs, "tiny_strict")   # ["num_inference_steps: 20 against 28"]
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowrl import __version__
from flowrl.batch import Prompt

#: Of these, None means that nobody knows, and what nobody knows is not compared.
UNKNOWN = ("digest", "size", "dtype", "ema")
#: Attributes of rewards that say where something is, not what it does.
PLACES = {"name", "folder", "place", "url", "token_env"}


@dataclass(frozen=True)
class Protocol:
    """What must be equal for two scores to be comparable. Sampling is always by the ODE."""

    prompts: str = "tiny-test"  #: Where the prompts come from; `digest` says what they are.
    num_inference_steps: int | None = 20  #: None: the model's own, or not known (pictures of other tools).
    guidance_scale: float | None = None  #: None: the model's own.
    seeds: int = 1  #: Samples per prompt.
    seed: int = 0
    call: dict[str, Any] = field(default_factory=dict)  #: Further arguments of the pipeline.
    solver: str = "euler"  #: How the ODE is followed: euler, or dpmpp2m.
    digest: str | None = None  #: Of the prompts' texts and columns.
    size: tuple[int, ...] | None = None  #: Of the pictures: (height, width), clips (frames, height, width).
    dtype: str | None = None  #: Of the weights.
    ema: bool | None = None  #: Whether averaged weights were worn; None where nothing was averaged.
    rewards: dict[str, str] = field(default_factory=dict)  #: The version of each (`reward_version`), by label.

    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call."""
        given = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return {**self.call, **{name: value for name, value in given.items() if value is not None}}

    def __str__(self) -> str:
        """One line for the head of a report."""
        steps = f"{self.num_inference_steps or 'an unknown number of'} ODE steps"
        parts = [
            f"{self.prompts} ({self.digest})" if self.digest else self.prompts,
            f"{self.seeds} seed{'s' if self.seeds > 1 else ''} from {self.seed}",
            steps + (f" ({self.solver})" if self.solver != "euler" else ""),
            *([f"guidance {self.guidance_scale:g}"] if self.guidance_scale is not None else []),
            *([" x ".join(map(str, self.size))] if self.size else []),
            *([self.dtype] if self.dtype else []),
            *(["averaged weights" if self.ema else "weights not averaged"] if self.ema is not None else []),
        ]
        return ", ".join(parts)


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Ten hex digits of the prompts' texts and columns, in their order."""
    lines = [json.dumps([prompt.text, prompt.columns], sort_keys=True, default=str) for prompt in prompts]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:10]


def differences(ours: Protocol, theirs: Protocol, *rewards: str) -> list[str]:
    """Where two protocols differ, each as `name: ours against theirs`. rewards: those whose versions matter."""
    found = []
    for item in dataclasses.fields(Protocol):
        a, b = getattr(ours, item.name), getattr(theirs, item.name)
        if item.name == "rewards" or a == b or (item.name in UNKNOWN and (a is None or b is None)):
            continue
        if item.name == "prompts" and ours.digest and theirs.digest:
            continue  # the same prompts from another place, or the digest says that they are others
        if item.name == "digest":
            a, b = f"{ours.prompts} ({a})", f"{theirs.prompts} ({b})"
            found.append(f"prompts: {a} against {b}")
        elif item.name == "call" and ours.size and theirs.size:
            a, b = ({k: v for k, v in call.items() if k not in ("height", "width", "num_frames")} for call in (a, b))
            found += [f"call: {a!r} against {b!r}"] if a != b else []
        elif item.name == "size":
            found.append(f"size: {' x '.join(map(str, a))} against {' x '.join(map(str, b))}")
        else:
            found.append(f"{item.name}: {a!r} against {b!r}")
    for name in rewards:
        a, b = ours.rewards.get(name), theirs.rewards.get(name)
        if a and b and a != b:
            found.append(f"reward {name}: version {a} against {b}")
    return found


# ------------------------------------------------------------------------------------------------ versions of rewards


def reward_version(reward: Any) -> str:
    """Ten hex digits that change when a reward's scores may: its code, its options, its weights, those of the rewards in it.

    Code of this library counts by the library's version, other code by its source. Of weights, pieces of every tensor count.
    Wants a fresh reward: one that learns or remembers changes with use.
    """
    digest = hashlib.sha256()
    for part in _walk(reward, set()):
        digest.update(part.encode())
        digest.update(b"\n")
    return digest.hexdigest()[:10]


def _walk(thing: Any, seen: set[int]) -> Iterable[str]:
    """What an object is, as texts: attributes in the order of their names, containers by their items."""
    if thing is None or isinstance(thing, bool | int | float | str):
        yield repr(thing)
    elif isinstance(thing, Tensor):
        yield _pieces(thing)
    elif isinstance(thing, list | tuple):
        for item in thing:
            yield from _walk(item, seen)
    elif isinstance(thing, dict):
        for key in sorted(thing, key=str):
            yield str(key)
            yield from _walk(thing[key], seen)
    elif id(thing) not in seen:
        seen.add(id(thing))
        yield _code(thing)
        if isinstance(thing, nn.Module):
            for name, tensor in thing.state_dict().items():
                yield f"{name} {_pieces(tensor)}"
        own = vars(thing) if hasattr(thing, "__dict__") and not _is_code(thing) and not _is_installed(type(thing)) else {}
        for name in sorted(set(own) - PLACES):
            if not (isinstance(thing, nn.Module) and name.startswith("_")):
                yield name
                yield from _walk(own[name], seen)


def _is_code(thing: Any) -> bool:
    return inspect.isroutine(thing) or inspect.isclass(thing)


def _is_installed(code: Any) -> bool:
    """Whether it comes from Python or from a package of others: the name is enough."""
    module = getattr(code, "__module__", None) or ""
    file = getattr(sys.modules.get(module), "__file__", None)
    return module.split(".")[0] != "flowrl" and (file is None or "site-packages" in file or file.startswith(sys.base_prefix))


def _code(thing: Any) -> str:
    """The name of a function or of an object's class, with the version or the source of what is behind it."""
    code = thing if _is_code(thing) else type(thing)
    name = f"{getattr(code, '__module__', '')}:{getattr(code, '__qualname__', '')}"
    if name.startswith("flowrl"):
        return f"{name} {__version__}"
    try:
        return name if _is_installed(code) else f"{name} {inspect.getsource(code)}"
    except (OSError, TypeError):  # no source at hand
        return name


def _pieces(tensor: Tensor, count: int = 64) -> str:
    """A tensor's shape and some of its values, from all over it."""
    if tensor.is_meta or tensor.is_complex() or not tensor.numel():
        return str(tuple(tensor.shape))
    values = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // count)]
    return f"{tuple(tensor.shape)} {values.to('cpu', torch.float64).tolist()}"
