"""What travels between `remote` and `flowrl serve`: samples as JSON, pictures inside it as base64 of PNG or npy files. No pickle.

    {"reward": "pickscore", "prompts": ["a cat"], "columns": [{"kind": "animal"}], "groups": [0], "images": ["iVBORw0..."]}

`encode` writes it, `decode` reads it and trusts nothing: sizes are read from headers and checked before anything is unpacked.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowrl.batch import Prompt, Samples
from flowrl.reward_models.base import RewardError, Traits, check_needs, nearest, to_pil

FIELDS = ("reward", "prompts", "columns", "images", "groups", "references", "latents", "fps")
#: What a byte becomes.
BASE64 = 4 / 3
PNG_BEGINS, PNG_ENDS = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class Limits:
    """Of one request. batch: samples. pixels: of one picture. megabytes: of the request, and of its PNGs when unpacked."""

    batch: int = 64
    pixels: int = 1 << 24
    megabytes: int = 256

    @property
    def bytes(self) -> int:
        return self.megabytes << 20


class BadRequest(ValueError):
    """A request that cannot be served as it is. status: 400, or 413 where it is too large."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


def traits_to_json(traits: Traits) -> dict[str, Any]:
    return {**asdict(traits), "range": [bound if math.isfinite(bound) else None for bound in traits.range]}


def traits_from_json(told: dict[str, Any]) -> Traits:
    """As traits_to_json wrote it, of a reward that is elsewhere. Raises KeyError, TypeError or ValueError."""
    if told["arity"] not in ("point", "group", "batch"):
        raise ValueError(f"arity {told['arity']!r}")
    low, high = told["range"]
    return Traits(
        arity=told["arity"],
        needs=tuple(map(str, told["needs"])),
        columns=tuple(map(str, told["columns"])),
        range=(-math.inf if low is None else float(low), math.inf if high is None else float(high)),
        remote=True,
        licence=str(told["licence"]),
    )


# ------------------------------------------------------------------------------------------------ encode


def encode(samples: Samples, traits: Traits, form: Literal["png", "npy"]) -> dict[str, Any]:
    """Samples as a request's body: what `traits` asks for. png rounds pixels to 8 bit (clips too), npy keeps their fp32.

    Raises RewardError for pixels that are not numbers.
    """
    body: dict[str, Any] = {
        "prompts": samples.texts,
        "columns": [prompt.columns for prompt in samples.prompts],
        "groups": samples.group.tolist(),
    }
    if samples.images is not None and {"images", "clips"} & {*traits.needs}:
        body["images"] = _encode_pictures(samples.images, form)
    if samples.references is not None and "references" in traits.needs:
        body["references"] = _encode_pictures(samples.references, form)
    if "latents" in traits.needs:
        body["latents"] = {"npy": _npy(samples.latents.float().cpu().numpy())}
    if samples.fps is not None:
        body["fps"] = samples.fps
    return body


def encoded_bytes(samples: Samples, traits: Traits, form: Literal["png", "npy"]) -> float:
    """Of one sample on the wire, at most (a PNG of noise is as large as its pixels)."""
    size = samples.latents[0].numel() * 4 if "latents" in traits.needs else 0
    for pictures in (samples.images, samples.references if "references" in traits.needs else None):
        size += 0 if pictures is None else int(pictures[0].numel() * (4 if form == "npy" else 1.02) + 1024)
    return size * BASE64 + 4096


def _encode_pictures(pictures: Tensor, form: str) -> Any:
    pictures = pictures.detach().float().cpu()
    good = pictures.flatten(1).isfinite().all(1)
    if not good.all():
        raise RewardError(f"sample {int((~good).nonzero()[0])} has pixels that are not numbers; the generator has diverged")
    if form == "npy":
        return {"npy": _npy(pictures.numpy())}
    if pictures.ndim == 4:
        return [_png(picture) for picture in to_pil(pictures)]
    return {"npy": _npy(pictures.mul(255).round().clamp(0, 255).byte().numpy())}


