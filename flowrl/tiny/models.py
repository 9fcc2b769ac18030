"""The architecture of the embedded model: the classes of Stable Diffusion 3 at the size of a thumbnail."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from .scenes import SIZE, all_specs

#: Arguments that the pipeline needs for this model; they travel with it in flowrl.json. A T5 encoder is absent, so that
#: `max_sequence_length` only counts zero tokens: one is trained and sampled with.
CALL = {"num_inference_steps": 20, "guidance_scale": 1.0, "height": SIZE, "width": SIZE, "max_sequence_length": 1}
MAX_TOKENS = 16  #: The longest caption has 9 words, a start and an end.
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


def make_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE in which every word of the grammar is one token; any other text falls back to bytes.

    Words are added one by one: what the merges so far leave of a word is joined from left to right by new merges, which
    rank below all earlier ones and hence cannot change the words before.
    """
    words = sorted({w for spec in all_specs() for w in re.findall(r"[a-z]+", spec["prompt"])} | set(EXTRA_WORDS))
    merges: list[tuple[str, str]] = []
    for word in words:
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
