"""ImageReward (arXiv 2304.05977): a BLIP whose text tower reads the picture by cross-attention, and a linear head. About N(0, 1).

The published file has the names of the BLIP repository; here they are given to transformers' own BLIP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as T

from flowrl.batch import Samples
from flowrl.reward_models.backbones import Frames, LinearStack, check_frames, score_pictures
from flowrl.reward_models.base import Traits
from flowrl.reward_models.preference import Preset
from flowrl.reward_models.texts import PromptLimit
from flowrl.reward_models.weights import fill, find_file, located, read, unreachable

PRESET = Preset(
    "THUDM/ImageReward",
    "ImageReward.pt",
    processor="google-bert/bert-base-uncased",
    licence="see model card (code: Apache-2.0)",
)
CONTEXT = 35  #: Tokens that it was trained on.
CENTRE, SPREAD = 0.16717362830052426, 1.0333394966054072  #: Of its raw scores on the authors' pictures.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64  #: Of every attention head in ViT-B, ViT-L and BERT; a checkpoint does not say.
_VISION = (  # names of transformers' BLIP, and of the published file
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("encoder.layers.", "blocks."),
    ("post_layernorm.", "norm."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
)


class BlipScorer(nn.Module):
    """The network. pixels (N, 3, h, w), normalised, and tokens (N, 35) -> raw scores (N,)."""

    def __init__(self, vision: Any, text: Any):
        super().__init__()
        from transformers import BlipTextModel, BlipVisionModel

        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.mlp = LinearStack(text.hidden_size)

    @classmethod
    def load(cls, path: Path) -> BlipScorer:
        """From the published layout; all sizes are those of its tensors. Raises ValueError naming what is missing."""
        state = read(path)
        try:
            network = cls(*_configs(state))
        except KeyError as error:
            raise ValueError(f"{path} is no ImageReward checkpoint: it lacks {error.args[0]}") from None
        fill(network, state, path, _published)
        return network.requires_grad_(False).eval()

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen)
        return self.mlp(read.last_hidden_state[:, 0].float())


class ImageReward:
    """(score - 0.167) / 1.033 of the published network. Usually -2.3 to 2.1.

    It reads 35 tokens of a prompt.
    """

    def __init__(
        self,
        model: str | Path = PRESET.model,  #: The checkpoint file, a folder that holds it, or its hub id.
        #: Folder or hub id of the tokenizer; unset: the model's folder where it has one, else BERT's.
        tokenizer: str | Path | None = None,
        frames: Frames = "mean",  #: How a clip's frames count: mean, min (the worst one), or softmin (mostly the worst ones).
    ):
        from transformers import AutoTokenizer

        self.name, self.frames = "image_reward", check_frames(frames)
        self.traits = Traits(differentiable=True, licence=PRESET.licence_of(model))
        self.network = BlipScorer.load(find_file(model, PRESET.file))
        place = tokenizer or PRESET.processor_of(model)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(located(place))
        except (OSError, ValueError) as error:
            raise ValueError(f"no tokenizer: {unreachable(place, error)}") from None
        self.limit = PromptLimit(CONTEXT, self.lengths)

    def __call__(self, samples: Samples) -> Tensor:
        return score_pictures(self.values, samples, self.frames)

    def values(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(M, 3, H, W) in [0, 1] and M prompts -> (M,), with graph."""
        self.limit(self.name, prompts)
        batch = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
        ids, mask = batch["input_ids"].to(images.device), batch["attention_mask"].to(images.device)
        return (self.network.to(images.device)(self.pixels(images), ids, mask) - CENTRE) / SPREAD

    def pixels(self, images: Tensor) -> Tensor:
        """As torchvision does for its authors: the short side resized, the centre cropped, with graph."""
        size = self.network.vision.config.image_size
        x = T.resize(images.float(), [size], interpolation=InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        return T.normalize(T.center_crop(x, [size]), list(MEAN), list(STD))

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]]

    @property
    def truncated(self) -> float:
        """Share of the distinct prompts so far that the tokenizer cut, in [0, 1]."""
        return self.limit.share


def _published(name: str) -> str:
    """What the published file calls a weight of `BlipScorer`."""
    side, _, inner = name.partition(".")
    if side == "vision":
        for ours, theirs in _VISION:
            inner = inner.replace(ours, theirs)
    return {"vision": "blip.visual_encoder.", "text": "blip.text_encoder.", "mlp": "mlp."}[side] + inner


def _configs(state: Mapping[str, Tensor]) -> tuple[Any, Any]:
    from transformers import BlipTextConfig, BlipVisionConfig

    def count(prefix: str) -> int:
        return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})

    positions, patches = state["blip.visual_encoder.pos_embed"], state["blip.visual_encoder.patch_embed.proj.weight"]
    width, patch = positions.shape[-1], patches.shape[-1]
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["blip.visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=count("blip.visual_encoder.blocks."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=round((positions.shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    vocabulary, size = state["blip.text_encoder.embeddings.word_embeddings.weight"].shape
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=size,
        encoder_hidden_size=width,
        intermediate_size=state["blip.text_encoder.encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=count("blip.text_encoder.encoder.layer."),
        num_attention_heads=size // HEAD_WIDTH,
        max_position_embeddings=state["blip.text_encoder.embeddings.position_embeddings.weight"].shape[0],
        is_decoder=True,  # which only means here that its layers attend to the picture
    )
    return vision, text
