"""What is where in a picture: detectors behind one small interface, for rewards of layout, counts, colours and relations."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.batch import Samples
from flowrl.reward_models.base import RewardError, to_pil
from flowrl.reward_models.weights import located

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Found:
    """One detection. box: (x0, y0, x1, y1) as shares of the picture's width and height; score in [0, 1].

    color: where the detector tells it.
    """

    phrase: str
    box: Box
    score: float
    color: str | None = None


class Detector(Protocol):
    """Anything with this method. It is asked for phrases; one that sees more reports the rest under names of its own."""

    def detect(self, images: Tensor, phrases: Sequence[Sequence[str]]) -> list[list[Found]]:
        """images: (N, 3, H, W) in [0, 1]; phrases: what to look for in each of them. Detections per picture, in any order.

        Weak detections come too: the rewards have thresholds of their own, and order failures by what lies below them.
        """


def load_detector(spec: Any = "tiny") -> Detector:
    """tiny, the hub id or folder of a zero-shot detector, "package.module:Class" of your own, or a detector as it is."""
    if hasattr(spec, "detect"):
        return spec
    if spec == "tiny":
        return TinyDetector()
    if isinstance(spec, str) and ":" in spec and "/" not in spec and "\\" not in spec:
        try:
            return load_detector(pkgutil.resolve_name(spec)())
        except (ImportError, AttributeError) as error:
            raise ValueError(f"detector={spec!r} cannot be imported: {error}") from None
    if not isinstance(spec, str):
        raise ValueError(f"detector={spec!r}: give tiny, a hub id, a folder, a dotted path, or an object with detect(...)")
    return _zero_shot(spec)


@lru_cache(maxsize=2)
def _zero_shot(model: str) -> ZeroShotDetector:
    """One network for all rewards that look with it."""
    return ZeroShotDetector(model)


def pictures_of(samples: Samples, name: str) -> Tensor:
    """The pictures (N, 3, H, W). Raises RewardError for clips and for samples that are not decoded."""
    if samples.images is None or samples.images.ndim != 4:
        raise RewardError(f"reward {name!r} scores pictures (N, 3, H, W)")
    return samples.images


def detect_in(detector: Detector, images: Tensor, phrases: Sequence[Sequence[str]]) -> list[list[Found]]:
    """`detector.detect` over pictures that each have something to look for; the others get an empty list."""
    asked = [i for i, wanted in enumerate(phrases) if wanted]
    found: list[list[Found]] = [[] for _ in phrases]
    if asked:
        for i, objects in zip(asked, detector.detect(images[asked], [phrases[i] for i in asked]), strict=True):
            found[i] = objects
    return found


def intersections(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (P, 4) and (T, 4) -> (P, T): intersection over union, and intersection over the smaller of the two."""
    corner0 = np.maximum(a[:, None, :2], b[None, :, :2])
    corner1 = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.clip(corner1 - corner0, 0, None), -1)
    area_a, area_b = (np.prod(np.clip(x[:, 2:] - x[:, :2], 0, None), -1) for x in (a, b))
    union = area_a[:, None] + area_b[None] - shared
    smaller = np.minimum(area_a[:, None], area_b[None])
    return shared / np.maximum(union, 1e-12), shared / np.maximum(smaller, 1e-12)


def distinct(found: Iterable[Found], overlap: float = 0.9) -> list[Found]:
    """Best first, without those that share more than `overlap` of the smaller box with a better one of their phrase.

    That covers both rules in use, intersection over union and containment above 0.9, as the second follows from the first.
    """
    ranked = sorted(found, key=lambda f: -f.score)
    kept: list[int] = []
    if ranked:
        boxes = np.array([f.box for f in ranked])
        within = intersections(boxes, boxes)[1]
        for i, candidate in enumerate(ranked):
            if all(within[i, k] <= overlap or ranked[k].phrase != candidate.phrase for k in kept):
                kept.append(i)
    return [ranked[i] for i in kept]


