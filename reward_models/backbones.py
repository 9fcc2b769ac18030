"""Networks that see: dual encoders of pictures and texts (CLIP, SigLIP) with preprocessing on tensors, so that gradients pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl.batch import Samples
from flowrl.reward_models.weights import fill, find_file, located, read, unreachable

Resize = Literal["crop", "pad", "squash"]
Mode = Literal["bicubic", "bilinear"]


def as_tensor(output: Any) -> Tensor:
    """Projected features: transformers 4 returns the tensor, transformers 5 an output whose pooler_output it is."""
    return output if isinstance(output, Tensor) else output.pooler_output


def resized(images: Tensor, size: tuple[int, int], resize: Resize = "crop", mode: Mode = "bicubic") -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] to (N, 3, h, w), antialiased as PIL does it, with graph.

    It differs from PIL, which rounds to 8 bits twice, by at most 2.5 / 255 in a pixel and 0.35 / 255 in the mean.

    crop: the short side to fit, then the centre; what lies outside is not seen. pad: the long side to fit, zeros around it
    (before normalisation). squash: both sides, whatever becomes of the proportions.
    """
    h, w = size
    height, width = images.shape[-2:]
    if resize == "squash":
        scaled = size
    elif resize == "crop":  # the processors cut the fraction of a pixel off the long side, and half a pixel off the margin
        tall = height * w >= width * h
        scaled = (max(h, int(w * height / width)), w) if tall else (h, max(w, int(h * width / height)))
    else:
        ratio = max(height / h, width / w)
        scaled = (max(1, round(height / ratio)), max(1, round(width / ratio)))
    x = images.float()
    if scaled != (height, width):
        x = F.interpolate(x, scaled, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
    if resize == "crop":
        top, left = (scaled[0] - h) // 2, (scaled[1] - w) // 2
        return x[..., top : top + h, left : left + w]
    left, top = (w - scaled[1]) // 2, (h - scaled[0]) // 2
    return F.pad(x, (left, w - scaled[1] - left, top, h - scaled[0] - top))


BILINEAR, BICUBIC = 2, 3  # PIL's numbers, as image processors store them
FRAMES = ("mean", "min", "softmin")
Frames = Literal["mean", "min", "softmin"]


def check_frames(frames: str) -> Frames:
    if frames not in FRAMES:
        raise ValueError(f"frames={frames!r}: choose {', '.join(FRAMES[:-1])} or {FRAMES[-1]}")
    return frames  # type: ignore[return-value]


def over_frames(values: Tensor, frames: Frames = "mean") -> Tensor:
    """Scores of a clip's frames (N, F, ...) as the clip's (N, ...).

    min: the worst frame, which a mean of 80 hides. softmin: a mean in which a frame one standard deviation (of its clip's frames)
    below another counts e times as much; the same for a reward in other units.
    """
    if frames == "mean":
        return values.mean(1)
    if frames == "min":
        return values.amin(1)
    spread = values.detach().std(1, unbiased=False, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return ((-(values.detach() - values.detach().amin(1, keepdim=True)) / spread).softmax(1) * values).sum(1)


def score_pictures(
    score: Callable[[Tensor, list[str]], Tensor], samples: Samples, frames: Frames = "mean", chunk: int = 64
) -> Tensor:
    """A score of pictures and their prompts, (M, 3, H, W) -> (M, ...), for samples that are pictures or clips: (N, ...) fp32.

    chunk: pictures per call, so that long clips fit.
    """
    images = samples.images
    assert images is not None, "this reward scores decoded samples"
    prompts = samples.texts
    if images.ndim == 5:
        prompts = [prompt for prompt in prompts for _ in range(images.shape[1])]
    flat = images if images.ndim == 4 else images.flatten(0, 1)
    parts = [score(flat[i : i + chunk], prompts[i : i + chunk]) for i in range(0, len(flat), chunk)]
    values = torch.cat(parts).float() if parts else torch.zeros(0)
    return values if images.ndim == 4 else over_frames(values.unflatten(0, images.shape[:2]), frames)


def per_frame(function: Any, images: Tensor) -> Tensor:
    """A function of pictures over clips: (N, F, 3, H, W) -> (N, F, ...); over pictures (N, 3, H, W) -> (N, ...)."""
    if images.ndim == 4:
        return function(images)
    return function(images.flatten(0, 1)).unflatten(0, images.shape[:2])


class DualEncoder(nn.Module):
    """What takes pictures and prompts into one space.

    size: (h, w) of the vision tower. mean, std: of the pixels, per channel. resize, mode: see `resized`. context: how many tokens
    the text tower reads.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: int | Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        resize: Resize,
        context: int,
        mode: Mode = "bicubic",
    ):
        super().__init__()
        if resize not in ("crop", "pad", "squash"):
            raise ValueError(f"resize={resize!r}: choose crop, pad or squash")
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.resize, self.context, self.mode = resize, context, mode
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def pixels(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> what the vision tower takes, with graph. The networks follow the pictures to their device."""
        if self.mean.device != images.device:
            self.to(images.device)
        return (resized(images, self.size, self.resize, self.mode) - self.mean) / self.std

    def pictures(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, D) projected, not normalised, with graph."""
        raise NotImplementedError

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(N, D) projected, not normalised. Each distinct prompt is encoded once."""
        unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        return self._texts(list(unique))[torch.tensor([unique[prompt] for prompt in prompts], device=self.mean.device)]

    def _texts(self, prompts: list[str]) -> Tensor:
        raise NotImplementedError

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, start and end among them, if none were cut at `context`."""
        raise NotImplementedError


class ClipBackbone(DualEncoder):
    """A dual encoder of transformers (CLIP, SigLIP, ...), its tokenizer, and its preprocessing as tensor arithmetic."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        mean: Sequence[float],
        std: Sequence[float],
        resize: Resize = "crop",
        place: str = "",
        mode: Mode = "bicubic",
    ):
        vision, text = model.config.vision_config, model.config.text_config
        super().__init__(vision.image_size, mean, std, resize, int(text.max_position_embeddings), mode)
        self.model, self.tokenizer, self.place = model.eval(), tokenizer, place
        self.patch = int(vision.patch_size)

    @classmethod
    def load(cls, place: str | Path, resize: Resize | None = None, processor: str | Path | None = None) -> ClipBackbone:
        """From a folder or a hub id, frozen. processor: where the tokenizer and the pixel statistics are, if elsewhere.

        resize: None does as the model's own processor: CLIP crops, SigLIP squashes. Raises ValueError, in one sentence, when
        there is no such model here and none can be fetched, and when its weights are incomplete.
        """
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        beside = processor or place
        try:
            model, info = AutoModel.from_pretrained(located(place), dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise unreachable(place, error) from None
        if not hasattr(model, "get_image_features"):
            raise ValueError(f"{place} is no dual encoder of pictures and texts but a {type(model).__name__}")
        if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
            raise ValueError(f"{place} lacks {len(missing)} weights of a {type(model).__name__}: {', '.join(missing[:3])} ...")
        try:
            beside = located(beside)
            tokenizer, pixels = AutoTokenizer.from_pretrained(beside), AutoImageProcessor.from_pretrained(beside)
        except (OSError, ValueError) as error:
            raise ValueError(f"no tokenizer or image processor: {unreachable(beside, error)}") from None
        own: Resize = "crop" if getattr(pixels, "do_center_crop", False) else "squash"
        mode: Mode = "bilinear" if pixels.resample == BILINEAR else "bicubic"
        encoder = cls(model, tokenizer, pixels.image_mean, pixels.image_std, resize or own, str(place), mode)
        return encoder.requires_grad_(False)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Model, tokenizer and pixel statistics as `load` and transformers read them."""
        from transformers import CLIPImageProcessor

        kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.to(dtype).save_pretrained(folder)
        self.model.float().load_state_dict(kept)
        self.tokenizer.save_pretrained(folder)
        box = {"height": self.size[0], "width": self.size[1]}
        crops = {"do_center_crop": self.resize == "crop", "crop_size": box}
        edges = {"shortest_edge": min(self.size)} if self.resize == "crop" else box
        statistics = {"image_mean": self.mean.flatten().tolist(), "image_std": self.std.flatten().tolist()}
        resample = BILINEAR if self.mode == "bilinear" else BICUBIC
        CLIPImageProcessor(size=edges, resample=resample, **crops, **statistics).save_pretrained(folder)

    # -- pictures

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
        batch = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.context, return_tensors="pt")
        siglip = self.model.config.model_type.startswith("siglip")  # it was trained to read its padding
        names = ("input_ids",) if siglip else ("input_ids", "attention_mask")
        return {name: batch[name].to(self.mean.device) for name in names}

    def _texts(self, prompts: list[str]) -> Tensor:
        return as_tensor(self.model.get_text_features(**self.tokens(prompts)))

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]]

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


class OpenClipBackbone(DualEncoder):
    """A dual encoder of open_clip, by the name of its architecture and a checkpoint file; nothing is downloaded but that file."""

    def __init__(self, model: Any, tokenizer: Any, resize: Resize = "crop"):
        super().__init__(
            model.visual.image_size, model.visual.image_mean, model.visual.image_std, resize, tokenizer.context_length
        )
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def load(cls, architecture: str, place: str | Path, filename: str, resize: Resize = "crop") -> OpenClipBackbone:
        """Frozen, from a checkpoint whose weights may stand under `state_dict`. place, filename: see `find_file`."""
        import open_clip

        if architecture not in open_clip.list_models():
            raise ValueError(f"open_clip has no architecture {architecture!r}")
        path = find_file(place, filename)
        state = read(path)
        silenced = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it warns that the weights are random, which they are until the next line
        try:
            model = open_clip.create_model(architecture, load_weights=False, pretrained_text=False)
        finally:
            logging.disable(silenced)
        fill(model, state.get("state_dict", state), path)
        return cls(model, open_clip.get_tokenizer(architecture), resize).requires_grad_(False)

    def pictures(self, images: Tensor) -> Tensor:
        return self.model.encode_image(self.pixels(images))

    def _texts(self, prompts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(prompts).to(self.mean.device))

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        return [len(self.tokenizer.encode(prompt)) + 2 for prompt in prompts]


class LinearStack(nn.Module):
    """(N, width) -> (N,) through five linear layers and nothing between them: the head of LAION's aesthetic predictor and of
    ImageReward. The gaps in its names are their dropouts.
    """

    def __init__(self, width: int):
        super().__init__()
        sizes = (width, 1024, 128, 64, 16, 1)
        self.layers = nn.ModuleDict({name: nn.Linear(sizes[i], sizes[i + 1]) for i, name in enumerate("02467")})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x[:, 0]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, (N, D) and (N, D) -> (N,), fp32."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1)
