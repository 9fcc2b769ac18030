"""Where published weights lie, and whether they are what they should be: files, folders and hub ids, checked key by key."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn


def unreachable(place: str | Path, error: Exception) -> ValueError:
    """One sentence for whatever the hub's client raises, with the way out."""
    cause = " ".join(str(error).split()).split(". ")[0][:160]
    if not is_hub_id(place):
        return ValueError(f"no weights at {place} ({cause})")
    return ValueError(
        f"{place} is not here and cannot be fetched; where there is a network, `hf download {place} --local-dir FOLDER`, "
        f"then give that folder instead of the hub id ({cause})"
    )


def is_hub_id(place: str | Path) -> bool:
    """Whether it reads owner/name and is nothing that exists here."""
    text = str(place)
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).exists()


def located(place: str | Path) -> str:
    """A folder or hub id as `from_pretrained` takes it.

    Where the hub's host has no address here, its client is told to work offline: it would try for a minute before it says so.
    """
    if not Path(place).exists():
        _notice_absence()
    return str(place)


@cache
def _notice_absence() -> None:
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if not constants.HF_HUB_OFFLINE and not getproxies():  # a proxy looks names up itself
        try:
            socket.getaddrinfo(address.hostname, address.port or address.scheme)
        except OSError:
            constants.HF_HUB_OFFLINE = True


def find_file(place: str | Path, filename: str) -> Path:
    """A file; or `filename` in a folder; or `filename` of a hub id, downloaded once into the hub's cache.

    Raises ValueError, in one sentence, when there is none.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        path = path / filename
    if path.is_file():
        return path
    if not is_hub_id(place):
        raise ValueError(f"no weights at {path}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(located(place), filename))
    except Exception as error:  # its own errors, those of its HTTP client, and of the operating system
        raise unreachable(place, error) from None


def read(path: Path) -> dict[str, Any]:
    """A checkpoint as a mapping on the CPU, without running code from it. Raises ValueError for what is none."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each have their own
        raise ValueError(f"{path} is no checkpoint of tensors ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not tensors by name")
    return dict(state)


def fill(module: nn.Module, state: Mapping[str, Tensor], path: str | Path, named: Callable[[str], str] = str) -> None:
    """Load all of a module's weights; names that it does not have are left out. named: what the file calls one of its weights.

    Raises ValueError with the first names that are missing or have another shape: a half-filled scorer gives plausible nonsense.
    """
    own = module.state_dict()
    missing = [named(name) for name in own if named(name) not in state]
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{path} lacks {len(missing)} of {len(own)} weights: {', '.join(missing[:3])}{rest}")
    for name, value in own.items():
        theirs = state[named(name)]
        if theirs.shape != value.shape:
            raise ValueError(f"{path}: {named(name)} has the shape {tuple(theirs.shape)} instead of {tuple(value.shape)}")
    module.load_state_dict({name: state[named(name)] for name in own})
