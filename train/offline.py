"""Data in place of rollouts: preference pairs, or pictures with captions, as latents in the rows that objectives read.

pairs       two rows each, the preferred one first: advantages 1 and -1, times the pair's weight; ties are left out
pictures    one row each, advantage 1

    data=pairs.jsonl, pairs.parquet, a folder of pairs        as `flowrl.pairs` reads them
    data="runs/mine reward=tiny_strict gap=0.1"               the sample pictures of a run, compared by one of its rewards
    data=pictures/                                            a folder of NAME.png (.jpg, .webp, .mp4) with NAME.txt
    data=tiny-scenes, tiny-pairs                              drawn scenes of the embedded world; with one word wrong

Pictures are scaled and cropped to the size of the pipeline's call, both of a pair alike in size; clips, for pipelines that draw
them, have its number of frames. They are encoded when they are first asked for, each by itself, and their latents are kept in
memory up to `KEPT_BYTES`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from flowrl.batch import Prompt, Samples
from flowrl.clips import VIDEOS
from flowrl.config import ConfigError, Recipe, unknown
from flowrl.data import sample_seed
from flowrl.pairs import Source, load_pairs, load_picture, load_shown
from flowrl.policy import Policy
from flowrl.tiny import render, sample_scene, split
from flowrl.tiny.pairs import one_word_apart
from flowrl.train.objectives.base import Needs

SHOWN = (".png", ".jpg", ".jpeg", ".webp", *VIDEOS)  #: Files of pictures and clips.
KEPT_BYTES = 2 << 30


class Drawn(Sequence[tuple[Source, ...]]):
    """Scenes of the training captions of the embedded world, several of each, drawn when they are asked for.

    pairs: each with the same scene of a caption that differs in one word, second.
    """

    EACH = 4

    def __init__(self, pairs: bool):
        self.specs, self.pairs = split("train") * self.EACH, pairs

    def __len__(self) -> int:
        return len(self.specs)

    @overload
    def __getitem__(self, item: int) -> tuple[Source, ...]: ...
    @overload
    def __getitem__(self, item: slice) -> Sequence[tuple[Source, ...]]: ...
    def __getitem__(self, item: Any) -> Any:
        import numpy as np

        if isinstance(item, slice):
            return [self[i] for i in range(*item.indices(len(self)))]
        spec = self.specs[item]
        scenes = one_word_apart(spec, item)[:2] if self.pairs else (sample_scene(spec, np.random.default_rng(item)),)
        return tuple(torch.from_numpy(render(scene, np.random.default_rng([item, 2]))) for scene in scenes)


#: Data that comes with the library, by name: whether it is pairs.
EMBEDDED = {"tiny-scenes": False, "tiny-pairs": True}


@dataclass
class Data:
    """Rows of data by item: `rows` pictures each."""

    items: Sequence[tuple[Source, ...]]
    prompts: list[Prompt]
    weights: list[float]
    skipped: int = 0  #: Ties.
    latents: dict[int, Tensor] = field(default_factory=dict)  #: Those encoded so far, up to KEPT_BYTES.

    @property
    def rows(self) -> int:
        return len(self.items[0])

    @classmethod
    def load(cls, source: str, needs: Needs) -> Data:
        """source: as the module's docstring has it. Raises ConfigError, with file and row, for what cannot be read, and for an
        objective that has no use for data."""
        if not learns_from_data(needs):
            raise ConfigError(f"data={source}: this objective learns from its own samples; those that take data: {takers()}")
        place, options = parsed(source)
        try:
            data = cls._of_pictures(Path(place)) or cls._embedded(place)
            if data is not None and options:
                raise ConfigError(f"data={source}: {', '.join(options)} compares the pictures of a run, and {place} is none")
            data = data or cls._of_pairs(place, **options)
        except (OSError, ValueError) as error:
            raise error if isinstance(error, ConfigError) else ConfigError(f"data: {error}") from None
        if needs.unit != "sample" and data.rows != 2:
            raise ConfigError(f"data={source}: this objective compares two pictures of a prompt, and these are single pictures")
        return data

    @classmethod
    def _embedded(cls, name: str) -> Data | None:
        if name not in EMBEDDED:
            return None
        drawn = Drawn(EMBEDDED[name])
        columns = [{key: value for key, value in spec.items() if key != "prompt"} for spec in drawn.specs]
        prompts = [Prompt(spec["prompt"], own) for spec, own in zip(drawn.specs, columns, strict=True)]
        return cls(drawn, prompts, [1.0] * len(drawn))

    @classmethod
    def _of_pictures(cls, folder: Path) -> Data | None:
        captioned = sorted(p for p in folder.glob("*") if p.suffix.lower() in SHOWN and p.with_suffix(".txt").is_file())
        if not captioned:
            return None
        texts = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in captioned]
        return cls([(path,) for path in captioned], [Prompt(text) for text in texts], [1.0] * len(texts))

    @classmethod
    def _of_pairs(cls, source: str, reward: str | None = None, gap: float = 0.0) -> Data:
        if not Path(source).exists():
            raise FileNotFoundError(f"there is no {source}; data that comes with the library: {', '.join(EMBEDDED)}")
        pairs = load_pairs(source, reward, gap)
        strict = [pair for pair in pairs if pair.label != 0.5]
        if not strict:
            raise ValueError(f"all {len(pairs)} pairs of {source} are ties: they teach nothing")
        ordered = [(p.first, p.second) if p.label > 0.5 else (p.second, p.first) for p in strict]
        for pair, pictures in zip(strict, ordered, strict=True):
            for picture in pictures:
                if isinstance(picture, Path) and not picture.is_file():
                    raise FileNotFoundError(f"{source}: there is no picture {picture}, of the prompt {pair.prompt!r}")
        weights = [p.weight * abs(2 * p.label - 1) for p in strict]
        return cls(ordered, [Prompt(p.prompt) for p in strict], weights, len(pairs) - len(strict))

    def batch(self, places: Sequence[tuple[int, int]], policy: Policy, recipe: Recipe, step: int) -> tuple[Samples, Tensor]:
        """The items at (position in the step, number of the item), as rows of samples, and their advantages."""
        latents = self.encoded([item for _, item in places], policy)
        rows = [(position, item, row) for position, item in places for row in range(self.rows)]
        signs = [self.weights[item] * (1 if row == 0 else -1) for _, item, row in rows]
        samples = Samples(
            [self.prompts[item] for _, item, _ in rows],
            [sample_seed(recipe.seed, step, position, row) for position, _, row in rows],
            torch.tensor([step * recipe.prompts_per_step + position for position, _, _ in rows]),
            latents.to(policy.device),
            fps=policy.fps,
        )
        return samples, torch.tensor(signs)

    def encoded(self, items: Sequence[int], policy: Policy) -> Tensor:
        """(rows x items, ...) final latents on the CPU: those of an item follow one another. Raises ConfigError for what is no
        picture, and for a size that the pipeline's call does not draw."""
        fresh = [item for item in dict.fromkeys(items) if item not in self.latents]
        found = {}
        if fresh:
            try:
                pictures = torch.stack([picture for item in fresh for picture in self._pictures(item, policy)])
                parts = policy.latents_of(pictures.to(policy.device)).cpu().split(self.rows)
            except (OSError, ValueError) as error:
                raise ConfigError(f"data: {error}") from None
            found = dict(zip(fresh, parts, strict=True))
            if sum(kept.nbytes for kept in self.latents.values()) < KEPT_BYTES:
                self.latents.update(found)
        return torch.cat([found[item] if item in found else self.latents[item] for item in items])

    def _pictures(self, item: int, policy: Policy) -> list[Tensor]:
        pictures = [load_shown(source)[0] if isinstance(source, Path) else load_picture(source) for source in self.items[item]]
        for source, picture in zip(self.items[item], pictures, strict=True):
            check_kind(str(source) if isinstance(source, Path) else f"row {item + 1}", picture, policy)
        size = (int(policy.call.get("height", pictures[0].shape[-2])), int(policy.call.get("width", pictures[0].shape[-1])))
        return [resized(picture, size) for picture in pictures]


