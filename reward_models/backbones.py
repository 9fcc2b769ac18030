"""Networks that see: dual encoders of pictures and texts (CLIP, SigLIP) with preprocessing on tensors, so that gradients pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Resize = Literal["crop", "pad", "squash"]


def as_tensor(output: Any) -> Tensor:
    """Projected features: transformers 4 returns the tensor, transformers 5 an output whose pooler_output it is."""
    return output if isinstance(output, Tensor) else output.pooler_output


def resized(images: Tensor, size: tuple[int, int], resize: Resize = "crop") -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] to (N, 3, h, w), bicubic and antialiased as PIL does it, with graph.

    crop: the short side to fit, then the centre; what lies outside is not seen. pad: the long side to fit, zeros around it
    (before normalisation). squash: both sides, whatever becomes of the proportions.
    """
    h, w = size
    height, width = images.shape[-2:]
    if resize == "squash":
        scaled = size
    else:
        ratio = (max if resize == "crop" else min)(h / height, w / width)
        scaled = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    x = images.float()
    if scaled != (height, width):
        x = F.interpolate(x, scaled, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (scaled[0] - h) // 2, (scaled[1] - w) // 2
    if resize == "crop":
        return x[..., top : top + h, left : left + w]
    return F.pad(x, (-left, w - scaled[1] + left, -top, h - scaled[0] + top))


def per_frame(function: Any, images: Tensor) -> Tensor:
    """A function of pictures over clips: (N, F, 3, H, W) -> (N, F, ...); over pictures (N, 3, H, W) -> (N, ...)."""
    if images.ndim == 4:
        return function(images)
    return function(images.flatten(0, 1)).unflatten(0, images.shape[:2])


class ClipBackbone(nn.Module):
    """A dual encoder of transformers (CLIP, SigLIP, ...), its tokenizer, and its preprocessing as tensor arithmetic.

    size: (h, w) that the vision tower takes. mean, std: of the pixels, per channel.
    """

    def __init__(
        self, model: Any, tokenizer: Any, mean: Sequence[float], std: Sequence[float], resize: Resize = "crop", place: str = ""
    ):
        super().__init__()
        self.model, self.tokenizer, self.resize, self.place = model.eval(), tokenizer, resize, place
        size = model.config.vision_config.image_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.patch = int(model.config.vision_config.patch_size)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @classmethod
    def load(cls, place: str | Path, resize: Resize = "crop", processor: str | Path | None = None) -> ClipBackbone:
        """From a folder or a hub id. processor: where the tokenizer and the pixel statistics are, if elsewhere.

        Raises ValueError, in one sentence, when there is no such model here and none can be fetched.
        """
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        try:
            model = AutoModel.from_pretrained(str(place), dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(str(processor or place))
            pixels = AutoImageProcessor.from_pretrained(str(processor or place))
        except OSError as error:
            raise ValueError(f"no encoder at {place}: {' '.join(str(error).split())[:200]}") from None
        return cls(model, tokenizer, pixels.image_mean, pixels.image_std, resize, str(place)).requires_grad_(False)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Model, tokenizer and pixel statistics as `load` and transformers read them."""
        from transformers import CLIPImageProcessor

        kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.to(dtype).save_pretrained(folder)
        self.model.float().load_state_dict(kept)
        self.tokenizer.save_pretrained(folder)
        edges = {"shortest_edge": self.size[0]}
        crop = {"height": self.size[0], "width": self.size[1]}
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        CLIPImageProcessor(size=edges, crop_size=crop, image_mean=mean, image_std=std).save_pretrained(folder)

    # -- pictures

    def pixels(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> what the vision tower takes, with graph. The networks follow the pictures to their device."""
        if self.mean.device != images.device:
            self.to(images.device)
        return (resized(images, self.size, self.resize) - self.mean) / self.std

    def pictures(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, D) projected, not normalised, with graph."""
        return as_tensor(self.model.get_image_features(pixel_values=self.pixels(images)))

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // self.patch, self.size[1] // self.patch

    def patches(self, images: Tensor, layer: int = -1) -> Tensor:
        """(N, 3, H, W) -> (N, M, W), M = h w of `grid`: hidden states of the patches after a layer, normed after the last."""
        vision = self.model.vision_model
        if layer == -1:
            states = vision(pixel_values=self.pixels(images)).last_hidden_state
            if hasattr(vision, "post_layernorm") and hasattr(vision, "pre_layrnorm"):
                states = vision.post_layernorm(states)  # CLIP norms the class token only
        else:
            states = vision(pixel_values=self.pixels(images), output_hidden_states=True).hidden_states[layer]
        return states[:, states.shape[1] - self.grid[0] * self.grid[1] :]

    # -- texts

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Padded and cut to what the text tower reads."""
        limit = int(self.model.config.text_config.max_position_embeddings)
        batch = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        return {name: batch[name].to(self.mean.device) for name in ("input_ids", "attention_mask") if name in batch}

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(N, D) projected, not normalised. Each distinct prompt is encoded once."""
        unique = list(dict.fromkeys(prompts))
        rows = torch.tensor([unique.index(prompt) for prompt in prompts], device=self.mean.device)
        return as_tensor(self.model.get_text_features(**self.tokens(unique)))[rows]

    def words(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Hidden states of the text's tokens (N, L, W'), and which of them are words: neither padding, start nor end."""
        tokens = self.tokens(prompts)
        states = self.model.text_model(**tokens).last_hidden_state
        special = torch.tensor(sorted(set(self.tokenizer.all_special_ids)), device=states.device)
        return states, ~torch.isin(tokens["input_ids"], special)

    # -- both

    def shared(self, states: Tensor, of: Literal["patches", "words"]) -> Tensor:
        """Hidden states (..., W) through the projection heads, so that tokens of both sides compare by cosine."""
        head = getattr(self.model, "visual_projection" if of == "patches" else "text_projection", None)
        return states if head is None else head(states)

    @property
    def dim(self) -> int:
        config = self.model.config
        return int(getattr(config, "projection_dim", None) or config.vision_config.hidden_size)

    @property
    def logit_scale(self) -> Tensor:
        """Factor of the cosine, not its logarithm."""
        return self.model.logit_scale.exp()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, (N, D) and (N, D) -> (N,), fp32."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1)
