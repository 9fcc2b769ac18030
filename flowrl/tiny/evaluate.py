"""Score a pipeline on the embedded world: strict accuracy per kind, the VAE's ceiling, and the model card."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .models import CALL
from .render import render_batch
from .scenes import KINDS, Spec, random_spec, sample_scene, split
from .verify import verify

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline

    from .stages import Settings


@torch.no_grad()
def sample(pipe: StableDiffusion3Pipeline, prompts: Sequence[str], seeds: Sequence[int], **call: Any) -> Tensor:
    """One picture per (prompt, seed): (N, 3, 64, 64) in [0, 1]. A picture does not depend on its batch mates' seeds."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    options = {**CALL, **call}
    return pipe(list(prompts), generator=generators, output_type="pt", **options).images.float().cpu()


def scores(
    pipe: StableDiffusion3Pipeline, specs: Sequence[Spec], seeds: int = 1, batch: int = 60, **call: Any
) -> dict[str, float]:
    """Mean strict accuracy of each kind, `overall` (mean over pictures) and `dense`.

    Picture j of prompt i has seed i * seeds + j: were the seeds the same for all prompts, so would be their luck.
    """
    jobs = [(spec, i * seeds + j) for i, spec in enumerate(specs) for j in range(seeds)]
    strict, dense = [], []
    for i in range(0, len(jobs), batch):
        part = jobs[i : i + batch]
        images = sample(pipe, [s["prompt"] for s, _ in part], [seed for _, seed in part], **call)
        a, b = verify(images, [s for s, _ in part])
        strict.append(a)
        dense.append(b)
    right, partial = torch.cat(strict), torch.cat(dense)
    kinds = np.array([spec["kind"] for spec, _ in jobs])
    result = {kind: right[torch.from_numpy(kinds == kind)].mean().item() for kind in KINDS if (kinds == kind).any()}
    return {**result, "overall": right.mean().item(), "dense": partial.mean().item()}


def one_line(result: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in result.items())


@torch.no_grad()
def ceiling(vae: AutoencoderKL, count: int = 1200, seed: int = 1) -> float:
    """Strict accuracy of reconstructed truth: what no generator behind this VAE should be expected to exceed."""
    rng = np.random.default_rng(seed)
    right = []
    for _ in range(0, count, 100):
        specs = [random_spec(rng, "test") for _ in range(100)]
        images = torch.from_numpy(render_batch([sample_scene(s, rng) for s in specs], rng)).to(vae.device)
        out = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        right.append(verify(out.clamp(0, 1), specs)[0])
    return torch.cat(right).mean().item()


def report(pipe: StableDiffusion3Pipeline, seeds: int) -> dict[str, Any]:
    """The numbers of the card."""
    start = time.time()
    test, train = split("test"), split("train")
    result = {
        "seeds_per_prompt": seeds,
        "vae_ceiling": ceiling(pipe.vae),
        "test": scores(pipe, test, seeds),
        "test, guidance 3.0": scores(pipe, test, seeds, guidance_scale=3.0),
        "test, 10 steps": scores(pipe, test, seeds, num_inference_steps=10),
        "train": scores(pipe, train, 1),
    }
    return {**result, "seconds": time.time() - start}


def card(settings: Settings, info: dict[str, Any]) -> str:
    """The text of the model's README.md."""
    minutes = info["seconds"] / 60
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "---",
        "",
        "# tiny-sd3: the embedded text-to-image model of flowrl",
        "",
        "A complete `StableDiffusion3Pipeline` (SD3 transformer, 8x AutoencoderKL, two CLIP text encoders, no T5) that",
        "draws 64x64 scenes of coloured shapes. It is trained from nothing by `python -m flowrl.tiny.build`, and it is",
        "good but not perfect on purpose: reinforcement learning has something left to teach it.",
        "",
        "```python",
        "from diffusers import StableDiffusion3Pipeline",
        "from flowrl.tiny import model_path",
        "",
        "pipe = StableDiffusion3Pipeline.from_pretrained(model_path(), text_encoder_3=None, tokenizer_3=None)",
        f'image = pipe("a red circle and a blue square", {", ".join(f"{k}={v}" for k, v in CALL.items())}).images[0]',
        "```",
        "",
        "`flowrl.json` holds these call arguments. `max_sequence_length` is the number of zero vectors that stand in",
        "for the missing T5 encoder; the model was trained with 1, and more of them spoil the pictures.",
        "",
        "## Data",
        "",
        f"Scenes drawn by `flowrl.tiny.render` for the {len(split('train'))} captions of `split('train')`: a pool of",
        f"{settings.pool:,} pictures. None of the {len(split('test'))} captions of `split('test')` (20 per kind) was",
        "seen; except for single objects, where only the wording is new, they are new combinations. Shapes: circle,",
        "square, triangle, star, cross, ring; colours: red, green, blue, yellow, purple, black. Any word outside the",
        "grammar is split into bytes, of which the model knows nothing.",
        "",
        "## Training",
        "",
        f"VAE: {settings.vae_steps:,} steps of {settings.vae_batch} pictures. Transformer and text encoders:",
        f"{info['step']:,} steps of {settings.batch}, Muon and AdamW at {settings.lr:g}, linear decay from",
        f"{100 * settings.decay_from:.0f} % of the steps on, EMA {settings.ema:g}, caption dropout",
        f"{100 * settings.caption_dropout:.0f} %, seed {settings.seed}. Transformer: {minutes:.0f} minutes on"
        f" {settings.torch_device().type}",
        f"(a machine of {os.cpu_count()} cores, shared with other work)"
        + (f"; VAE: {info['vae_seconds'] / 60:.0f} minutes." if "vae_seconds" in info else "."),
        "",
        "## Scores",
        "",
    ]
    if "report" not in info:
        return "\n".join([*lines, "This is a preliminary export; training goes on.", ""])
    r = info["report"]
    columns = [name for name, value in r.items() if isinstance(value, dict)]
    lines += [
        "Strict accuracy in percent, read by `flowrl.tiny.verify`; EMA weights, 20 ODE steps and guidance 1.0 unless",
        "the column says otherwise. Picture j of the n pictures of prompt i has seed n i + j; n is"
        f" {r['seeds_per_prompt']} for test, 1 for train.",
        "",
        "| kind | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for kind in (*KINDS, "overall", "dense"):
        lines.append(f"| {kind} | " + " | ".join(f"{100 * r[c][kind]:.1f}" for c in columns) + " |")
    lines += [
        "",
        f"`dense` is the mean partial credit. Reconstructions of true scenes by the VAE reach {100 * r['vae_ceiling']:.1f} %.",
        "",
    ]
    return "\n".join(lines)
