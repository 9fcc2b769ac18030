"""The embedded text-to-video model: the classes of Wan 2.1 at the size of a thumbnail. The sibling of `models`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .follow import follow as verify
from .moves import FRAMES, KINDS, SIDE, Spec, all_specs, random_spec, render_clip, sample_clip, split

__all__ = ["KINDS", "split", "verify"]

NAME = "tiny-wan"
TAG = "text-to-video"
PIPELINE = WanPipeline
MAX_TOKENS = 16  #: The longest caption has 10 words and an end; the rest are zeros, as in Wan.
#: Arguments that the pipeline needs for this model; they travel with it in flowrl.json.
CALL = {
    "num_inference_steps": 20,
    "guidance_scale": 1.0,
    "height": SIDE,
    "width": SIDE,
    "num_frames": FRAMES,
    "max_sequence_length": MAX_TOKENS,
}
FPS = 8  #: Frames per second of its clips; they travel with it too.
#: The kinds in the training mix: what is hard is shown more often.
KIND_WEIGHTS = {"still": 0.6, "direction": 0.8, "color": 1.0, "speed": 1.0, "size": 1.0, "two": 1.6}
GROUND = 0.85  #: The usual ground, in [-1, 1]: what an untrained VAE draws. Steps of 1e-3 would take long to get there.
EXTRA_WORDS = ("clip", "of", "fast", "slow", "big", "small", "orange", "white", "turning", "jumping", "diagonally")


@dataclass(frozen=True)
class Architecture:
    """Widths and depths. The defaults are the shipped model; tests build smaller ones."""

    vae_width: int = 24  #: Channels at half the size; times `vae_widening` at each of three sizes.
    vae_widening: tuple[int, ...] = (1, 2, 2)
    latent_channels: int = 12
    layers: int = 6
    heads: int = 4
    head_dim: int = 32
    text_width: int = 96
    text_layers: int = 3
    shift: float = 3.0


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the grammar; all other words are one, <unk>."""
    words = sorted({w for spec in all_specs() for w in re.findall(r"[a-z]+", spec["prompt"])} | set(EXTRA_WORDS))
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    reader = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    reader.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    reader.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=reader, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_TOKENS
    )


def make_vae(arch: Architecture) -> AutoencoderKLWan:
    """Pixels (B, 3, 9, 48, 48) in [-1, 1] to latents (B, 12, 3, 6, 6) and back.

    In the form of Wan 2.2, patches of 2 x 2 and shortcuts around each change of size. That of Wan 2.1, which has neither, learns
    more slowly: mean error of updates 50 to 100, four clips each, 0.60 (width 32) against 1.02 (width 16), 0.6 and 0.8 s each.
    """
    vae = AutoencoderKLWan(
        base_dim=arch.vae_width,
        dim_mult=list(arch.vae_widening),
        z_dim=arch.latent_channels,
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * arch.latent_channels,
        latents_std=[1.0] * arch.latent_channels,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
    )
    nn.init.constant_(vae.decoder.conv_out.bias, GROUND)
    return vae


def make_pipeline(arch: Architecture, vae: AutoencoderKLWan) -> WanPipeline:
    """A complete pipeline with untrained transformer and text encoder."""
    tokenizer = make_tokenizer()
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        in_channels=arch.latent_channels,
        out_channels=arch.latent_channels,
        num_layers=arch.layers,
        num_attention_heads=arch.heads,
        attention_head_dim=arch.head_dim,
        ffn_dim=4 * arch.heads * arch.head_dim,
        text_dim=arch.text_width,
        freq_dim=arch.heads * arch.head_dim,
        rope_max_seq_len=32,
    )
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=arch.text_width,
            d_kv=24,
            d_ff=2 * arch.text_width,
            num_layers=arch.text_layers,
            num_heads=arch.text_width // 24,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=arch.shift)
    return WanPipeline(tokenizer=tokenizer, text_encoder=encoder, transformer=transformer, vae=vae, scheduler=scheduler)


def draw(rng: np.random.Generator, count: int, split: str = "train", weights: Any = None) -> tuple[np.ndarray, list[Spec]]:
    """Clips (count, 3, 9, 48, 48) in [0, 1], as the VAE takes them, of random captions, and their specs."""
    specs = [random_spec(rng, split, weights) for _ in range(count)]
    return np.stack([render_clip(sample_clip(spec, rng), rng) for spec in specs]).swapaxes(1, 2), specs


def stills(rng: np.random.Generator, count: int) -> np.ndarray:
    """Frames (count, 3, 1, 48, 48) in [0, 1], each of another clip."""
    clips, _ = draw(rng, count, "train", KIND_WEIGHTS)
    return clips[np.arange(count), :, rng.integers(0, FRAMES, count), None]


def from_vae(decoded: Tensor) -> Tensor:
    """(N, 9, 3, 48, 48), frames first, of what the VAE decodes, (N, 3, 9, 48, 48)."""
    return decoded.transpose(1, 2)


def whitening(z: Tensor) -> dict[str, Any]:
    """The VAE's configuration with which latents z (N, C, f, h, w) get mean 0 and standard deviation 1 in each channel."""
    channels = z.transpose(0, 1).flatten(1)
    return {"latents_mean": channels.mean(1).tolist(), "latents_std": channels.std(1).tolist()}


def whiten(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    return (z - mean) / std


def trained(pipe: WanPipeline) -> nn.ModuleDict:
    return nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})


def encode(pipe: WanPipeline, prompts: list[str]) -> Tensor:
    """The pipeline's own conditioning (B, L, D), with gradients."""
    unique = list(dict.fromkeys(prompts))
    context, _ = pipe.encode_prompt(
        unique, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS, device=pipe.transformer.device
    )
    place = {prompt: i for i, prompt in enumerate(unique)}
    return context[torch.tensor([place[p] for p in prompts], device=context.device)]


def velocity(pipe: WanPipeline, x: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
    """v (B, C, f, h, w), of whitened latents x at times t (B,) in [0, 1], with gradients to all that `trained` names."""
    return pipe.transformer(x, 1000 * t, encode(pipe, prompts), return_dict=False)[0]


def pixels(output: Any) -> Tensor:
    """(N, F, 3, H, W) in [0, 1] from what a pipeline returns."""
    return torch.as_tensor(output.frames).float().cpu()


def load(folder: str | Path) -> WanPipeline:
    pipe = WanPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


#: What the card says of the model, of how to draw with it, and of what it has seen.
ABOUT = f"""\
# tiny-wan: the embedded text-to-video model of flowrl

A complete `WanPipeline` (Wan transformer, the causal video autoencoder of Wan that compresses 8x in space and 4x in
time, a small UMT5 encoder) that draws clips of {FRAMES} frames of {SIDE}x{SIDE} pixels, in which coloured shapes move, stand
still, grow or shrink. It is trained from nothing by `python -m flowrl.tiny.build --video`, and it is good but not
perfect on purpose: reinforcement learning has something left to teach it.

```python
from diffusers import WanPipeline
from flowrl.tiny import model_path

pipe = WanPipeline.from_pretrained(model_path("tiny-wan"))
frames = pipe("a red circle moving left", {", ".join(f"{k}={v}" for k, v in CALL.items())}).frames[0]
```

`flowrl.json` holds these call arguments, and the rate of its clips: {FPS} frames a second.

## Data

Clips drawn by `flowrl.tiny.moves` for the {len(split("train"))} captions of `split("train")` there: a pool of
%POOL% clips. None of the {len(split("test"))} captions of `split("test")` (16 per kind) was seen: they are new
combinations of shape, colour, direction, speed and change of size. Any word outside the grammar is one and the same
token to the model."""
