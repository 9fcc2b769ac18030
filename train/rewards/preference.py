"""A model of preference: a dual encoder and a head that score the picture somebody chose above the one they did not.

Bradley-Terry (PickScore 2305.01569, ImageReward 2304.05977), with ties (VideoReward 2501.13918), with doubt (HPSv3 2508.03789),
over lists, and from implicit feedback (Social Reward). The losses are in `losses.py`, the data formats in `flowrl/pairs.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from flowrl.config import ConfigError
from flowrl.pairs import PreferencePair, RankedList, load_lists, load_pairs, load_picture
from flowrl.reward_models.backbones import ClipBackbone, Resize, resized
from flowrl.reward_models.base import place_of
from flowrl.reward_models.preference_network import Head, PreferenceNetwork
from flowrl.train.rewards import losses
from flowrl.train.rewards.loop import RewardRecipe, Score, held_out_prompts, picks

Example = PreferencePair | RankedList


@dataclass
class Preference:
    """Options of the task `preference`."""

    data: str = "tiny"  #: File or folder of `flowrl.pairs`, or `tiny`: choices between pictures of the embedded generator.
    eval_data: str | None = None  #: Held-out data; by default a part of the prompts of `data` (of tiny: its test captions).
    eval_share: float = 0.1  #: That part.
    reward: str | None = None  #: Of a run's samples, the reward that compares them.
    gap: float = 0.0  #: A difference of that reward up to here is a tie.

    backbone: str = "tiny_clip"  #: Dual encoder to start from: an embedded name, a folder or a hub id.
    resize: Resize = "crop"  #: How pictures come to its size.
    head: Head = "cos"  #: cos, linear, or gaussian: a mean with a standard deviation.
    hidden: int = 256  #: Width of the latter two.
    freeze: float = 0.0  #: Share of the layers of both towers, from below, that stay as they are.
    #: Part of the way from the encoder's first weights to the trained ones that is evaluated and saved (WiSE-FT, 2109.01903):
    #: below 1, what it knew before, of prompts that the data lacks, is not lost.
    interpolation: float = 1.0

    #: bradley_terry takes soft labels; ties is Bradley-Terry with ties; triplet wants cos; a gaussian head has its own loss.
    objective: Literal["bradley_terry", "ties", "triplet", "ranked_pairs", "plackett_luce", "gaussian"] = "bradley_terry"
    margin: float | None = None  #: Of bradley_terry (0 by default) and triplet (0.3).
    tie_factor: float = 5.0  #: k of `ties`: the larger, the likelier is a tie.
    variance: Literal["expected", "expansion", "marginal"] = "expected"  #: How the gaussian loss counts variance.

    tiny_pictures: int = 8  #: Pictures for each training caption of `tiny`.
    tiny_pairs: int = 12  #: Pairs compared of each caption.
    tiny_captions: int | None = None  #: Captions, all by default.

    def __post_init__(self) -> None:
        if (self.objective == "gaussian") != (self.head == "gaussian"):
            raise ConfigError(
                f"task: head={self.head} and objective={self.objective}: a gaussian head and the gaussian objective go together"
            )
        if self.objective == "triplet" and self.head != "cos":
            raise ConfigError(f"task: objective=triplet compares cosines: it wants head=cos, not {self.head}")
        if not 0 <= self.freeze <= 1:
            raise ConfigError(f"task.freeze={self.freeze}: a share from 0 to 1")
        if not 0 < self.interpolation <= 1:
            raise ConfigError(f"task.interpolation={self.interpolation}: a part above 0, up to 1")
        if not 0 < self.eval_share < 1:
            raise ConfigError(f"task.eval_share={self.eval_share}: a share between 0 and 1")
        if not self.tie_factor > 1:
            raise ConfigError(f"task.tie_factor={self.tie_factor}: must exceed 1, where ties are impossible")
        if self.data == "tiny" and (self.tiny_pictures < 2 or self.tiny_pairs < 1):
            raise ConfigError("task: tiny_pictures must be at least 2 and tiny_pairs at least 1")

    # -- the task

    def prepare(self, recipe: RewardRecipe, device: torch.device) -> nn.Module:
        self.recipe, self.device = recipe, device
        try:
            backbone = ClipBackbone.load(place_of(self.backbone), self.resize)
        except ValueError as error:
            raise ConfigError(f"task.backbone: {error}") from None
        try:
            self.train_set, self.test_set = self._tiny() if self.data == "tiny" else self._read()
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(f"task.data: {error}") from None
        self.network = PreferenceNetwork(backbone, self.head, self.hidden).to(device).requires_grad_(True)
        freeze(backbone.model, self.freeze)
        self.first = [p.detach().clone() for p in backbone.parameters()] if self.interpolation < 1 else []
        return self.network

    def _tiny(self) -> tuple[list[Example], list[Example]]:
        from flowrl.tiny.pairs import Choices, human_choices

        def examples(choices: Choices) -> list[Example]:
            pairs = [(*where, label) for where, label in zip(choices.pairs.tolist(), choices.labels.tolist(), strict=True)]
            images = choices.images
            found = [PreferencePair(choices.prompts[p], images[p, i], images[p, j], label) for p, i, j, label in pairs]
            return [pair.as_list for pair in found] if self.lists else list(found)

        seed = self.recipe.seed
        drawn = human_choices("train", self.tiny_pictures, self.tiny_pairs, seed, limit=self.tiny_captions)
        self.exact = human_choices("test", 4, 6, seed=0, limit=self.tiny_captions)
        return examples(drawn), examples(self.exact)

    def _read(self) -> tuple[list[Example], list[Example]]:
        def read(source: str) -> list[Example]:
            return list((load_lists if self.lists else load_pairs)(source, self.reward, self.gap))

        everything = read(self.data)
        if self.eval_data:
            return everything, read(self.eval_data)
        held = held_out_prompts((example.prompt for example in everything), self.eval_share, self.recipe.seed, self.data)
        return [e for e in everything if e.prompt not in held], [e for e in everything if e.prompt in held]

    @property
    def lists(self) -> bool:
        return self.objective in ("ranked_pairs", "plackett_luce")

    def batch(self, step: int) -> list[Example]:
        return [self.train_set[i] for i in picks(len(self.train_set), self.recipe, step)]

    def loss_of(self, scores: Tensor, examples: Sequence[Example]) -> Tensor:
        """One value per example. scores: (B, n) or (B, n, 2), as `scores_of` gives them."""
        if self.lists:
            ranks = ranks_of(examples).to(scores.device)
            return (losses.ranked_pairs if self.objective == "ranked_pairs" else losses.plackett_luce)(scores, ranks)
        label = torch.tensor([e.label for e in examples if isinstance(e, PreferencePair)], device=scores.device)
        if self.objective == "gaussian":
            return losses.gaussian(scores[..., 0], scores[..., 1], label, self.variance)
        d = scores[:, 0] - scores[:, 1]
        if self.objective == "ties":
            return losses.bradley_terry_with_ties(d, label, self.tie_factor)
        if self.objective == "triplet":
            cosines = scores / self.network.backbone.logit_scale
            better = torch.where(label > 0.5, cosines[:, 0], cosines[:, 1])
            worse = torch.where(label > 0.5, cosines[:, 1], cosines[:, 0])
            return losses.triplet(better, worse, 0.3 if self.margin is None else self.margin) * (label != 0.5)
        return losses.bradley_terry(d, label, self.margin or 0.0)

    def loss(self, batch: list[Example]) -> tuple[Tensor, dict[str, float]]:
        scores = self.scores_of(batch)
        weights = torch.tensor([getattr(example, "weight", 1.0) for example in batch], device=scores.device)
        values = self.loss_of(scores, batch)
        means = scores.detach() if scores.ndim == 2 else scores.detach()[..., 0]
        metrics = {"accuracy": losses.accuracy(*differences(means, batch))}
        if scores.ndim == 3:
            metrics["std"] = float(scores.detach()[..., 1].exp().mean())
        return (values * weights).sum() / weights.sum(), metrics

    def scores_of(self, examples: Sequence[Example]) -> Tensor:
        """What the network says of every picture, (B, n), or (B, n, 2) of a gaussian head; 0 where a list is shorter."""
        backbone = self.network.backbone
        pictures = [pictures_of(example) for example in examples]
        flat = [
            resized(load_picture(one)[None].to(self.device), backbone.size, self.resize)
            for several in pictures
            for one in several
        ]
        prompts = [example.prompt for example, several in zip(examples, pictures, strict=True) for _ in several]
        values = self.network(torch.cat(flat), prompts).float()
        return padded(list(values.split([len(several) for several in pictures])), 0.0)

    # -- held out

    @contextmanager
    def interpolated(self) -> Iterator[None]:
        """Within, the encoder's weights lie between the first and the trained ones."""
        weights = list(self.network.backbone.parameters())[: len(self.first)]
        trained = [p.detach().clone() for p in weights]
        with torch.no_grad():
            for p, first in zip(weights, self.first, strict=True):
                p.copy_(first.to(p.device).lerp(p, self.interpolation))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, before in zip(weights, trained, strict=True):
                    p.copy_(before)

    def evaluate(self) -> dict[str, Score]:
        with self.interpolated():
            return self.measure()

    def measure(self) -> dict[str, Score]:
        """accuracy: of decided pairs. accuracy_with_ties: of all, with the best tie threshold. calibration_error: of the
        probability that the first is preferred. rank_correlation: within lists. Of `tiny` also how often, and how well, the
        model agrees with the exact verifier."""
        parts = [self.scores_of(self.test_set[i : i + 64]).cpu() for i in range(0, len(self.test_set), 64)]
        scores = padded([row for part in parts for row in part], 0.0)
        means = scores if scores.ndim == 2 else scores[..., 0]
        d, label = differences(means, self.test_set)
        with_ties, threshold = losses.accuracy_with_ties(d, label)
        decided = int((label != 0.5).sum())
        result = {
            "accuracy": Score(losses.accuracy(d, label), decided),
            "accuracy_with_ties": Score(with_ties, len(label)),
            "tie_threshold": Score(threshold, len(label)),
        }
        if (label == 0.5).any() or self.objective == "ties":
            result["ties"] = Score.mean(label == 0.5)
        if self.lists:
            ranks = ranks_of(self.test_set)
            result["rank_correlation"] = Score(losses.rank_correlation(means, -ranks), len(ranks))
        elif self.objective != "triplet":
            result["calibration_error"] = Score(losses.calibration_error(self._probability(scores, d), label), decided)
        return result | (self._against_the_verifier() if self.data == "tiny" else {})

    def _probability(self, scores: Tensor, d: Tensor) -> Tensor:
        """That the first is preferred, given that one is."""
        if self.objective == "gaussian":
            return (d / (1 + math.pi / 8 * (2 * scores[..., 1]).exp().sum(1)).sqrt()).sigmoid()
        if self.objective == "ties":
            first, second = ((sign * d - math.log(self.tie_factor)).sigmoid() for sign in (1, -1))
            return first / (first + second)
        return d.sigmoid()

    def _against_the_verifier(self) -> dict[str, Score]:
        exact = self.exact
        lists: list[Example] = [
            RankedList(prompt, tuple(images), (1.0,) * len(images))
            for prompt, images in zip(exact.prompts, exact.images, strict=True)
        ]
        scores = torch.cat([self.scores_of(lists[i : i + 32]).cpu() for i in range(0, len(lists), 32)])
        means = scores if scores.ndim == 2 else scores[..., 0]
        result = {}
        for name, truth in (("strict", exact.strict), ("dense", exact.dense)):
            result[f"accuracy_{name}"] = Score(*losses.accuracy_within(means, truth))
        return result | {"rank_correlation_dense": Score(losses.rank_correlation(means, exact.dense), len(means))}

    # -- kept

    def save(self, folder: Path) -> None:
        facts: dict[str, Any] = {"objective": self.objective}
        if self.objective == "ties":
            facts["tie_factor"] = self.tie_factor
        with self.interpolated():
            self.network.save(folder, **facts)

    def describe(self) -> str:
        kinds = {
            "bradley_terry": "Bradley-Terry",
            "ties": f"Bradley-Terry with ties (k = {self.tie_factor:g})",
            "triplet": "the triplet loss",
            "ranked_pairs": "Bradley-Terry over the pairs of ranked lists",
            "plackett_luce": "Plackett-Luce over ranked lists",
            "gaussian": f"Bradley-Terry between Gaussian scores ({self.variance})",
        }
        text = (
            f"A preference model: a dual encoder (from `{self.backbone}`) with the head `{self.head}`, trained by "
            f"{kinds[self.objective]}.\n\n"
            f"Data: {len(self.train_set):,} comparisons, {len(self.test_set):,} held out, of other prompts ({self.data}).\n"
        )
        return text + (TINY.format(pictures=self.tiny_pictures) if self.data == "tiny" else "")


