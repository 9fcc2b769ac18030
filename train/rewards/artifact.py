"""Trains the artifact detector: binary, per-kind and per-patch cross-entropy of a light head on frozen features (2601.03468).

The curated set is small: a folder of pictures that somebody sorted, or the embedded world's, which has hard negatives. There it
is damaged scenes (`flowrl.tiny.corrupt`) against clean ones, half of both seen through the policy's own decoder; and samples of
the policy, of few steps too, which the exact reader calls clean (they do what the prompt says) or damaged (they hold a component
that is no shape). What it calls neither is left out, as doubtful.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl.config import ConfigError
from flowrl.pairs import load_picture
from flowrl.policy import Policy
from flowrl.reward_models.artifact import TINY_KINDS, ArtifactHead, encoder, features
from flowrl.reward_models.backbones import resized
from flowrl.reward_models.base import place_of
from flowrl.reward_models.features import picture_files
from flowrl.reward_models.magic_mirror import TAXONOMY
from flowrl.tiny import detect_batch, random_spec, render, sample_scene, verify
from flowrl.tiny.corrupt import KINDS, LABELS, corrupt
from flowrl.train.rewards.loop import RewardRecipe, Score, positions, seeds
from flowrl.train.rewards.losses import wins


@dataclass
class Curated:
    """Labelled pictures. images: (N, 3, H, W); damaged: (N,) 0 or 1; kinds: (N, K) 0, 1 or NaN where nobody said; mask: (N, H, W)
    where, NaN where nobody said; source: per picture, the kind of damage, "damaged", "clean", "sample" or "bad sample"."""

    images: Tensor
    damaged: Tensor
    kinds: Tensor
    mask: Tensor
    source: list[str]

    def __add__(self, other: Curated) -> Curated:
        names = ("images", "damaged", "kinds", "mask")
        both = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in names}
        return Curated(**both, source=self.source + other.source)

    def select(self, rows: Sequence[int]) -> Curated:
        names = ("images", "damaged", "kinds", "mask")
        return Curated(**{name: getattr(self, name)[rows] for name in names}, source=[self.source[i] for i in rows])

    def cells(self, grid: tuple[int, int]) -> Tensor:
        """(N, h, w): 1 where more than a twentieth of a cell is damaged, 0 where not, NaN where nobody said."""
        share = F.adaptive_avg_pool2d(self.mask[:, None].float(), grid)[:, 0]
        return share.gt(0.05).float().masked_fill(share.isnan(), torch.nan)


def scenes(count: int, names: tuple[str, ...], vae: Any, split: str, rng: np.random.Generator) -> Curated:
    """As many damaged scenes, in turn of these kinds, as clean ones; every second of both through the VAE, which softens all."""
    rows = []
    for i in range(count):
        scene = sample_scene(random_spec(rng, split), rng)
        name = names[i // 2 % len(names)] if i % 2 else "clean"
        blank = np.zeros((64, 64), bool)
        image, mask = (render(scene, rng), blank) if name == "clean" else corrupt(scene, name, rng.uniform(0.2, 1), rng)
        kind = torch.tensor([float(name != "clean" and LABELS[name][0] == k) for k in TINY_KINDS])
        rows.append((torch.from_numpy(image), torch.tensor(float(name != "clean")), kind, torch.from_numpy(mask), name))
    images, damaged, kinds, masks, source = (list(column) for column in zip(*rows, strict=True))
    # Fine texture does not survive the decoder: such a picture would be labelled damaged and show nothing.
    soft = [i for i in range(count) if i % 4 in (2, 3) and source[i] != "texture"]
    pictures = torch.stack(images)
    pictures[soft] = decoded(vae, pictures[soft])
    return Curated(pictures, torch.stack(damaged), torch.stack(kinds), torch.stack(masks), source)


@torch.no_grad()
def decoded(vae: Any, images: Tensor) -> Tensor:
    """Pictures as the policy's decoder would have drawn them."""
    parts = [vae.decode(vae.encode((2 * part - 1).to(vae.device)).latent_dist.mode()).sample for part in images.split(64)]
    return (torch.cat(parts).float().cpu() / 2 + 0.5).clamp(0, 1) if len(parts) else images


