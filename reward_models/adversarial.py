"""Adv-GRPO (showlab/Adv-GRPO): a critic that learns, beside the generator, to tell its samples from reference pictures.

    r    = 0.7 h(global) + 0.3 mean_patches h(patch)                       h: a small head on frozen features of unit length
    L_h  = 1/2 E relu(1 - h(real)) + 1/2 E relu(1 + h(fake))               on the global feature, plus 0.3 of the same on patches

A fixed proxy can be exploited; this one answers. Unlike the published code, the head is trained on the unit features that it
scores, its gradients are averaged over processes, and it pauses where it is winning.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl.batch import Samples
from flowrl.data import generators, sample_seed
from flowrl.pairs import load_picture
from flowrl.reward_models.base import Traits
from flowrl.reward_models.features import load_features, picture_files


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """1/2 E relu(1 - real) + 1/2 E relu(1 + fake), a scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


class Adversarial:
    """How real a picture looks to the critic; unbounded unless squashed. Differentiable. Clips are scored frame by frame."""

    def __init__(
        self,
        #: Frozen encoder: "pixels", an embedded dual encoder, folder or hub id of a dual encoder or a vision transformer;
        #: published: facebook/dinov2-base.
        features: Any = "tiny_clip",
        #: "samples" (what the loop provides: another model's or the user's pictures of the same prompt), or a folder of pictures.
        references: str | Path = "samples",
        hidden: int = 512,  #: Width of the head.
        learning_rate: float = 1e-4,  #: Of the head's Adam (betas 0.5, 0.999).
        patches: int | None = 64,  #: How many patches of each picture count, drawn by its seed; none for all.
        patch_weight: float = 0.3,  #: Share of the patches in the score, in [0, 1]; the rest is the whole picture's.
        steps: int = 10,  #: Critic steps per update, at most.
        #: No step while it tells more than the second of these shares of the fresh pictures apart, more than one only below the
        #: first.
        window: tuple[float, float] = (0.6, 0.9),
        replay: int = 256,  #: Earlier samples that are kept, uniformly over the whole run, so that it does not forget.
        squash: Literal["sigmoid", "tanh"] | None = None,  #: What bounds the score: sigmoid or tanh; none leaves it unbounded.
        seed: int = 0,  #: Of the head's first weights, and of what each update draws.
    ):
        if squash not in (None, "sigmoid", "tanh"):
            raise ValueError(f"adversarial: squash={squash!r}: choose sigmoid, tanh or none")
        if not 0 <= window[0] <= window[1] <= 1 or not 0 <= patch_weight <= 1 or steps < 1 or replay < 0:
            raise ValueError(
                f"adversarial: window={window} must rise within [0, 1], patch_weight={patch_weight} lie in it, "
                f"steps={steps} be at least 1 and replay={replay} not negative"
            )
        self.name, self.features, self.references = "adversarial", load_features(features), str(references)
        self.files = None if self.references == "samples" else picture_files(self.references)
        self.patches, self.patch_weight, self.steps, self.window = patches, patch_weight, steps, tuple(window)
        self.replay, self.squash, self.seed = replay, squash, seed
        bounds = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), None: (-torch.inf, torch.inf)}[squash]
        needs = ("images",) if self.files else ("images", "references")
        self.traits = Traits(needs=needs, range=bounds, differentiable=True, licence="see the card of its encoder")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # every process starts with the same head
            self.head = nn.Sequential(nn.Linear(self.features.dim, hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.optimizer = torch.optim.Adam(self.head.parameters(), learning_rate, betas=(0.5, 0.999))
        self.memory = torch.zeros(0, 1, self.features.dim, dtype=torch.float16)
        self.seen = self.updates = 0  # samples offered to the memory; updates, of which some took no step

    # -- scoring

    def tokens(self, images: Tensor, seeds: list[int]) -> Tensor:
        """(N, 1 + m, D) of unit length: the global feature, then m patches. What the head is trained on, and what it scores.

        images: (N, 3, H, W) or (N, F, 3, H, W), of which each frame is a picture of the clip's seed: (N F, 1 + m, D).
        """
        if images.ndim == 5:
            seeds = [seed for seed in seeds for _ in range(images.shape[1])]
            images = images.flatten(0, 1)
        see, chunks = self.features, images.split(64)
        whole = torch.cat([see.pictures(chunk) for chunk in chunks])[:, None]
        parts = torch.cat([see.shared(see.patches(chunk), "patches") for chunk in chunks])
        if self.patches is not None and self.patches < parts.shape[1]:
            chosen = [torch.randperm(parts.shape[1], generator=g)[: self.patches] for g in generators(seeds)]
            rows = torch.stack(chosen).to(parts.device)
            parts = parts.gather(1, rows[:, :, None].expand(-1, -1, parts.shape[2]))
        return F.normalize(torch.cat([whole, parts], 1).float(), dim=-1)

    def __call__(self, samples: Samples) -> Tensor:
        images = samples.images
        assert images is not None
        self._follow(images.device)
        logits = self.head(self.tokens(images, samples.seeds))[..., 0]
        score = (1 - self.patch_weight) * logits[:, 0] + self.patch_weight * logits[:, 1:].mean(1)
        if images.ndim == 5:
            score = score.unflatten(0, images.shape[:2]).mean(1)
        return score if self.squash is None else getattr(torch, self.squash)(score)

    # -- learning

    def update(self, samples: Samples, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Learn to tell these samples, and earlier ones, from references. Call it after all of them were scored.

        Metrics: accuracy on the fresh ones (before learning from them), loss, steps taken, scores of real and fake.
        """
        images = samples.images
        assert images is not None
        self._follow(images.device)
        with torch.no_grad():
            fake = self.tokens(images, samples.seeds)
            real = self.tokens(*self._positives(samples))
        generator = torch.Generator().manual_seed(sample_seed(self.seed, self.updates, samples.seeds[0]))
        fakes = [fake]
        if len(self.memory):
            rows = torch.randint(len(self.memory), (len(fake),), generator=generator)
            fakes.append(self.memory[rows].to(fake))
        parameters = list(self.head.parameters())
        taken, loss = 0, torch.zeros(())
        before: dict[str, float] = {}
        while taken < self.steps:
            judged = self._judged(real, fake, reduce)
            before = before or judged
            if judged["accuracy"] >= self.window[1] or (taken and judged["accuracy"] >= self.window[0]):
                break
            loss = torch.stack([self._loss(real, some) for some in fakes]).mean()
            gradient = reduce(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
            for p, g in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
                p.grad = g.view_as(p)
            self.optimizer.step()
            taken += 1
        self._remember(fake.half().cpu(), generator)
        self.updates += 1
        return {**before, "loss": float(loss.detach()), "steps": float(taken)}

    def _loss(self, real: Tensor, fake: Tensor) -> Tensor:
        real, fake = self.head(real)[..., 0], self.head(fake)[..., 0]
        return hinge(real[:, 0], fake[:, 0]) + self.patch_weight * hinge(real[:, 1:], fake[:, 1:])

    @torch.no_grad()
    def _judged(self, real: Tensor, fake: Tensor, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """By the global feature; the same numbers, and so the same decision, in every process."""
        r, f = self.head(real[:, 0])[:, 0], self.head(fake[:, 0])[:, 0]
        accuracy = 0.5 * ((r > 0).float().mean() + (f < 0).float().mean())
        values = reduce(torch.stack([accuracy, r.mean(), f.mean()])).tolist()
        return dict(zip(("accuracy", "score_real", "score_fake"), values, strict=True))

    def _positives(self, samples: Samples) -> tuple[Tensor, list[int]]:
        """Real pictures and seeds for their patches: each prompt's references once, or as many files as there are samples."""
        images = samples.images
        assert images is not None
        if self.files is None:
            assert samples.references is not None, "the loop provides references where a reward needs them"
            first = [int(rows[0]) for rows in samples.by_group()]
            count = samples.references.shape[1]
            pictures = samples.references[first].flatten(0, 1)
            return pictures, [sample_seed(samples.seeds[i], j) for i in first for j in range(count)]
        seeds = [sample_seed(self.seed, self.updates, seed) for seed in samples.seeds]
        size = images.shape[-2:]
        read = [load_picture(self.files[seed % len(self.files)]) for seed in seeds]
        return torch.stack([F.interpolate(p[None], size, mode="bilinear", antialias=True)[0] for p in read]).to(images), seeds

    def _remember(self, fake: Tensor, generator: torch.Generator) -> None:
        """Reservoir sampling: every sample of the run so far is in the memory with the same probability."""
        self.memory = self.memory.new_zeros(0, *fake.shape[1:]) if not len(self.memory) else self.memory
        room = self.replay - len(self.memory)
        self.memory = torch.cat([self.memory, fake[:room]]) if room > 0 else self.memory
        self.seen += min(max(room, 0), len(fake))
        for row in fake[max(room, 0) :]:
            self.seen += 1
            place = int(torch.randint(self.seen, (), generator=generator))
            if place < len(self.memory):
                self.memory[place] = row

    def _follow(self, device: torch.device) -> None:
        if next(self.head.parameters()).device != device:
            self.head.to(device)
            self.optimizer.load_state_dict(self.optimizer.state_dict())  # takes its moments along

    # -- resuming

    def state_dict(self) -> dict[str, Tensor]:
        """Head, optimiser, memory and counters: a run that loads it goes on to the bit as if it had not stopped."""
        state = {f"head.{name}": value.detach().clone() for name, value in self.head.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{name}": value.clone() for name, value in moments.items()}
        counts = torch.tensor([self.seen, self.updates])
        return {**state, "memory": self.memory.clone(), "counts": counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.head.load_state_dict({k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")})
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, i, name = key.split(".")
                moments.setdefault(int(i), {})[name] = value.clone()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.memory = state["memory"].cpu().clone()
        self.seen, self.updates = state["counts"].tolist()