def check_kind(name: str, picture: Tensor, policy: Policy) -> None:
    """Raise ValueError for a clip where the policy draws pictures, and for another length than that of its clips; a picture is a
    clip of one frame."""
    if not policy.facts.draws_clips:
        if picture.ndim == 4:
            raise ValueError(f"{name} is a clip, and {policy.name} draws pictures")
        return
    frames = len(picture) if picture.ndim == 4 else 1
    if policy.num_frames not in (None, frames):
        own = f"is a clip of {frames} frames" if picture.ndim == 4 else "is a picture"
        raise ValueError(f"{name} {own}, and {policy.name} draws clips of {policy.num_frames} frames: set num_frames={frames}")


def learns_from_data(needs: Needs) -> bool:
    """Whether noised latents are all that an objective reads."""
    return needs.points == "noised" and not (needs.maps or needs.process or needs.differentiable)


def rows_of(source: str, needs: Needs) -> int:
    """Rows of an item, as far as can be told without reading the data, which need not be there yet: 2 of pairs, else 1."""
    place, options = parsed(source)
    if place in EMBEDDED:
        return 2 if EMBEDDED[place] else 1
    pairs = needs.unit != "sample" or options or Path(place).suffix in (".jsonl", ".parquet")
    return 2 if pairs or (Path(place) / "chosen").is_dir() or (Path(place) / "samples").is_dir() else 1


def takers() -> str:
    """The objectives, as they are by default, that take data."""
    from flowrl.train.objectives import OBJECTIVES

    return ", ".join(name for name, objective in OBJECTIVES.items() if learns_from_data(objective().needs))


def parsed(source: str) -> tuple[str, dict[str, Any]]:
    """A place and the options that follow it, "runs/mine reward=NAME gap=0.1". Raises ConfigError for others."""
    words = source.split(" ")
    options: dict[str, Any] = {}
    while len(words) > 1 and (not words[-1] or ("=" in words[-1] and "/" not in words[-1].partition("=")[0])):
        name, _, value = words.pop().partition("=")
        if name:
            options[name] = value
    for name in options:
        if name not in ("reward", "gap"):
            raise ConfigError(f"data={source}: {unknown('option of data', name, ('reward', 'gap'))}")
    if "gap" in options:
        try:
            options["gap"] = float(options["gap"])
        except ValueError:
            options["gap"] = math.nan
        if not 0 <= options["gap"] < math.inf:
            raise ConfigError(f"data={source}: gap must be a number, zero or positive")
    return " ".join(words), options


def resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture (3, H, W), or a clip (F, 3, H, W), scaled to cover (height, width), and its middle: what a pipeline of this size
    can draw."""
    if picture.shape[-2:] == size:
        return picture
    scale = max(size[0] / picture.shape[-2], size[1] / picture.shape[-1])
    shape: Any = [max(side, round(own * scale)) for side, own in zip(size, picture.shape[-2:], strict=True)]
    frames = picture if picture.ndim == 4 else picture[None]
    grown = torch.nn.functional.interpolate(frames, shape, mode="bicubic", antialias=True).clamp(0, 1)
    grown = grown if picture.ndim == 4 else grown[0]
    top, left = ((own - side) // 2 for side, own in zip(size, grown.shape[-2:], strict=True))
    return grown[..., top : top + size[0], left : left + size[1]]
