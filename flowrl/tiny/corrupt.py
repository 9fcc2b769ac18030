"""What goes wrong in generated shapes, drawn on purpose: pictures with a known artifact, where it is, and what it is called.

The kinds are those that the embedded model's own samples show, in few steps, at high guidance or with hurt weights, and some that
shapes of other generators have. `LABELS` places each in the taxonomy of MagicMirror (arXiv 2509.10260): its second level, and its
third where there is one (`flowrl.reward_models.magic_mirror`).

>>> image, mask = corrupt(scene, "melt", strength=0.8, rng=rng)
>>> artifact_rate(images)          # by the exact reader: no trained detector is asked
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from .render import coverage
from .scenes import COLORS, SHAPES, SIZE, Object, Scene
from .verify import detect_batch

if TYPE_CHECKING:
    from torch import Tensor

#: Kind -> (second level, third level or None) of the taxonomy.
LABELS: dict[str, tuple[str, str | None]] = {
    "bleed": ("attributes", "color"),
    "texture": ("attributes", "texture"),
    "blur": ("attributes", "detail"),
    "ragged": ("attributes", "detail"),
    "stretch": ("attributes", "proportion"),
    "ghost": ("interaction", "overlap"),
    "merge": ("interaction", "overlap"),
    "melt": ("object", None),
    "blob": ("object", None),
    "hole": ("object", None),
    "tear": ("object", None),
    "crumbs": ("other", None),
}
KINDS = tuple(LABELS)
_VISIBLE = 0.06  # a pixel counts as damaged where some channel is off by more


@dataclass
class _Layer:
    """One object as painted: where it covers, and its colour, which may vary. alpha: (H, W); color: (3, H, W) or (3, 1, 1)."""

    obj: Object
    alpha: np.ndarray
    color: np.ndarray


def corrupt(scene: Scene, kind: str, strength: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture (3, 64, 64) float32 in [0, 1] of the scene with one artifact, and where that is: (64, 64) bool.

    strength: in (0, 1], from hardly to plainly visible. One object is hurt; `merge` takes a second one, `crumbs` the background.
    The mask holds what differs from the clean picture, and the whole object where its form is what is wrong.
    """
    if kind not in LABELS:
        raise ValueError(f"unknown artifact {kind!r}; known are {', '.join(KINDS)}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must be in (0, 1]")
    layers = [_layer(obj, rng) for obj in scene.objects]
    clean = _painted(scene, layers)
    at = int(rng.integers(len(layers)))
    hurt = _KINDS[kind](layers, at, strength, rng)
    image = _painted(scene, hurt)
    mask = np.abs(image - clean).max(0) > _VISIBLE
    if kind in ("melt", "blob", "stretch", "tear"):
        mask |= hurt[at].alpha > 0.5
    return image, mask


def _layer(obj: Object, rng: np.random.Generator) -> _Layer:
    alpha = np.zeros((SIZE, SIZE), np.float32)
    rows, cols, part = coverage(obj)
    alpha[rows, cols] = part
    color = np.clip(np.asarray(COLORS[obj.color]) + rng.uniform(-0.04, 0.04, 3), 0, 1)
    return _Layer(obj, alpha, color.astype(np.float32).reshape(3, 1, 1))


def _painted(scene: Scene, layers: list[_Layer]) -> np.ndarray:
    image = np.empty((3, SIZE, SIZE), np.float32)
    image[:] = np.asarray(scene.background, np.float32)[:, None, None]
    for layer in layers:
        image += layer.alpha * (layer.color - image)
    return np.clip(image, 0, 1)


def _with(layers: list[_Layer], at: int, alpha: np.ndarray, color: np.ndarray | None = None) -> list[_Layer]:
    changed = list(layers)
    old = layers[at]
    changed[at] = _Layer(old.obj, np.clip(alpha, 0, 1).astype(np.float32), old.color if color is None else color)
    return changed


def _noise(rng: np.random.Generator, scale: float) -> np.ndarray:
    """Smooth noise (H, W) of variance one; scale: size of its features in pixels."""
    field = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), scale, mode="wrap")
    return field / field.std()