class TinyDetector:
    """The reader of the embedded world (`flowrl.tiny.verify`): six shapes in six colours, no network.

    Phrases name a shape, with or without its colour: "circle", "red circle". Where the colour is asked for, an object that has
    only the shape or only the colour right is reported under the phrase too, with a fifth of its score, as real detectors do.
    Objects that answer no phrase are reported as what they are ("blue star", "unknown").
    """

    HALF_RIGHT = 0.2

    def detect(self, images: Tensor, phrases: Sequence[Sequence[str]]) -> list[list[Found]]:
        from flowrl.tiny.verify import detect_batch

        height, width = images.shape[-2:]
        results = []
        for detections, wanted in zip(detect_batch(images), phrases, strict=True):
            asked = {phrase: self._read(phrase) for phrase in wanted}
            found = []
            for d in detections:
                x0, y0, x1, y1 = d.box
                box = (x0 / width, y0 / height, x1 / width, y1 / height)
                credits = {phrase: self._credit(d.shape, d.color, *shape_color) for phrase, shape_color in asked.items()}
                if 1.0 not in credits.values():
                    credits["unknown" if d.shape == "unknown" else f"{d.color} {d.shape}"] = 1.0
                found += [Found(phrase, box, credit * d.score, d.color) for phrase, credit in credits.items() if credit]
            results.append(found)
        return results

    def _credit(self, shape: str, color: str, asked_shape: str, asked_color: str | None) -> float:
        if shape == "unknown":
            return 0.0
        if asked_color is None or (shape == asked_shape) == (color == asked_color):
            return float(shape == asked_shape)
        return self.HALF_RIGHT

    @staticmethod
    def _read(phrase: str) -> tuple[str, str | None]:
        """Shape and colour of a phrase."""
        from flowrl.tiny.scenes import COLORS, SHAPES

        words = phrase.lower().split()
        shapes, colors = [w for w in words if w in SHAPES], [w for w in words if w in COLORS]
        if len(shapes) != 1 or len(colors) > 1:
            raise ValueError(
                f"detector=tiny cannot look for {phrase!r}: it knows {', '.join(SHAPES)}, each in {', '.join(COLORS)}; "
                f"for other things set detector to a model, such as {ZeroShotDetector.DEFAULT}"
            )
        return shapes[0], colors[0] if colors else None


