"""Comparisons in the embedded world: captions that differ in one word, and pairs of pictures with the choices of a made-up human.

Everything is a function of its seed; nothing here imports torch before it is asked for pictures of the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from .render import render_batch
from .scenes import COLORS, KINDS, RELATIONS, SHAPES, Scene, Spec, neighbours, random_spec, sample_scene, split
from .verify import MIN_COSINE, verify

if TYPE_CHECKING:
    from torch import Tensor


def agreement(scenes: Sequence[Scene], specs: Sequence[Spec]) -> np.ndarray:
    """Which scenes show what which captions say, (scenes, specs) bool: exact counts, right colours, the relation, nothing else.

    It is `verify` on the scenes themselves, for many captions at once.
    """
    shapes, colors = list(SHAPES), list(COLORS)
    counts = np.zeros((len(scenes), len(shapes), len(colors)), int)
    holds = {name: np.zeros((len(scenes), len(shapes), len(shapes)), bool) for name in RELATIONS}
    for n, scene in enumerate(scenes):
        for a in scene.objects:
            counts[n, shapes.index(a.shape), colors.index(a.color)] += 1
            for b in scene.objects:
                dx, dy = a.cx - b.cx, a.cy - b.cy
                for name, (x, y) in RELATIONS.items():
                    if dx * x + dy * y > MIN_COSINE * math.hypot(dx, dy):
                        holds[name][n, shapes.index(a.shape), shapes.index(b.shape)] = True
    of_shape, total = counts.sum(2), counts.sum((1, 2))
    result = np.empty((len(scenes), len(specs)), bool)
    for m, spec in enumerate(specs):
        rows = [shapes.index(item["shape"]) for item in spec["include"]]
        right = total == sum(item["count"] for item in spec["include"])
        for row, item in zip(rows, spec["include"], strict=True):
            right &= (of_shape[:, row] if item["color"] is None else counts[:, row, colors.index(item["color"])]) == item["count"]
        if spec["relation"] is not None:
            right &= holds[spec["relation"]][:, rows[0], rows[1]]
        result[:, m] = right
    return result


#: What is hard is shown more often.
KIND_WEIGHTS = {"single_object": 0.5, "two_object": 1.0, "counting": 1.2, "colors": 0.6, "position": 1.6, "color_attr": 1.2}


def captioned_scenes(count: int, seed: int) -> tuple[np.ndarray, list[Spec], np.ndarray]:
    """Pictures (count, 3, 64, 64) with captions, every second caption one word away from the one before it, each with its own
    scene; and which picture shows which caption, (count, count) bool. No caption is of the split "test"."""
    rng = np.random.default_rng(seed)
    specs: list[Spec] = []
    while len(specs) < count:
        spec = random_spec(rng, "train", KIND_WEIGHTS)
        others = neighbours(spec)
        specs += [spec, others[rng.integers(len(others))]]
    specs = specs[:count]
    scenes = [sample_scene(spec, rng) for spec in specs]
    return render_batch(scenes, rng), specs, agreement(scenes, specs)


def one_word_apart(spec: Spec, seed: int) -> tuple[Scene, Scene, Spec]:
    """A scene of a caption, the like scene of a caption of "train" that differs in one word, and that caption. Places, sizes and
    free colours are drawn alike, so that the scenes differ in little but the word; the second does not show the first caption."""
    others = neighbours(spec)
    for k in np.random.default_rng([seed, 1]).permutation(len(others)):
        right, wrong = (sample_scene(one, np.random.default_rng(seed)) for one in (spec, others[k]))
        if not agreement([wrong], [spec])[0, 0]:
            return right, wrong, others[k]
    raise ValueError(f"every scene of a caption one word away from {spec['prompt']!r} shows it, too")


def word_tests(per_kind: int, seed: int) -> tuple[np.ndarray, list[Spec], list[Spec]]:
    """Held-out pictures, their captions (of "test"), and captions one word away that they do not show, `per_kind` each kind."""
    rng = np.random.default_rng(seed)
    scenes, right, wrong = [], [], []
    for kind in KINDS:
        for _ in range(per_kind):
            spec = random_spec(rng, "test", {kind: 1.0})
            others = neighbours(spec, but=None)
            scene = sample_scene(spec, rng)
            false = [other for other, shown in zip(others, agreement([scene], others)[0], strict=True) if not shown]
            scenes.append(scene)
            right.append(spec)
            wrong.append(false[rng.integers(len(false))])
    return render_batch(scenes, rng), right, wrong


def drawn_tests(each: int, steps: int = 10) -> tuple[list[str], Tensor, Tensor]:
    """What the embedded generator draws for the held-out captions: captions, pictures (P, each, 3, 64, 64) uint8, strict."""
    specs = split("test")
    images, strict, _ = drawn(specs, each, seed=0, steps=steps)
    return [spec["prompt"] for spec in specs], images, strict


def drawn(specs: Sequence[Spec], each: int, seed: int, steps: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures of the embedded generator (P, each, 3, 64, 64) uint8, and what the verifier says: strict, dense (P, each).

    They are kept in the user's cache folder ($XDG_CACHE_HOME/flowrl), whose files may be deleted at any time.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from . import evaluate, model_path, models

    weights = hashlib.sha256((model_path() / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    job = json.dumps([weights, [spec["prompt"] for spec in specs], each, seed, steps])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowrl"
    file = cache / f"drawn-{hashlib.sha256(job.encode()).hexdigest()[:16]}.safetensors"
    if file.is_file():
        images = load_file(file)["images"]
    else:
        pipe, parts = models.load(model_path()), []
        seeds = np.random.default_rng([seed, 1]).integers(1 << 62, size=(len(specs), each)).flatten().tolist()
        prompts = [spec["prompt"] for spec in specs for _ in range(each)]
        for start in tqdm(range(0, len(seeds), 64), desc="drawing", unit="batch", leave=False):
            part = slice(start, start + 64)
            parts.append(evaluate.sample(pipe, prompts[part], seeds[part], num_inference_steps=steps).mul(255).round().byte())
        images = torch.cat(parts).unflatten(0, (len(specs), each)).contiguous()
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        save_file({"images": images}, unfinished)
        os.replace(unfinished, file)
    strict, dense = verify(images.flatten(0, 1).float() / 255, [spec for spec in specs for _ in range(each)])
    return images, strict.view(len(specs), each), dense.view(len(specs), each)


# ------------------------------------------------------------------------------------------------ choices


@dataclass(frozen=True)
class Human:
    """Someone who compares two pictures of one caption, made up so that everything about them is known.

    They like what the caption says, and a little what is vivid: their hidden utility is follows * dense + vivid * z, with the
    verifier's partial credit and the picture's mean saturation in units of its usual spread (larger and more colourful shapes
    raise it). A difference of utility within `tie` is a tie; beyond it they choose the first with probability sigma(difference),
    and a share `slips` of all choices is the other way round.
    """

    follows: float = 5.0
    vivid: float = 1.0
    tie: float = 0.4
    slips: float = 0.05

    def utility(self, images: Tensor, dense: Tensor) -> Tensor:
        """(...,) from pictures (..., 3, H, W) in [0, 1] and the verifier's dense score (...,)."""
        return self.follows * dense + self.vivid * (vividness(images) - VIVID_MEAN) / VIVID_STD

    def choices(self, difference: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Labels for differences of utility, first minus second: 1 the first, 0 the second, 0.5 a tie."""
        first = rng.random(difference.shape) < 1 / (1 + np.exp(-difference))
        slipped = rng.random(difference.shape) < self.slips
        return np.where(np.abs(difference) <= self.tie, 0.5, (first != slipped).astype(float))


VIVID_MEAN, VIVID_STD = 0.074, 0.037  #: Of `vividness` over pictures of the embedded generator.


def vividness(images: Tensor) -> Tensor:
    """Mean saturation (largest less smallest channel) of pictures (..., 3, H, W)."""
    return (images.amax(-3) - images.amin(-3)).mean((-2, -1))


@dataclass(frozen=True)
class Choices:
    """Pictures of captions, compared.

    images: (P, G, 3, 64, 64) uint8. strict, dense: (P, G), what the verifier says. pairs: (M, 3), caption, first and second
    picture. labels: (M,), 1 the first, 0 the second, 0.5 a tie.
    """

    prompts: list[str]
    images: Tensor
    strict: Tensor
    dense: Tensor
    pairs: Tensor
    labels: Tensor


def human_choices(
    name: str, pictures: int, pairs: int, seed: int, human: Human | None = None, limit: int | None = None, steps: int = 10
) -> Choices:
    """Choices of a `Human` between pictures that the embedded generator drew for the captions of a split.

    pictures: drawn for each caption, the same for every seed, by `steps` ODE steps. pairs: compared of each caption, at random;
    seed: of pairs and choices. limit: captions, evenly of the split.
    """
    import torch

    human = human or Human()
    specs = split(name)
    specs = [specs[i * len(specs) // limit] for i in range(limit)] if limit else specs
    images, strict, dense = drawn(specs, pictures, 0, steps)
    rng = np.random.default_rng([seed, 2])
    everything = list(combinations(range(pictures), 2))
    chosen = []
    for p in range(len(specs)):
        for k in rng.permutation(len(everything))[:pairs]:
            i, j = everything[k] if rng.random() < 0.5 else everything[k][::-1]
            chosen.append((p, i, j))
    where = torch.tensor(chosen)
    utility = human.utility(images.float() / 255, dense)
    difference = utility[where[:, 0], where[:, 1]] - utility[where[:, 0], where[:, 2]]
    labels = torch.from_numpy(human.choices(difference.double().numpy(), rng)).float()
    return Choices([spec["prompt"] for spec in specs], images, strict, dense, where, labels)