def _png(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getbuffer()).decode()


def _npy(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return base64.b64encode(buffer.getbuffer()).decode()


# ------------------------------------------------------------------------------------------------ decode


def decode(body: Any, traits: Traits, limits: Limits) -> Samples:
    """The samples of a request for a reward with these traits, on the CPU. Raises BadRequest, which names what is wrong."""
    if not isinstance(body, dict):
        raise BadRequest("a request is a JSON object")
    for name in body:
        if name not in FIELDS:
            raise BadRequest(f"unknown field {name[:40]!r}{nearest(name[:40], FIELDS)}")
    texts = _list(body.get("prompts"), "prompts", str, None)
    count = len(texts)
    if not 1 <= count <= limits.batch:
        raise BadRequest(f"{count} prompts; a request has 1 to {limits.batch} (--max-batch)", 413 if count else 400)
    columns = [{} for _ in texts] if body.get("columns") is None else _list(body["columns"], "columns", dict, count)
    given = body.get("groups")
    if given is None and traits.arity == "group":
        raise BadRequest("groups is missing: this reward compares the samples of one group, so say which belong together")
    groups = list(range(count)) if given is None else _list(given, "groups", int, count)
    if any(abs(group) >= 1 << 62 for group in groups):
        raise BadRequest("groups are 64 bit whole numbers")
    fps = body.get("fps")
    if fps is not None and (not _is(fps, float) or not 0 < fps < 1e6):
        raise BadRequest("fps is a positive number")
    images, references, latents = (body.get(name) for name in ("images", "references", "latents"))
    if latents is None and "latents" in traits.needs:
        raise BadRequest("latents is missing, which this reward scores")
    samples = Samples(
        prompts=[Prompt(text, own) for text, own in zip(texts, columns, strict=True)],
        seeds=[0] * count,
        group=torch.tensor(groups, dtype=torch.int64),
        latents=torch.zeros(count, 0) if latents is None else _array(latents, "latents", count),
        images=None if images is None else _pictures(images, "images", count, (4, 5), limits),
        references=None if references is None else _pictures(references, "references", count, (5,), limits),
        fps=None if fps is None else float(fps),
    )
    try:
        check_needs(_Named(traits), samples, "")
    except RewardError as error:
        raise BadRequest(str(error).removeprefix("reward '' ")) from None
    return samples


@dataclass
class _Named:
    traits: Traits


def _is(value: Any, kind: type) -> bool:
    """JSON's types: true is no number, 1 is a float."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float if kind is float else kind)


def _list(values: Any, name: str, kind: type, count: int | None) -> list[Any]:
    if not isinstance(values, list):
        raise BadRequest(f"{name} is {'missing' if values is None else f'a {type(values).__name__}'}; it is a list")
    if count is not None and len(values) != count:
        raise BadRequest(f"{name} has {len(values)} values for {count} prompts")
    for i, value in enumerate(values):
        if not _is(value, kind):
            raise BadRequest(f"{name}[{i}] is a {type(value).__name__}")
    return values


def _pictures(told: Any, name: str, count: int, dimensions: tuple[int, ...], limits: Limits) -> Tensor:
    """(N, 3, H, W) or (N, F, 3, H, W) fp32 in [0, 1] from a list of PNGs or an npy."""
    if isinstance(told, dict):
        pictures = _array(told, name, count)
        if pictures.ndim not in dimensions or pictures.shape[-3] != 3 or 0 in pictures.shape:
            wanted = " or ".join({4: "(N, 3, H, W)", 5: "(N, F, 3, H, W)"}[d] for d in dimensions)
            raise BadRequest(f"{name}: shape {tuple(pictures.shape)} instead of {wanted}")
        _check_pixels(name, pictures.shape[-1], pictures.shape[-2], limits)
        low, high = float(pictures.min()), float(pictures.max())
        if low < -0.01 or high > 1.01:
            raise BadRequest(f"{name}: pictures are float32 in [0, 1] or uint8, and these go from {low:g} to {high:g}")
        return pictures
    if 4 not in dimensions:
        raise BadRequest(f"{name} is an npy (N, R, 3, H, W)")
    files = [_base64(text, f"{name}[{i}]") for i, text in enumerate(_list(told, name, str, count))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about sizes that are checked here
        opened = [_open(raw, f"{name}[{i}]") for i, raw in enumerate(files)]
        for i, image in enumerate(opened):
            _check_pixels(f"{name}[{i}]", image.width, image.height, limits)
            if image.size != opened[0].size:
                raise BadRequest(f"{name}[{i}] is {image.size}, {name}[0] is {opened[0].size}: one size per request")
        width, height = opened[0].size
        if 3 * width * height * count > limits.bytes:
            raise BadRequest(
                f"{name}: {count} pictures of {width}x{height} are over {limits.megabytes} MB (--max-megabytes)", 413
            )
        stack = np.stack([_load(image, f"{name}[{i}]") for i, image in enumerate(opened)])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float().div(255)


def _check_pixels(name: str, width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise BadRequest(f"{name} has {width}x{height} pixels, more than {limits.pixels} (--max-pixels)", 413)


def _open(raw: bytes, name: str) -> Any:
    """A PNG's header: its pixels stay packed."""
    from PIL import Image

    if raw.startswith(PNG_BEGINS) and not raw.endswith(PNG_ENDS):
        raise BadRequest(f"{name} is a broken PNG: its end is missing")  # which Pillow may have been told to overlook
    try:
        return Image.open(io.BytesIO(raw), formats=("PNG",))
    except Image.DecompressionBombError:
        raise BadRequest(f"{name} has too many pixels (--max-pixels)", 413) from None
    except Exception:  # Pillow raises a dozen kinds on bytes that are no PNG
        raise BadRequest(f"{name} is no PNG") from None


def _load(image: Any, name: str) -> np.ndarray:
    """(H, W, 3) uint8."""
    if image.mode not in ("RGB", "L", "P", "1") or "transparency" in image.info:
        raise BadRequest(f"{name} is a PNG of mode {image.mode}; pictures are RGB of 8 bit without transparency")
    try:
        return np.asarray(image.convert("RGB"))
    except Exception:  # as above
        raise BadRequest(f"{name} is a broken PNG") from None


def _array(told: Any, name: str, count: int) -> Tensor:
    """fp32 (N, ...) from {"npy": base64 of an npy file}; uint8 comes as /255. Nothing is allocated by what the header says."""
    if not isinstance(told, dict) or {*told} != {"npy"} or not isinstance(told["npy"], str):
        raise BadRequest(f"{name} is a list of PNGs or {{'npy': base64 of an npy file}}")
    raw = io.BytesIO(_base64(told["npy"], name))
    try:
        version = np.lib.format.read_magic(raw)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(raw)
    except Exception:  # its header is Python, of which numpy reads the literals
        raise BadRequest(f"{name} is no npy file") from None
    if dtype.str not in ("|u1", "<f4") or fortran:
        raise BadRequest(f"{name}: {dtype}{' in Fortran order' if fortran else ''}; an npy is uint8 or float32, in C order")
    if len(shape) < 2 or shape[0] != count:
        raise BadRequest(f"{name}: shape {shape} for {count} prompts")
    content = raw.getbuffer()[raw.tell() :]
    if min(shape) < 0 or math.prod(shape) * dtype.itemsize != len(content):
        raise BadRequest(f"{name}: {len(content)} bytes do not fill an array of {shape}")
    array = np.frombuffer(content, dtype).reshape(shape)
    values = torch.from_numpy(array.astype(np.float32))
    if not values.isfinite().all():
        raise BadRequest(f"{name} holds values that are not numbers")
    return values.div_(255) if dtype.str == "|u1" else values


def _base64(text: str, name: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except (ValueError, binascii.Error):
        raise BadRequest(f"{name} is no base64") from None
