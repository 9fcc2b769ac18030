"""What is where in a picture: detectors behind one small interface, for rewards of layout, counts, colours and relations."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.base import RewardError, to_pil
from flowrl.reward_models.boxes import Box, Found, distinct, intersections
from flowrl.reward_models.colors import ClipColors, Colors
from flowrl.reward_models.weights import located

__all__ = [
    "Box",
    "ClipColors",
    "Colors",
    "Detector",
    "Found",
    "TinyDetector",
    "ZeroShotDetector",
    "detect_in",
    "distinct",
    "intersections",
    "load_detector",
    "pictures_of",
]


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