class ZeroShotDetector:
    """Open-vocabulary detectors of transformers: Grounding DINO (also MM), OWL-ViT and OWLv2.

    model: hub id or folder. threshold: weaker detections are dropped; the rewards cut higher. overlap: see `distinct`. Every box
    is named by the one phrase that fits best: Grounding DINO scores a phrase by its best token, as its own threshold does.
    """

    DEFAULT = "IDEA-Research/grounding-dino-tiny"
    FAMILIES = ("grounding-dino", "mm-grounding-dino", "owlv2", "owlvit")

    def __init__(self, model: str = DEFAULT, threshold: float = 0.05, overlap: float = 0.9, batch_size: int = 8):
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        try:
            network = AutoModelForZeroShotObjectDetection.from_pretrained(located(model), dtype=torch.float32)
            self.processor = AutoProcessor.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ValueError(f"detector={model!r} does not load: {' '.join(str(error).split())[:300]}") from None
        self.model = network.eval().requires_grad_(False)
        self.family = network.config.model_type
        if self.family not in self.FAMILIES:
            raise ValueError(f"detector={model!r} is a {self.family} model; supported are {', '.join(self.FAMILIES)}")
        self.threshold, self.overlap, self.batch_size = threshold, overlap, batch_size

    @torch.no_grad()
    def detect(self, images: Tensor, phrases: Sequence[Sequence[str]]) -> list[list[Found]]:
        self.model.to(images.device)
        # Pictures that look for the same go together, so that no text is padded and no score depends on the batch.
        alike: dict[tuple[str, ...], list[int]] = {}
        for i, wanted in enumerate(phrases):
            alike.setdefault(tuple(wanted), []).append(i)
        results: list[list[Found]] = [[] for _ in phrases]
        for wanted, members in alike.items():
            for start in range(0, len(members), self.batch_size):
                part = members[start : start + self.batch_size]
                for i, found in zip(part, self._alike(images[part], list(wanted)), strict=True):
                    results[i] = found
        return results

    def _alike(self, images: Tensor, phrases: list[str]) -> list[list[Found]]:
        scores, boxes = self.boxes(images, phrases)
        results = []
        for values, places in zip(scores.cpu(), boxes.cpu(), strict=True):
            best, which = values.max(-1)
            rows = (best > self.threshold).nonzero().flatten().tolist()
            found = [Found(phrases[int(which[r])], tuple(places[r].tolist()), float(best[r])) for r in rows]
            results.append(distinct((f for f in found if f.box[0] < f.box[2] and f.box[1] < f.box[3]), self.overlap))
        return results

    def boxes(self, images: Tensor, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Every query of the model: scores (N, Q, phrases) in [0, 1], boxes (N, Q, 4) as shares of the picture, clipped to it."""
        dino = "dino" in self.family
        words = [" ".join(phrase.lower().replace(".", " ").replace("?", " ").split()) for phrase in phrases]
        text: list[Any] = [". ".join(words) + "."] * len(images) if dino else [words] * len(images)
        inputs = self.processor(images=to_pil(images), text=text, return_tensors="pt").to(images.device)
        outputs = self.model(**inputs)
        logits = self._per_phrase(outputs.logits, inputs["input_ids"][0].tolist(), words) if dino else outputs.logits
        x, y, w, h = outputs.pred_boxes.float().unbind(-1)
        boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
        if self.family == "owlv2":  # it sees the picture in the upper left of a square
            height, width = images.shape[-2:]
            side = max(height, width)
            boxes = boxes * boxes.new_tensor([side / width, side / height, side / width, side / height])
        return logits.float().sigmoid(), boxes.clamp(0, 1)

    def _per_phrase(self, logits: Tensor, ids: list[int], phrases: list[str]) -> Tensor:
        """(N, Q, tokens) -> (N, Q, phrases)."""
        tokenizer = self.processor.tokenizer
        breaks = {
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
            tokenizer.pad_token_id,
            tokenizer.convert_tokens_to_ids("."),
        }
        runs: list[list[int]] = [[]]
        for position, token in enumerate(ids[: logits.shape[-1]]):
            if token not in breaks:
                runs[-1].append(position)
            elif runs[-1]:
                runs.append([])
        runs = [run for run in runs if run]
        if len(runs) != len(phrases):
            raise ValueError(f"the detector's text holds {len(runs)} of {len(phrases)} phrases: {', '.join(phrases)}")
        return torch.stack([logits[..., run].amax(-1) for run in runs], -1)


class ClipColors:
    """Names the colour of boxes with CLIP, as GenEval does: three templates per colour, the nearest of ten colours.

    GenEval greys the background by the object's mask; boxes have no mask, so that the crop is used as it is.
    """

    COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
    TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")

    def __init__(self, place: Any = "openai/clip-vit-large-patch14"):
        from flowrl.reward_models.backbones import ClipBackbone

        self.clip = place if isinstance(place, ClipBackbone) else ClipBackbone.load(place)

    def __call__(self, image: Tensor, boxes: Sequence[Box], name: str) -> list[str]:
        """image: (3, H, W) in [0, 1]; name: what is in all of the boxes. One colour per box."""
        return [self.COLORS[i] for i in self.probabilities(image, boxes, name).argmax(-1).tolist()]

    @torch.no_grad()
    def probabilities(self, image: Tensor, boxes: Sequence[Box], name: str) -> Tensor:
        """Of each of COLORS, (boxes, colours): a softmax of CLIP's logits. Arguments as in a call."""
        height, width = image.shape[-2:]
        crops = []
        for x0, y0, x1, y1 in boxes:
            left, top = min(int(x0 * width), width - 1), min(int(y0 * height), height - 1)
            right, bottom = max(left + 1, round(x1 * width)), max(top + 1, round(y1 * height))
            crop = image[None, :, top:bottom, left:right]
            crops.append(F.interpolate(crop.float(), self.clip.size, mode="bicubic", antialias=True).clamp(0, 1))
        pictures = F.normalize(self.clip.pictures(torch.cat(crops)).float(), dim=-1)
        texts = [template.format(color=color, name=name) for color in self.COLORS for template in self.TEMPLATES]
        ways = F.normalize(self.clip.texts(texts).float(), dim=-1).unflatten(0, (len(self.COLORS), len(self.TEMPLATES)))
        return (self.clip.logit_scale * pictures @ F.normalize(ways.mean(1), dim=-1).T).softmax(-1)


class Colors:
    """The colours of detections whose detector does not tell them.

    namer: hub id or folder of a CLIP, loaded when it is first asked, or a function (image (3, H, W), boxes, name) -> colours.
    """

    def __init__(self, namer: Any):
        self.given = namer

    def __call__(self, image: Tensor, found: Sequence[Found], names: Container[str]) -> list[Found]:
        """All of them, those of these names with a colour."""
        named = list(found)
        for name in dict.fromkeys(f.phrase for f in found if f.color is None and f.phrase in names):
            rows = [i for i, f in enumerate(found) if f.color is None and f.phrase == name]
            for i, color in zip(rows, self.namer(image, [found[i].box for i in rows], name), strict=True):
                named[i] = replace(found[i], color=color)
        return named

    def chances(self, image: Tensor, found: Sequence[Found], name: str, color: str) -> list[float]:
        """How likely each of them, of one name, has the colour: 1 or 0 where somebody names it, else CLIP's probability."""
        boxes = [f.box for f in found if f.color is None]
        if boxes and isinstance(self.namer, ClipColors) and color in ClipColors.COLORS:
            told = iter(self.namer.probabilities(image, boxes, name)[:, ClipColors.COLORS.index(color)].tolist())
            return [next(told) if f.color is None else float(f.color == color) for f in found]
        return [float(f.color == color) for f in self(image, found, [name])]

    @property
    def namer(self) -> Callable[[Tensor, Sequence[Box], str], list[str]]:
        if not callable(self.given):
            self.given = ClipColors(self.given)
        return self.given