def _direction(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([np.sin(angle), np.cos(angle)])


def _offsets(obj: Object) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of all pixel centres, from the centre of an object, in units of half its side."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    return (y - obj.cy) / (obj.size / 2), (x - obj.cx) / (obj.size / 2)


def _sharpened(soft: np.ndarray, level: float = 0.5, edge: float = 0.12) -> np.ndarray:
    """A soft mask as a shape with an edge of about a pixel."""
    return np.clip((soft - level) / edge + 0.5, 0, 1)


def bleed(layers: list[_Layer], at: int, strength: float, rng: np.random.Generator) -> list[_Layer]:
    """The object turns into another colour from one side or one spot."""
    layer = layers[at]
    others = [np.asarray(c, np.float32) for name, c in COLORS.items() if name != layer.obj.color]
    other = others[rng.integers(len(others))].reshape(3, 1, 1)
    y, x = _offsets(layer.obj)
    if rng.random() < 0.6:
        a = _direction(rng)
        ramp = a[0] * y + a[1] * x - rng.uniform(-0.4, 0.4)
    else:
        cy, cx = rng.uniform(-0.6, 0.6, 2)
        ramp = 0.8 - np.hypot(y - cy, x - cx)
    share = (0.35 + 0.65 * strength) / (1 + np.exp(-ramp * rng.uniform(2, 7)))
    return _with(layers, at, layer.alpha, layer.color + share.astype(np.float32) * (other - layer.color))


def texture(layers: list[_Layer], at: int, strength: float, rng: np.random.Generator) -> list[_Layer]:
    """Grid or grain inside the object: what upsampling layers leave, and what reward hacking finds."""
    layer = layers[at]
    if rng.random() < 0.5:
        y, x = np.mgrid[:SIZE, :SIZE]
        wave = 2 * np.pi / rng.uniform(2.5, 5)
        pattern = np.sin(wave * x + rng.uniform(0, 6)) * np.sin(wave * y + rng.uniform(0, 6))
    else:
        pattern = _noise(rng, rng.uniform(0.4, 0.8)) / 2
    size = (0.12 + 0.3 * strength) * pattern.astype(np.float32) * (1, -1)[rng.integers(2)]
    return _with(layers, at, layer.alpha, np.clip(layer.color + size * rng.uniform(0.4, 1, (3, 1, 1)), 0, 1).astype(np.float32))


def blur(layers: list[_Layer], at: int, strength: float, rng: np.random.Generator) -> list[_Layer]:
    """No edge: the object fades out, evenly or as if it moved, and pales."""
    sigma = np.full(2, 1.2 + 2.2 * strength)
    sigma[rng.integers(2)] *= rng.choice([1.0, 0.2])
    return _with(layers, at, ndimage.gaussian_filter(layers[at].alpha, sigma) * (1 - 0.4 * strength * rng.random()))


def ragged(layers: list[_Layer], at: int, strength: float, rng: np.random.Generator) -> list[_Layer]:
    """The outline wobbles and has notches."""
    scale = rng.uniform(1.5, 2.5)
    shift = (0.6 + 1.4 * strength) * np.stack([_noise(rng, scale), _noise(rng, scale)])
    grid = np.mgrid[:SIZE, :SIZE] + shift
    return _with(layers, at, ndimage.map_coordinates(layers[at].alpha, grid, order=1, mode="nearest"))


def stretch(layers: list[_Layer], at: int, strength: float, rng: np.random.Generator) -> list[_Layer]:
    """Much too wide or too tall."""
    obj = layers[at].obj
    factor = 1.45 + 0.75 * strength
    zoom = np.array([factor**0.7, factor**-0.3])[:: rng.choice([1, -1])]
    centre = np.array([obj.cy, obj.cx]) - 0.5
    return _with(layers, at, ndimage.affine_transform(layers[at].alpha, 1 / zoom, centre - centre / zoom, order=1))


def ghost(layers: list[_Layer], at: int, strength: float, rng: np.random.Generator) -> list[_Layer]:
    """A pale double of the object shines through, a little aside."""
    layer = layers[at]
    shift = _direction(rng) * layer.obj.size * rng.uniform(0.25, 0.6)
    double = ndimage.shift(layer.alpha, shift, order=1) * (0.2 + 0.4 * strength)
    return [*layers, _Layer(layer.obj, double.astype(np.float32), layer.color)]


def merge(layers: list[_Layer], at: int, strength: float, rng: np.random.Generator) -> list[_Layer]:
    """Two objects run into each other; a second one is made where there is none."""
    layer = layers[at]
    names, shapes = list(COLORS), list(SHAPES)
    color = layer.obj.color if rng.random() < 0.5 else names[rng.integers(len(names))]
    step = _direction(rng) * layer.obj.size * (1.0 - 0.45 * strength)
    cy, cx = np.clip(np.array([layer.obj.cy, layer.obj.cx]) + step, 8, SIZE - 8)
    other = _layer(Object(shapes[rng.integers(len(shapes))], color, float(cx), float(cy), layer.obj.size), rng)
    field = ndimage.gaussian_filter(np.maximum(layer.alpha, other.alpha), 1.5)
    mix = ndimage.gaussian_filter(other.alpha, 3) / (
        ndimage.gaussian_filter(other.alpha, 3) + ndimage.gaussian_filter(layer.alpha, 3) + 1e-3
    )
    return _with(layers, at, _sharpened(field, 0.4, 0.25), layer.color + mix.astype(np.float32) * (other.color - layer.color))


def melt(layers: list[_Layer], at: int, strength: float, rng: np.random.Generator) -> list[_Layer]:
    """Between two shapes: neither the star nor the cross."""
    obj = layers[at].obj
    others = [shape for shape in SHAPES if shape != obj.shape]
    other = _layer(Object(others[rng.integers(len(others))], obj.color, obj.cx, obj.cy, obj.size), rng).alpha
    share = 0.25 + 0.25 * strength
    soft = (1 - share) * ndimage.gaussian_filter(layers[at].alpha, 2) + share * ndimage.gaussian_filter(other, 2)
    soft = ndimage.gaussian_filter(soft, 0.5) + 0.12 * strength * _noise(rng, 3) * (soft > 0.05)
    return _with(layers, at, _sharpened(soft, 0.42, 0.3))


def blob(layers: list[_Layer], at: int, strength: float, rng: np.random.Generator) -> list[_Layer]:
    """No shape at all: a puddle."""
    y, x = _offsets(layers[at].obj)
    angle, radius = np.arctan2(y, x), np.hypot(y, x)
    outline = np.full_like(angle, 0.8)
    for k in (2, 3, 4, 5):
        outline += rng.normal(0, 0.26 * strength + 0.1) / k**0.5 * np.sin(k * angle + rng.uniform(0, 2 * np.pi))
    return _with(layers, at, _sharpened(np.clip(outline, 0.25, 1.4) - radius, 0, 0.25))


def hole(layers: list[_Layer], at: int, strength: float, rng: np.random.Generator) -> list[_Layer]:
    """A part is missing, inside or at the rim."""
    layer = layers[at]
    y, x = _offsets(layer.obj)
    ink = np.argwhere(layer.alpha > 0.9)
    cy, cx = ink[rng.integers(len(ink))]
    size = 0.25 + 0.4 * strength
    away = np.hypot((y - y[cy, 0]) * rng.uniform(0.7, 1.4), x - x[0, cx]) + 0.08 * _noise(rng, 2)
    return _with(layers, at, layer.alpha * _sharpened(away, size, 0.2))


def tear(layers: list[_Layer], at: int, strength: float, rng: np.random.Generator) -> list[_Layer]:
    """Cut in two halves that slipped."""
    layer = layers[at]
    y, x = _offsets(layer.obj)
    a = _direction(rng)
    side = _sharpened(a[0] * y + a[1] * x, rng.uniform(-0.25, 0.25), 0.15)
    along = np.array([a[1], -a[0]]) * rng.choice([-1, 1]) * layer.obj.size * (0.15 + 0.25 * strength)
    apart = a * layer.obj.size * 0.2 * strength * rng.random()
    slipped = ndimage.shift(layer.alpha * side, along + apart, order=1)
    return _with(layers, at, np.maximum(layer.alpha * (1 - side), slipped))


def crumbs(layers: list[_Layer], at: int, strength: float, rng: np.random.Generator) -> list[_Layer]:
    """Specks of colour on the background, as half-removed noise leaves them."""
    field = _noise(rng, rng.uniform(0.9, 2.2))
    level = 2.4 - 0.8 * strength
    if not (field > level).any():
        level = field.max() - 0.1
    names = list(COLORS)
    color = np.asarray(COLORS[names[rng.integers(len(names))]], np.float32).reshape(3, 1, 1)
    specks = np.clip((field - level) * 2.5, 0, 1) * rng.uniform(0.6, 1)
    return [*layers, _Layer(layers[at].obj, specks.astype(np.float32), color)]


_KINDS: dict[str, Callable[[list[_Layer], int, float, np.random.Generator], list[_Layer]]] = {
    "bleed": bleed,
    "texture": texture,
    "blur": blur,
    "ragged": ragged,
    "stretch": stretch,
    "ghost": ghost,
    "merge": merge,
    "melt": melt,
    "blob": blob,
    "hole": hole,
    "tear": tear,
    "crumbs": crumbs,
}


# ------------------------------------------------------------------------------------------------ measured, not learnt


def unknown(images: Tensor | np.ndarray) -> np.ndarray:
    """Does the exact reader find a component that is no shape? images: (N, 3, H, W) in [0, 1]; returns (N,) bool."""
    return np.array([any(d.shape == "unknown" for d in found) for found in detect_batch(images)], bool)


def artifact_rate(images: Tensor | np.ndarray) -> float:
    """Share of the pictures with a component that is no shape. It asks no network; `tiny_artifact` was taught by its verdict on
    some samples, besides damage that it cannot see (texture)."""
    return float(unknown(images).mean())
