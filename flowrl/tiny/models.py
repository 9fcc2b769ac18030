"""The embedded text-to-image model: the classes of Stable Diffusion 3 at the size of a thumbnail.

`video` is its sibling for clips: the names that the build (`stages`, `evaluate`) asks for are the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from .render import render_batch
from .scenes import KINDS, SIZE, Spec, all_specs, random_spec, sample_scene, split
from .verify import verify

__all__ = ["KINDS", "split", "verify"]

NAME = "tiny-sd3"
PIPELINE = StableDiffusion3Pipeline
TAG = "text-to-image"

#: Arguments that the pipeline needs for this model; they travel with it in flowrl.json. A T5 encoder is absent, so that
#: `max_sequence_length` only counts zero tokens: one is trained and sampled with.
CALL = {"num_inference_steps": 20, "guidance_scale": 1.0, "height": SIZE, "width": SIZE, "max_sequence_length": 1}
MAX_TOKENS = 16  #: The longest caption has 9 words, a start and an end.
#: The kinds in the training mix: what is hard is shown more often.
KIND_WEIGHTS = {
    "single_object": 0.5,
    "two_object": 1.0,
    "counting": 1.2,
    "colors": 0.7,
    "position": 1.4,
    "color_attr": 1.3,
}
EXTRA_WORDS = ("one", "five", "and", "next", "to", "the", "on", "big", "small", "orange", "white", "diamond", "heart")


@dataclass(frozen=True)
class Architecture:
    """Widths and depths. The defaults are the shipped model; tests build smaller ones."""

    vae_channels: tuple[int, ...] = (16, 32, 64, 64)
    latent_channels: int = 4
    layers: int = 6
    heads: int = 4
    head_dim: int = 32
    text_widths: tuple[int, int] = (64, 96)
    text_layers: int = 3
    shift: float = 3.0


def _byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE uses: visible latin-1 is itself, the rest U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(b if b in visible else next(spare)) for b in range(256)]


def make_tokenizer(words: Iterable[str] | None = None) -> CLIPTokenizer:
    """Byte-level BPE in which every word (unless given, those of the grammar) is one token; other text falls back to bytes.

    Words are added one by one: what the merges so far leave of a word is joined from left to right by new merges, which
    rank below all earlier ones and hence cannot change the words before.
    """
    if words is None:
        words = {w for spec in all_specs() for w in re.findall(r"[a-z]+", spec["prompt"])} | set(EXTRA_WORDS)
    merges: list[tuple[str, str]] = []
    for word in sorted(words):
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            pieces = _merge(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merge(pieces, merges[-1])
    letters = _byte_letters()
    tokens = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def make_vae(arch: Architecture) -> AutoencoderKL:
    """Pixels (B, 3, 64, 64) in [-1, 1] to latents (B, C, 8, 8) and back."""
    n = len(arch.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=arch.vae_channels,
        layers_per_block=1,
        latent_channels=arch.latent_channels,
        norm_num_groups=8,
        sample_size=SIZE,
        shift_factor=0.0,
        scaling_factor=1.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _text_encoder(width: int, layers: int, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        # The pooled output is read where the ids equal eos_token_id; CLIP's own id is not in our vocabulary.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def make_pipeline(arch: Architecture, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """A complete pipeline with untrained transformer and text encoders."""
    tokenizer = make_tokenizer()
    width = sum(arch.text_widths)
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 8,
        patch_size=1,
        in_channels=arch.latent_channels,
        out_channels=arch.latent_channels,
        num_layers=arch.layers,
        attention_head_dim=arch.head_dim,
        num_attention_heads=arch.heads,
        joint_attention_dim=width,
        caption_projection_dim=arch.heads * arch.head_dim,
        pooled_projection_dim=width,
        pos_embed_max_size=SIZE // 8,
        qk_norm="rms_norm",
    )
    encoders = [_text_encoder(w, arch.text_layers, tokenizer) for w in arch.text_widths]
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=arch.shift),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=make_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def draw(rng: np.random.Generator, count: int, split: str = "train", weights: Any = None) -> tuple[np.ndarray, list[Spec]]:
    """Pictures (count, 3, 64, 64) in [0, 1] of random captions, and their specs."""
    specs = [random_spec(rng, split, weights) for _ in range(count)]
    return render_batch([sample_scene(spec, rng) for spec in specs], rng), specs


def from_vae(decoded: Tensor) -> Tensor:
    """What the VAE decodes is (N, 3, H, W) as it is."""
    return decoded


def whitening(z: Tensor) -> dict[str, Any]:
    """The VAE's configuration with which latents z (N, C, h, w) get mean 0 and standard deviation 1 in the pipeline."""
    return {"shift_factor": z.mean().item(), "scaling_factor": 1 / z.std().item()}


def whiten(vae: AutoencoderKL, z: Tensor) -> Tensor:
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


def trained(pipe: StableDiffusion3Pipeline) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    )


def velocity(pipe: StableDiffusion3Pipeline, x: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
    """v (B, C, h, w), of whitened latents x at times t (B,) in [0, 1], with gradients to all that `trained` names."""
    context, pooled = encode(pipe, prompts)
    return pipe.transformer(x, context, pooled, 1000 * t, return_dict=False)[0]


def pixels(output: Any) -> Tensor:
    """(N, 3, H, W) in [0, 1] from what a pipeline returns."""
    return output.images.float().cpu()


def encode(pipe: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """The pipeline's own conditioning, with gradients: context (B, L, D) and pooled (B, D)."""
    unique = list(dict.fromkeys(prompts))
    context, _, pooled, _ = pipe.encode_prompt(
        prompt=unique,
        prompt_2=unique,
        prompt_3=unique,
        device=pipe.transformer.device,
        do_classifier_free_guidance=False,
        max_sequence_length=CALL["max_sequence_length"],
    )
    place = {prompt: i for i, prompt in enumerate(unique)}
    rows = torch.tensor([place[p] for p in prompts], device=pooled.device)
    return context[rows], pooled[rows]


def load(folder: str | Path) -> StableDiffusion3Pipeline:
    """Load a model of ours. diffusers wants to be told that the T5 encoder is left out, even of a saved pipeline."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


#: What the card says of the model, of how to draw with it, and of what it has seen.
ABOUT = f"""\
# tiny-sd3: the embedded text-to-image model of flowrl

A complete `StableDiffusion3Pipeline` (SD3 transformer, 8x AutoencoderKL, two CLIP text encoders, no T5) that
draws 64x64 scenes of coloured shapes. It is trained from nothing by `python -m flowrl.tiny.build`, and it is
good but not perfect on purpose: reinforcement learning has something left to teach it.

```python
from diffusers import StableDiffusion3Pipeline
from flowrl.tiny import model_path

pipe = StableDiffusion3Pipeline.from_pretrained(model_path(), text_encoder_3=None, tokenizer_3=None)
image = pipe("a red circle and a blue square", {", ".join(f"{k}={v}" for k, v in CALL.items())}).images[0]
```

`flowrl.json` holds these call arguments. `max_sequence_length` is the number of zero vectors that stand in
for the missing T5 encoder; the model was trained with 1, and more of them spoil the pictures.

## Data

Scenes drawn by `flowrl.tiny.render` for the {len(split("train"))} captions of `split('train')`: a pool of
%POOL% pictures. None of the {len(split("test"))} captions of `split('test')` (20 per kind) was
seen; except for single objects, where only the wording is new, they are new combinations. Shapes: circle,
square, triangle, star, cross, ring; colours: red, green, blue, yellow, purple, black. Any word outside the
grammar is split into bytes, of which the model knows nothing."""