def samples(policy: Policy, count: int, steps: int, split: str, rng: np.random.Generator, keep_all: bool = False) -> Curated:
    """Samples of the policy with the exact reader's verdict. keep_all: those too that are sound but not what was asked for."""
    specs = [random_spec(rng, split) for _ in range(count)]
    seeds = [int(seed) for seed in rng.integers(1 << 31, size=count)]
    parts = []
    for i in range(0, count, 64):
        drawn = policy.rollout([spec["prompt"] for spec in specs[i : i + 64]], seeds[i : i + 64], num_inference_steps=steps)
        parts.append(policy.decode(drawn, num_inference_steps=steps).cpu())
    images = torch.cat(parts)
    strict, _ = verify(images, specs)
    mask = torch.zeros(count, *images.shape[-2:], dtype=torch.bool)
    for i, found in enumerate(detect_batch(images)):
        for box in (d.box for d in found if d.shape == "unknown"):
            mask[i, box[1] : box[3], box[0] : box[2]] = True
    bad = mask.flatten(1).any(1)
    kinds = torch.where(bad[:, None], torch.nan, 0.0).expand(-1, len(TINY_KINDS)).clone()
    source = ["bad sample" if b else "sample" for b in bad.tolist()]
    all_of = Curated(images, bad.float(), kinds, mask, source)
    kept = torch.arange(count) if keep_all else (bad | (strict == 1)).nonzero()[:, 0]
    chosen = {name: getattr(all_of, name)[kept] for name in ("images", "damaged", "kinds", "mask")}
    return Curated(**chosen, source=[source[i] for i in kept])


def sorted_pictures(folder: str | Path, size: tuple[int, int]) -> tuple[Curated, tuple[str, ...]]:
    """Pictures that somebody sorted, squashed to a size (h, w), in half precision; and the kinds of damage that they name.

    FOLDER/clean/*, FOLDER/damaged/* or FOLDER/damaged/KIND/* with MagicMirror's kinds, and where there is one,
    FOLDER/masks/NAME.png of the damaged picture of that name, bright where it is damaged. Raises ValueError for what is missing
    or cannot be read.
    """
    folder = Path(folder)
    files = {name: picture_files(folder / name) for name in ("clean", "damaged")}
    said = [file.relative_to(folder / "damaged").parts[:-1] for file in files["damaged"]]
    if unknown := {"/".join(parts) for parts in said if parts and (len(parts) > 1 or parts[0] not in TAXONOMY)}:
        raise ValueError(f"{folder / 'damaged' / min(unknown)}: kinds are {', '.join(TAXONOMY)}")
    kinds = tuple(kind for kind in TAXONOMY if (kind,) in said) or ("other",)
    rows = [(file, 0.0, (0.0,) * len(kinds), "clean") for file in files["clean"]]
    for file, parts in zip(files["damaged"], said, strict=True):
        named = tuple(float((kind,) == parts) for kind in kinds) if parts else (math.nan,) * len(kinds)
        rows.append((file, 1.0, named, parts[0] if parts else "damaged"))
    masks = []
    for file, damaged, *_ in rows:
        drawn = folder / "masks" / f"{file.stem}.png"
        known = resized(load_picture(drawn)[None], size, "squash")[0, 0] > 0.5 if damaged and drawn.is_file() else None
        masks.append(torch.full(size, math.nan if damaged else 0.0) if known is None else known.float())
    pictures = [resized(load_picture(file)[None], size, "squash")[0].half() for file, *_ in rows]
    marks, each = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
    return Curated(torch.stack(pictures), marks, each, torch.stack(masks), [row[3] for row in rows]), kinds


def auc(scores: Tensor, positive: Tensor) -> float:
    """Chance that a positive scores above a negative, ties counting half; NaN without either, and where a score is NaN."""
    above, below = scores[positive.bool()], scores[~positive.bool()]
    return float(wins(above[:, None] - below[None]).mean())


