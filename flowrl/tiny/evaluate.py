"""Score a pipeline on the embedded world: strict accuracy per kind, the VAE's ceiling, and the model card."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import models, video
from .scenes import Spec

if TYPE_CHECKING:
    from .stages import Settings


def world_of(pipe: Any) -> ModuleType:
    """`models` for pictures, `video` for clips."""
    return video if isinstance(pipe, video.PIPELINE) else models


@torch.no_grad()
def sample(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **call: Any) -> Tensor:
    """One picture (N, 3, 64, 64) or clip (N, 9, 3, 48, 48) per (prompt, seed), in [0, 1]; none depends on the others' seeds."""
    world = world_of(pipe)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    return world.pixels(pipe(list(prompts), generator=generators, output_type="pt", **{**world.CALL, **call}))


def scores(pipe: Any, specs: Sequence[Spec], seeds: int = 1, batch: int = 60, **call: Any) -> dict[str, float]:
    """Mean strict accuracy of each kind, `overall` (mean over samples) and `dense`.

    Sample j of prompt i has seed i * seeds + j: were the seeds the same for all prompts, so would be their luck.
    """
    world = world_of(pipe)
    jobs = [(spec, i * seeds + j) for i, spec in enumerate(specs) for j in range(seeds)]
    strict, dense = [], []
    for i in range(0, len(jobs), batch):
        part = jobs[i : i + batch]
        shown = sample(pipe, [s["prompt"] for s, _ in part], [seed for _, seed in part], **call)
        a, b = world.verify(shown, [s for s, _ in part])
        strict.append(a)
        dense.append(b)
    right, partial = torch.cat(strict), torch.cat(dense)
    kinds = np.array([spec["kind"] for spec, _ in jobs])
    result = {kind: right[torch.from_numpy(kinds == kind)].mean().item() for kind in world.KINDS if (kinds == kind).any()}
    return {**result, "overall": right.mean().item(), "dense": partial.mean().item()}


def one_line(result: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in result.items())


@torch.no_grad()
def ceiling(pipe: Any, count: int = 1200, seed: int = 1) -> float:
    """Strict accuracy of reconstructed truth: what no generator behind this VAE should be expected to exceed."""
    world, rng, right = world_of(pipe), np.random.default_rng(seed), []
    for _ in range(0, count, 100):
        drawn, specs = world.draw(rng, 100, "test")
        shown = torch.from_numpy(drawn).to(pipe.vae.device)
        out = pipe.vae.decode(pipe.vae.encode(shown * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        right.append(world.verify(world.from_vae(out).clamp(0, 1), specs)[0])
    return torch.cat(right).mean().item()


def report(pipe: Any, seeds: int) -> dict[str, Any]:
    """The numbers of the card."""
    start, world = time.time(), world_of(pipe)
    test, train = world.split("test"), world.split("train")
    result = {
        "seeds_per_prompt": seeds,
        "vae_ceiling": ceiling(pipe),
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
        f"pipeline_tag: {settings.of.TAG}",
        "---",
        "",
        *settings.of.ABOUT.replace("%POOL%", f"{settings.pool:,}").splitlines(),
        "",
        "## Training",
        "",
        f"VAE: {settings.vae_steps:,} steps of {settings.vae_batch}. Transformer and text encoders:",
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
        "Strict accuracy in percent, read back exactly; EMA weights, 20 ODE steps and guidance 1.0 unless",
        "the column says otherwise. Sample j of the n samples of prompt i has seed n i + j; n is"
        f" {r['seeds_per_prompt']} for test, 1 for train.",
        "",
        "| kind | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for kind in (*settings.of.KINDS, "overall", "dense"):
        lines.append(f"| {kind} | " + " | ".join(f"{100 * r[c][kind]:.1f}" for c in columns) + " |")
    lines += [
        "",
        "`dense` is the mean partial credit. Of what the VAE makes of the truth, the same verifier accepts"
        f" {100 * r['vae_ceiling']:.1f} %.",
        "",
    ]
    return "\n".join(lines)
