"""A reward that answers: the chance that a vision language model says yes (RewardDance, arXiv 2509.08826).

    pointwise   r = P(yes | picture, prompt, instruction) / (P(yes | ...) + P(no | ...))
    reference   r = P(yes | reference picture, picture, prompt, instruction) likewise, both orders averaged

The model runs here, through transformers; `judge` asks one behind a server instead. Yes or no comes first, before any reasoning,
so that one forward pass is a reward, and a differentiable one where the model's pixels are plain (N, 3, h, w) tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.batch import Samples
from flowrl.reward_models.backbones import resized
from flowrl.reward_models.base import RewardError, Traits, place_of, to_pil
from flowrl.reward_models.weights import located, unreachable

QUESTION = "Does this picture show {prompt}? Answer yes or no."
REFERENCE_QUESTION = "Both pictures are meant to show {prompt}. Is the second one better than the first? Answer yes or no."
ANSWERS = ("yes", "no")
DTYPES = ("float32", "bfloat16", "float16")


class VisionLanguage(torch.nn.Module):
    """A model of `AutoModelForImageTextToText` with its processor, asked for the logits of yes and no."""

    def __init__(self, model: Any, processor: Any):
        super().__init__()
        self.model, self.processor = model, processor
        self.answers = tuple(one_token(processor.tokenizer, word) for word in ANSWERS)

    @classmethod
    def load(cls, place: str | Path, dtype: torch.dtype = torch.float32) -> VisionLanguage:
        """From a folder or hub id. Raises ValueError where there is no such model."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            model = AutoModelForImageTextToText.from_pretrained(located(place), dtype=dtype)
            return cls(model, AutoProcessor.from_pretrained(str(place))).eval()
        except OSError as error:
            raise ValueError(f"no vision language model: {unreachable(place, error)}") from None

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """As `load` and transformers read it, in half precision; the model itself stays as it is."""
        halved = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in self.model.state_dict().items()
        }
        self.model.save_pretrained(folder, state_dict=halved)
        self.processor.save_pretrained(folder)

    def forward(self, images: Sequence[Tensor], questions: Sequence[str]) -> Tensor:
        """Log-probabilities over the vocabulary of the first token of the answer, (N, V), fp32.

        images: one tensor (N, 3, H, W) in [0, 1] for each picture that the question is about, in order.
        """
        return self.read(images, questions)[0]

    def read(self, images: Sequence[Tensor], questions: Sequence[str], words: bool = False) -> tuple[Tensor, Tensor | None]:
        """What `forward` returns, and with `words` the mean log-probability (N,) of the question's own tokens, as a caption."""
        pictures = [[image[i] for image in images] for i in range(len(questions))]
        texts = [self._chat(question, len(images)) for question in questions]
        inputs = self.processor(
            images=[to_pil(torch.stack(row)) for row in pictures], text=texts, padding=True, return_tensors="pt"
        ).to(images[0].device)
        pixels = inputs["pixel_values"]
        if self.plain and pixels.shape[:2] == (len(questions) * len(images), 3):
            flat = torch.stack([picture for row in pictures for picture in row])
            inputs["pixel_values"] = self._pixels(flat, tuple(pixels.shape[-2:])).to(pixels.dtype)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        logits = self.model(**inputs).logits
        last = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(1).argmax(1)
        answer = logits[torch.arange(len(last), device=last.device), last].float().log_softmax(-1)
        if not words:
            return answer, None
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        told = mask[:, 1:] & mask[:, :-1] & (ids[:, 1:] != self.model.config.image_token_id)
        each = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return answer, (each * told).sum(1) / told.sum(1)

    def gap(self, images: Sequence[Tensor], questions: Sequence[str]) -> Tensor:
        """log P(yes) - log P(no), (N,), over all ways of writing either as one token."""
        return self.gap_of(self(images, questions))

    def gap_of(self, log_probs: Tensor) -> Tensor:
        yes, no = (log_probs[:, list(ids)].logsumexp(1) for ids in self.answers)
        return yes - no

    @property
    def plain(self) -> bool:
        """Are the model's pixels the picture itself, resized and normalised, so that gradients can pass?"""
        config = getattr(self.model.config, "vision_config", None)
        return getattr(config, "model_type", "") in ("clip_vision_model", "siglip_vision_model")

    def _pixels(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        of = self.processor.image_processor
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (of.image_mean, of.image_std))
        return (resized(images, size, "crop" if getattr(of, "do_center_crop", False) else "squash") - mean) / std

    def _chat(self, question: str, pictures: int) -> str:
        content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def asked(question: str, prompt: str) -> str:
    """A question about one prompt; other braces are the question's own."""
    return question.replace("{prompt}", prompt)