@dataclass
class Artifact:
    """Options of the task `artifact`."""

    #: `tiny`: drawn scenes and samples of the embedded world; or a folder with pictures in clean/ and damaged/, in which
    #: damaged/KIND/ may name MagicMirror's kinds (human, animal, object, ...), and masks/NAME.png may say where.
    data: str = "tiny"
    eval_share: float = 0.1  #: Held-out part of a folder.
    backbone: str = "tiny_clip"  #: Frozen encoder: an embedded one, a folder or a hub id.
    #: Whose patch features the head reads: 0 is the embedded patches, -1 the last layer.
    layers: list[int] = field(default_factory=lambda: [0, 2])
    hidden: int = 96  #: Width of the head.
    model: str = "tiny-sd3"  #: Policy whose decoder and samples the set holds.
    scenes: int = 6000  #: Drawn scenes, half of them damaged.
    generated: int = 2400  #: Samples of the policy before the doubtful ones are left out: half of 10 steps, half of 4.
    held_out_kind: str = "tear"  #: A kind of damage that is never trained on, to be found all the same.
    held_out: int = 480  #: Drawn scenes of the test prompts to measure on, and half as many samples.
    map_weight: float = 1.0  #: Weight of the per-patch loss.
    kinds_weight: float = 0.3  #: Weight of the loss of the kinds.

    def prepare(self, recipe: RewardRecipe, device: torch.device) -> nn.Module:
        """Makes the set and its features, once, and the head."""
        if self.held_out_kind not in KINDS:
            raise ConfigError(f"task.held_out_kind={self.held_out_kind!r}: choose one of {', '.join(KINDS)}")
        if not 0 < self.eval_share < 1:
            raise ConfigError(f"task.eval_share={self.eval_share}: a share between 0 and 1")
        self.recipe, self.device = recipe, device
        self.encoder = encoder(self.backbone).to(device)
        try:
            kinds = self._draw() if self.data == "tiny" else self._read()
        except ValueError as error:
            raise ConfigError(f"task.data: {error}") from None
        self.states = self._states(self.train)
        self.test_states = {name: self._states(part) for name, part in self.tests.items()}
        self.cells = self.train.cells(self.encoder.grid)
        self.head = ArtifactHead(self.states.shape[-1], len(self.layers), self.encoder.grid, kinds, self.hidden)
        return self.head.to(device)

    def _draw(self) -> tuple[str, ...]:
        """The embedded world's pictures, and their kinds of damage."""
        recipe = self.recipe
        policy = Policy.load(self.model, device=self.device)
        trained = tuple(kind for kind in KINDS if kind != self.held_out_kind)
        rng, rng_test = np.random.default_rng([recipe.seed, 0]), np.random.default_rng([recipe.seed, 1])
        self.train = scenes(self.scenes, trained, policy.pipe.vae, "train", rng)
        for steps in (10, 4):
            if self.generated:
                self.train += samples(policy, self.generated // 2, steps, "train", rng)
        self.tests = {
            "scenes": scenes(self.held_out, KINDS, policy.pipe.vae, "test", rng_test),
            "samples": samples(policy, self.held_out // 2, 20, "test", rng_test, keep_all=True),
        }
        return TINY_KINDS

    def _read(self) -> tuple[str, ...]:
        """A folder's pictures, a share of either label held out, and their kinds of damage."""
        everything, kinds = sorted_pictures(self.data, self.encoder.size)
        held = []
        for label in (0, 1):
            rows = (everything.damaged == label).nonzero()[:, 0].numpy()
            count = math.ceil(self.eval_share * len(rows))
            if count == len(rows):
                what = "damaged" if label else "clean"
                raise ValueError(f"{self.data} has {len(rows)} {what} pictures: too few to hold {count} out")
            held += np.random.default_rng([self.recipe.seed, label]).permutation(rows)[:count].tolist()
        self.train = everything.select([i for i in range(len(everything.source)) if i not in set(held)])
        self.tests = {"pictures": everything.select(held)}
        return kinds

    @torch.no_grad()
    def _states(self, part: Curated) -> Tensor:
        """(N, M, W) in half precision, on the CPU."""
        made = [features(self.encoder, images.to(self.device), self.layers) for images in part.images.split(128)]
        return torch.cat([states.half().cpu() for states in made])

    def batch(self, step: int) -> Tensor:
        """Rows of the set: a damaged and a clean one in turn, whatever their numbers are."""
        rows = [(self.train.damaged == label).nonzero()[:, 0] for label in (0, 1)]
        chosen = zip(positions(self.recipe), seeds(self.recipe, step), strict=True)
        return torch.stack([rows[place % 2][seed % len(rows[place % 2])] for place, seed in chosen])

    def loss(self, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        states, damaged = self.states[batch].to(self.device), self.train.damaged[batch].to(self.device)
        pixels = self.encoder.pixels(self.train.images[batch].to(self.device))
        kinds, cells = self.train.kinds[batch].to(self.device), self.cells[batch].to(self.device)
        whole, each, where = self.head(states, pixels)
        named, drawn = ~kinds.isnan(), ~cells.isnan()  # of clean pictures always
        parts = {
            "binary": F.binary_cross_entropy_with_logits(whole, damaged),
            "kinds": F.binary_cross_entropy_with_logits(each[named], kinds[named]),
            "map": F.binary_cross_entropy_with_logits(where[drawn], cells[drawn], pos_weight=where.new_tensor(3.0)),
        }
        total = parts["binary"] + self.kinds_weight * parts["kinds"] + self.map_weight * parts["map"]
        accuracy = ((whole > 0) == (damaged > 0.5)).float().mean()
        return total, {**{name: value.item() for name, value in parts.items()}, "accuracy": accuracy.item()}

    def evaluate(self) -> dict[str, Score]:
        """AUC and accuracy at 0.5, on each held-out set; AUC of the map, of each kind among the damaged, and of each source of
        damage against clean."""
        result: dict[str, Score] = {}
        for name, part in self.tests.items():
            pixels = self.encoder.pixels(part.images.to(self.device))
            whole, each, where = (x.cpu() for x in self.head(self.test_states[name].to(self.device), pixels))
            result[f"{name}/auc"] = Score(auc(whole, part.damaged), len(whole))
            result[f"{name}/accuracy"] = Score.mean((whole > 0) == (part.damaged > 0.5))
            cells, hurt = part.cells(self.encoder.grid), part.damaged > 0.5
            drawn = hurt & ~cells.isnan().flatten(1).any(1)
            if drawn.any():
                result[f"{name}/map_auc"] = Score(auc(where[drawn].flatten(), cells[drawn].flatten()), int(drawn.sum()))
            named = hurt & ~part.kinds.isnan().any(1)
            for i, kind in enumerate(self.head.kinds if named.any() else ()):
                result[f"kinds/{kind}/auc"] = Score(auc(each[named, i], part.kinds[named, i]), int(named.sum()))
            for source in dict.fromkeys(part.source) if named.any() else ():
                if source != "clean":
                    rows = torch.tensor([one in (source, "clean") for one in part.source])
                    result[f"{name}/{source}/auc"] = Score(auc(whole[rows], part.damaged[rows]), int(rows.sum()))
        return result

    def save(self, folder: Path) -> None:
        """The head, and the encoder too where it is a folder of the user's."""
        backbone = self.backbone
        if place_of(backbone) == backbone and Path(backbone).is_dir():
            self.encoder.save(folder)
            backbone = "."
        facts = {"never_seen": self.held_out_kind} if self.data == "tiny" else {}
        self.head.save(folder, backbone, self.layers, **facts)

    def describe(self) -> str:
        sources = self.train.source
        counted = ", ".join(f"{sources.count(name)} {name}" for name in dict.fromkeys(sources) if "sample" not in name)
        start = f"""\
Probability that a picture has no artifact, in [0, 1], without looking at the prompt: a head on the patch features of layers
{self.layers} of the frozen encoder `{self.backbone}`, with two convolutions of its own for what these do not see. It also says
where (`map`) and which of MagicMirror's kinds ({", ".join(self.head.kinds)}).
"""
        if self.data != "tiny":
            return f"""{start}
Trained on {len(sources):,} pictures of `{Path(self.data).name}`: {counted}. Held out: {len(self.tests["pictures"].source)} more.
AUC is the chance that a damaged picture scores below a clean one."""
        return f"""{start}
Trained on {len(sources):,} pictures of training prompts. Drawn scenes, half of them seen through the decoder of `{self.model}`:
{counted}. Samples of `{self.model}` in 10 and in 4 steps: {sources.count("sample")} that do what the prompt says are clean,
{sources.count("bad sample")} with a component that the exact reader calls no shape are damaged.

Held out: {len(self.tests["scenes"].source)} drawn scenes (`scenes`; the kind `{self.held_out_kind}` was never trained on), and
{len(self.tests["samples"].source)} samples of 20 steps (`samples`), none left out, against the exact reader; all of test
prompts. AUC is the chance that a damaged picture scores below a clean one."""
