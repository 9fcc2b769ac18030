"""Pictures that a pipeline starts from (image-to-video, editing): columns of the prompts, checked early, encoded once.

{"prompt": "the cat jumps", "image": "cat.png"}            a line of prompts.jsonl; the path is relative to that file

A pipeline takes one picture per call, so a batch is called picture by picture (`Policy`). What a call computes of the picture,
through the autoencoder's `encode` and the pipeline's own `encode_image`, is kept and handed out again: rollout, every step of the
update and the decoding see the same numbers, and the encoders run once for each picture and size.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flowrl.batch import Prompt
from flowrl.config import ConfigError
from flowrl.model_facts import ModelFacts

KEPT_BYTES = 1 << 30  #: Of what was computed of pictures: the oldest goes first.
#: Stands in for any prompt where a call's shapes are wanted, and not what it draws.
BLANK = Prompt("", {"image": Image.new("RGB", (64, 64))})
#: What a prompt starts from: names and files (or pictures in memory).
Condition = tuple[tuple[str, Any], ...]


def condition_of(prompt: Prompt, facts: ModelFacts) -> Condition:
    """The pictures that a prompt brings for a pipeline. Raises ConfigError, which names the row, for what is no path."""
    return tuple((name, _source(prompt, name)) for name in facts.conditions if prompt.columns.get(name) is not None)


def _source(prompt: Prompt, name: str) -> Any:
    value = prompt.columns[name]
    if isinstance(value, Image.Image | Tensor):
        return value
    if not isinstance(value, str | Path):
        raise ConfigError(f"{prompt.where}: {name} is {value!r}, not the path of a picture")
    return Path(value) if prompt.place is None else prompt.place[0].parent / value


def picture_of(name: str, source: Any, prompt: Prompt) -> Any:
    """The picture itself. Raises ConfigError, which names the row, where there is none."""
    if not isinstance(source, Path):
        return source
    if not source.is_file():
        raise ConfigError(f"{prompt.where}: {name}: there is no picture {source}")
    try:
        with Image.open(source) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{prompt.where}: {name}: {source} is no picture: {error}") from None


def check_conditions(prompts: Sequence[Prompt], facts: ModelFacts, given: Collection[str] = (), opened: bool = True) -> None:
    """Raise ConfigError, which names the row, for a prompt without the picture that the pipeline needs, and for one that does not
    open. given: arguments that the call has for all prompts. opened: whether the pictures are opened."""
    seen: set[Any] = set()
    for prompt in prompts:
        for name in facts.needed_conditions:
            if prompt.columns.get(name) is None and name not in given:
                raise ConfigError(
                    f"{prompt.where}: {facts.pipeline} starts from a picture: give its path in the column {name!r} "
                    f'of a prompt file (.jsonl), as in {{"prompt": "it moves", "{name}": "cat.png"}}'
                )
        for name, source in condition_of(prompt, facts) if opened else ():
            if isinstance(source, Path) and source not in seen:
                seen.add(source)
                picture_of(name, source, prompt)


def by_condition(prompts: Sequence[Prompt], facts: ModelFacts) -> list[list[int]]:
    """Positions of prompts that can share a call, in the order of their first."""
    places: dict[Any, list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(key_of(condition_of(prompt, facts)), []).append(i)
    return list(places.values())


def key_of(condition: Condition) -> tuple[Any, ...]:
    """Equal for the same pictures: files by their paths, those in memory by themselves."""
    return tuple((name, str(source) if isinstance(source, Path) else id(source)) for name, source in condition)


class ConditionMemo:
    """What a pipeline's encoders say of pictures, by picture, place in the call, shape and device."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.memo: OrderedDict[Any, Any] = OrderedDict()
        self.held: dict[Any, Condition] = {}  # pictures in memory are known by their address, so they must not go

    @contextmanager
    def of(self, condition: Condition, batch: int) -> Iterator[None]:
        """For the time of a call that starts from `condition`."""
        if not condition:
            yield
            return
        key = (key_of(condition), batch)
        self.held[key] = condition
        encoders = [(getattr(self.pipe, "vae", None), "encode"), (self.pipe, "encode_image")]
        found = [(owner, name, getattr(owner, name)) for owner, name in encoders if hasattr(owner, name)]
        for owner, name, encode in found:
            setattr(owner, name, self._kept(encode, (key, name)))
        try:
            yield
        finally:
            for owner, name, _ in found:
                delattr(owner, name)

    def _kept(self, encode: Callable[..., Any], key: tuple[Any, ...]) -> Callable[..., Any]:
        calls: int = 0
        last: Any = None

        def kept(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls, last
            x = args[0] if args else next(iter(kwargs.values()))
            if x is not last:  # pipelines encode one tensor again for each sample of a batch
                calls, last = calls + 1, x
            kind = (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else repr((args[1:], kwargs))
            place = (*key, calls, kind)
            if place not in self.memo:
                with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                    self.memo[place] = _settled(encode(*args, **kwargs))
                while len(self.memo) > 1 and sum(map(_nbytes, self.memo.values())) > KEPT_BYTES:
                    self.memo.popitem(last=False)
            return self.memo[place]

        return kept


def _settled(encoded: Any) -> Any:
    """An encoder's answer; a posterior gives its mode whoever asks, since a draw would differ between rollout and update."""
    if hasattr(encoded, "latent_dist"):
        encoded = copy.copy(encoded)
        posterior = copy.copy(encoded.latent_dist)
        posterior.sample = lambda *args, **kwargs: posterior.mode()
        encoded.latent_dist = posterior
    return encoded


def _nbytes(encoded: Any) -> int:
    if isinstance(encoded, Tensor):
        return encoded.nbytes
    posterior = getattr(encoded, "latent_dist", None)
    return sum(_nbytes(value) for value in vars(posterior).values()) if posterior is not None else 0
