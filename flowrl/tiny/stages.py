"""The three stages of the build: the VAE, the latents of a pool of scenes, the text encoders with the transformer.

Every batch is drawn from a generator seeded by (seed, step), so that a resumed run sees the data that an unbroken one
would have seen.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from flowrl.attention import EAGER, set_backend

from . import evaluate, models, video

#: Whose names the stages ask for.
WORLDS = {"pictures": models, "video": video}


@dataclass(frozen=True)
class Settings:
    """What a build needs to know."""

    out: Path
    work: Path
    world: str = "pictures"  #: Or video.
    steps: int = 3800
    vae_steps: int = 1500
    vae_batch: int = 32
    pool: int = 60_000
    batch: int = 128
    lr: float = 1.5e-3
    vae_lr: float = 2e-3
    #: In how many of its first updates the VAE sees frames, each of another clip, as many as in a batch of clips.
    vae_stills: int = 0
    vae_emphasis: float = 0.0  #: By how much a pixel counts more that is as far from the mean colour as white from mid-grey.
    decay_from: float = 0.5  #: Share of the steps after which the learning rate falls, linearly to zero.
    ema: float = 0.999
    caption_dropout: float = 0.1
    seed: int = 0
    device: str = "auto"
    bf16: bool = True
    compile: bool = False  #: The transformer, by torch.compile: a quarter less time on a CPU; wants a C++ compiler.
    until: str = "transformer"
    checkpoint_every: float = 90.0  #: Seconds.
    export_every: float = 900.0  #: Seconds; 0 exports only at the end.
    evaluate_every: int = 1000  #: Steps.
    test_seeds: int = 4  #: Pictures per test prompt in the final evaluation.
    arch: Any = None  #: An `Architecture` of the world; its defaults where there is none.

    @property
    def of(self) -> ModuleType:
        """The world's own half of the build: data, networks, verifier."""
        return WORLDS[self.world]

    def architecture(self) -> Any:
        return self.arch or self.of.Architecture()

    def torch_device(self) -> torch.device:
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


Pool = tuple[Tensor, Tensor, list[str]]  # latents (pool, C, ...), rows of captions (pool,), captions
Export = Callable[[Settings, Any, dict[str, Any]], None]  # of a pipeline, and what is known of its training