def one_token(tokenizer: Any, word: str) -> tuple[int, ...]:
    """Ids of the tokens that are this word alone, whatever its case and with or without a space. Raises ValueError for none."""
    known = set()
    for written in (word, word.capitalize(), word.upper()):
        for text in (written, " " + written):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
                known.add(int(ids[0]))
    if not known:
        raise ValueError(f"this model has no single token for {word!r}")
    return tuple(sorted(known))


class YesToken:
    """P(yes) / (P(yes) + P(no)) of a vision language model that runs here and is asked about each picture, in [0, 1]."""

    name = "yes_token"

    def __init__(
        self,
        folder: str | Path,  #: A model's folder (of `flowrl train-reward`, or any) or hub id.
        #: With {prompt} in it, or without where the prompt does not matter; unset: whether the picture shows the prompt, or with
        #: `reference`, whether the second picture is better.
        question: str | None = None,
        reference: bool = False,  #: Compare with the recipe's `references`; with several, the mean.
        #: Average (P(yes | reference, picture) + 1 - P(yes | picture, reference)) / 2, which takes out what the order alone does.
        both_orders: bool = True,
        batch_size: int = 32,  #: Pictures in one forward pass.
        dtype: str = "float32",  #: Of the weights: float32, bfloat16 or float16.
    ):
        if dtype not in DTYPES:
            raise ValueError(f"yes_token: dtype={dtype!r}: choose {', '.join(DTYPES)}")
        self.network = VisionLanguage.load(place_of(folder), getattr(torch, dtype)).requires_grad_(False)
        self.question = question or (REFERENCE_QUESTION if reference else QUESTION)
        self.reference, self.both_orders, self.batch_size = reference, both_orders, batch_size
        needs = ("images", "references") if reference else ("images",)
        licence = "of the weights: see the model card"
        self.traits = Traits(needs=needs, range=(0.0, 1.0), differentiable=self.network.plain, licence=licence)

    def __call__(self, samples: Samples) -> Tensor:
        images = samples.images
        if images is None or images.ndim != 4:
            raise RewardError(f"reward {self.name!r} scores pictures (N, 3, H, W)")
        self.network.to(images.device)
        questions = [asked(self.question, text) for text in samples.texts]
        if not self.reference:
            return self._yes([images], questions)
        references = samples.references
        if references is None:
            raise RewardError(f"reward {self.name!r} compares with references, and there are none")
        return torch.stack([self._against(references[:, r], images, questions) for r in range(references.shape[1])]).mean(0)

    def _against(self, reference: Tensor, images: Tensor, questions: list[str]) -> Tensor:
        first = self._yes([reference, images], questions)
        return (first + 1 - self._yes([images, reference], questions)) / 2 if self.both_orders else first

    def _yes(self, images: list[Tensor], questions: list[str]) -> Tensor:
        rows = torch.arange(len(questions)).split(self.batch_size)
        return torch.cat([self.network.gap([x[r] for x in images], [questions[i] for i in r]) for r in rows]).sigmoid()


def yes_loss(network: VisionLanguage, log_probs: Tensor, yes: Tensor, bradley_terry: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy on the answer's token: -log P(yes) where `yes` (N,) is true, -log P(no) elsewhere; and its accuracy.

    The token counts in any of its spellings. bradley_terry: weight of -log sigma(gap_w - gap_l) on the yes-to-no gap, for rows
    that come in pairs (w, l) of one question: rows 2 i and 2 i + 1 whose answers are yes and no.
    """
    said = torch.stack([log_probs[:, list(ids)].logsumexp(1) for ids in network.answers], 1)
    values = F.nll_loss(said, (~yes).long())
    gap = said[:, 0] - said[:, 1]
    if bradley_terry:
        values = values + bradley_terry * F.softplus(gap[1::2] - gap[::2]).mean()
    return values, ((gap > 0) == yes).float().mean()