TINY = """\
The pictures are of `tiny-sd3`, 10 ODE steps, {pictures} for each training caption (held out: 4 for each test caption). Who chose
is made up (`flowrl.tiny.pairs.Human`): they like what the caption says, by the exact verifier's partial credit, and a little what
is vivid; small differences are ties, other choices are random as a logistic curve has it, and 5 % are slips.

`accuracy` is against those choices, on pairs that are no ties; `accuracy_strict`, `accuracy_dense` and `rank_correlation_dense`
(Kendall's tau within a caption) are against the verifier, whom the model has never met. It is imperfect, as models of human
preference are: a policy trained on it for long will find what it overrates.
"""


# ------------------------------------------------------------------------------------------------ small tools


def pictures_of(example: Example) -> tuple[Any, ...]:
    return (example.first, example.second) if isinstance(example, PreferencePair) else example.pictures


def padded(rows: Sequence[Tensor], fill: float) -> Tensor:
    """Rows (n_i, ...) of different lengths as one tensor (B, max n, ...)."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)


def ranks_of(examples: Sequence[Example]) -> Tensor:
    """(L, n) fp32, NaN where a list is shorter."""
    return padded([torch.tensor(e.ranks, dtype=torch.float32) for e in examples if isinstance(e, RankedList)], torch.nan)


def differences(scores: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Score differences and labels of all pairs in the examples, on the CPU. scores: (B, n)."""
    d, labels = [], []
    for row, example in zip(scores.tolist(), examples, strict=True):
        if isinstance(example, PreferencePair):
            d.append(row[0] - row[1])
            labels.append(example.label)
            continue
        for i in range(len(example.ranks)):
            for j in range(i):
                d.append(row[i] - row[j])
                labels.append((np.sign(example.ranks[j] - example.ranks[i]) + 1) / 2)
    return torch.tensor(d), torch.tensor(labels)


def freeze(model: Any, share: float) -> None:
    """The embeddings and the lower layers of both towers of a dual encoder stay as they are."""
    for tower in (model.vision_model, model.text_model):
        layers = tower.encoder.layers
        count = round(share * len(layers))
        lower = [tower.embeddings, getattr(tower, "pre_layrnorm", None), *layers[:count]] if count else []
        for module in lower:
            if module is not None:
                module.requires_grad_(False)