def _save(state: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    os.replace(part, path)


def _load(path: Path, device: torch.device) -> dict[str, Any] | None:
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


def _progress(total: int, done: int, name: str) -> tqdm:
    quiet = not sys.stderr.isatty()  # in a log file, a line every half minute
    return tqdm(total=total, initial=done, desc=name, mininterval=30 if quiet else 0.3, dynamic_ncols=not quiet)


def _rng(settings: Settings, *key: int) -> np.random.Generator:
    return np.random.default_rng([settings.seed, *key])


def _data(settings: Settings, count: int, *key: int) -> tuple[np.ndarray, list[str]]:
    """What the world shows for random training captions, (count, ...) in [0, 1], and the captions."""
    shown, specs = settings.of.draw(_rng(settings, *key), count, "train", settings.of.KIND_WEIGHTS)
    return shown, [spec["prompt"] for spec in specs]


def _vae_batch(settings: Settings, step: int) -> np.ndarray:
    """Pictures or clips in [0, 1], or single frames at first: many more scenes for the same work."""
    if step < settings.vae_stills:
        return settings.of.stills(_rng(settings, 1, step), settings.vae_batch * settings.of.FRAMES)
    return _data(settings, settings.vae_batch, 1, step)[0]


def train_vae(settings: Settings) -> Any:
    """Stage 1: reconstruct; the decoder sees slightly noisy latents, as it will from a generator."""
    device = settings.torch_device()
    torch.manual_seed(settings.seed)
    vae = settings.of.make_vae(settings.architecture()).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), settings.vae_lr, betas=(0.9, 0.99), weight_decay=1e-4)
    path = settings.work / "vae.pt"
    state = _load(path, device) or {"step": 0, "seconds": 0.0}
    if state["step"]:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    start, saved = time.time() - state["seconds"], time.time()
    bar = _progress(settings.vae_steps, state["step"], "VAE")
    for step in range(state["step"], settings.vae_steps):
        _set_lr(optimizer, settings.vae_lr * _schedule(step, settings.vae_steps, settings.decay_from, 30))
        images = torch.from_numpy(_vae_batch(settings, step)).to(device) * 2 - 1
        torch.manual_seed(settings.seed * 1_000_003 + step)
        with _autocast(settings, device):
            posterior = vae.encode(images).latent_dist
            z = posterior.sample()
            out = vae.decode(z + 0.05 * torch.randn_like(z)).sample.float()
        off = (out - images).abs()
        ground = images.flatten(2).mean(2).reshape(*images.shape[:2], *[1] * (images.ndim - 2))
        weight = 1 + settings.vae_emphasis * (images - ground).abs().mean(1, keepdim=True)
        error = ((off + off.square()) * weight).mean()
        loss = error + 1e-4 * posterior.kl().mean() / z[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {error.item():.4f}", refresh=False)
        bar.update()
        last = step + 1 == settings.vae_steps
        if last or time.time() - saved > settings.checkpoint_every:
            saved = time.time()
            seconds = saved - start
            _save(
                {
                    "step": step + 1,
                    "seconds": seconds,
                    "model": vae.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
                path,
            )
    bar.close()
    return vae.eval().requires_grad_(False)


def _schedule(step: int, steps: int, decay_from: float, warmup: int) -> float:
    """Warm up, hold, fall linearly to (almost) zero."""
    falling = (steps - step) / max(1.0, steps * (1 - decay_from))
    return min(1.0, (step + 1) / warmup, max(falling, 0.0))


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _autocast(settings: Settings, device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if settings.bf16 else contextlib.nullcontext()


@torch.no_grad()
def encode_pool(settings: Settings, vae: Any) -> Pool:
    """Stage 2: latents (pool, C, ...) fp16, whitened; rows of captions (pool,); the captions.

    Sets the VAE's configuration so that the latents have mean 0 and standard deviation 1.
    """
    device, path = settings.torch_device(), settings.work / "latents.pt"
    state = _load(path, torch.device("cpu"))
    if state is None:
        latents, texts = [], []
        chunk = min(256, settings.pool)
        bar = _progress(settings.pool, 0, "latents")
        for i in range(settings.pool // chunk):
            images, captions = _data(settings, chunk, 2, i)
            z = vae.encode(torch.from_numpy(images).to(device) * 2 - 1).latent_dist.mean
            latents.append(z.float().cpu())
            texts += captions
            bar.update(chunk)
        bar.close()
        z = torch.cat(latents)
        config = settings.of.whitening(z)
        vae.register_to_config(**config)
        captions = sorted(set(texts))
        place = {caption: i for i, caption in enumerate(captions)}
        rows = torch.tensor([place[t] for t in texts])
        state = {"z": settings.of.whiten(vae, z).half(), "rows": rows, "captions": captions, "config": config}
        _save(state, path)
    vae.register_to_config(**state["config"])
    return state["z"], state["rows"], state["captions"]


def _batches(settings: Settings, pool: Pool, first: int) -> Iterator[tuple]:
    """x0 (B, C, ...), captions, t (B,) in (0, 1), noise; from step `first` on, for ever."""
    z, rows, captions = pool
    step = first
    while True:
        g = torch.Generator().manual_seed(settings.seed * 1_000_003 + 7 * step + 11)
        pick = torch.randint(len(z), (settings.batch,), generator=g)
        drop = torch.rand(settings.batch, generator=g) < settings.caption_dropout
        texts = ["" if d else captions[r] for r, d in zip(rows[pick].tolist(), drop.tolist(), strict=True)]
        u = torch.sigmoid(torch.randn(settings.batch, generator=g))  # logit-normal, then shifted to noise
        t = 2 * u / (1 + u)
        yield z[pick].float(), texts, t, torch.randn(settings.batch, *z.shape[1:], generator=g)
        step += 1


def _optimizers(trained: nn.ModuleDict, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, heads and vectors."""
    blocks: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, weight in trained.named_parameters():
        if weight.ndim == 2 and ("blocks." in name or "layer" in name) and "bias" not in name:
            blocks.append(weight)
        else:
            (matrices if weight.ndim > 1 else vectors).append(weight)
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(blocks, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr, betas=(0.9, 0.99)),
    ]


def train_transformer(settings: Settings, vae: Any, pool: Pool, export: Export) -> dict[str, Any]:
    """Stage 3: flow matching, v = noise - x0 at x_t = (1 - t) x0 + t noise. Exports EMA weights on the way.

    Returns {"step", "seconds", "pipe": the pipeline with EMA weights}.
    """
    device = settings.torch_device()
    torch.manual_seed(settings.seed + 1)
    pipe = settings.of.make_pipeline(settings.architecture(), vae).to(device)
    pipe.set_progress_bar_config(disable=True)
    if device.type == "cpu":
        set_backend(pipe.transformer, EAGER)
    trained = settings.of.trained(pipe)
    trained.requires_grad_(True).train()
    ema = copy.deepcopy(trained).requires_grad_(False)
    if settings.compile:
        pipe.transformer.compile(dynamic=False)
    weights: list[Tensor] = list(trained.parameters())
    averages: list[Tensor] = list(ema.parameters())
    optimizers = _optimizers(trained, settings.lr)
    path = settings.work / "transformer.pt"
    state = _load(path, device) or {"step": 0, "seconds": 0.0}
    if state["step"]:
        trained.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, old in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(old)
    info = {"step": state["step"], "seconds": state["seconds"]}
    start = saved = exported = time.time()
    start -= state["seconds"]
    bar = _progress(settings.steps, state["step"], "transformer")
    loss_mean = None
    for step, (x0, texts, t, noise) in enumerate(_batches(settings, pool, state["step"]), state["step"]):
        if step >= settings.steps:
            break
        lr = settings.lr * _schedule(step, settings.steps, settings.decay_from, 200)
        x0, t, noise = x0.to(device), t.to(device), noise.to(device)
        time_axis = t.reshape(-1, *[1] * (x0.ndim - 1))
        x_t = (1 - time_axis) * x0 + time_axis * noise
        with _autocast(settings, device):
            v = settings.of.velocity(pipe, x_t, t, texts)
        loss = F.mse_loss(v.float(), noise - x0)
        trained.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            _set_lr(optimizer, lr)
            optimizer.step()
        torch._foreach_lerp_(averages, weights, 1 - min(settings.ema, (1 + step) / (10 + step)))
        loss_mean = loss.item() if loss_mean is None else 0.98 * loss_mean + 0.02 * loss.item()
        bar.set_postfix_str(f"loss {loss_mean:.4f}", refresh=False)
        bar.update()

        now, done = time.time(), step + 1
        info = {"step": done, "seconds": now - start}
        if done == settings.steps or now - saved > settings.checkpoint_every:
            saved = now
            parts = {"model": trained.state_dict(), "ema": ema.state_dict()}
            _save({**info, **parts, "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, path)
        if done % settings.evaluate_every == 0 and done < settings.steps:
            scores = evaluate.scores(_with_weights(pipe, ema), settings.of.split("test"), seeds=1)
            tqdm.write(f"step {done}, {info['seconds'] / 60:.1f} min: {evaluate.one_line(scores)}", file=sys.stderr)
        if settings.export_every and done < settings.steps and now - exported > settings.export_every:
            exported = now
            export(settings, _with_weights(pipe, ema), {**info, "preliminary": True})
    bar.close()
    return {**info, "pipe": _with_weights(pipe, ema)}


def _with_weights(pipe: Any, ema: nn.ModuleDict) -> Any:
    """The same pipeline with the averaged weights."""
    parts = dict(ema.items())
    for module in parts.values():
        module.eval()
    other = type(pipe)(**{**pipe.components, **parts})
    other.set_progress_bar_config(disable=True)
    return other
