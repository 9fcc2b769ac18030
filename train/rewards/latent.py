"""Trains a reward on latents from any pixel reward, on the policy's own samples (DOLLAR, 2412.15689; Flow-NRG, 2501.13918).

The policy is asked for fresh samples every `refresh_steps` steps; the oldest in the pool make room. Each is seen at several noise
levels, so that one head serves as the reward of clean latents and as the process reward of noisy ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowrl.batch import Prompt, Samples, concatenate
from flowrl.config import ConfigError
from flowrl.data import load_prompts, sample_seed
from flowrl.policy import Policy
from flowrl.reward_models.base import load_reward, score_one
from flowrl.reward_models.latent_head import (
    LatentHead,
    Pool,
    at_once,
    block_features,
    latent_loss,
    middle_block,
    noisy_examples,
    save_head,
    spearman,
)
from flowrl.train.rewards.loop import RewardRecipe, Score, positions
from flowrl.train.rewards.losses import wins

TIMES = (0.0, 0.2, 0.4, 0.6, 0.8)  #: Noise levels of the held-out numbers.


@dataclass
class Latent:
    """Options of the task `latent`."""

    reward: Any = "tiny_dense"  #: The reward to imitate: whatever `load_reward` reads. It needs no gradient.
    model: str = "tiny-sd3"  #: The policy whose latents it scores, and whose first blocks it reads.
    dtype: Literal["float32", "bfloat16"] = "float32"  #: Of its weights.
    #: Arguments of its call, as the runs that use the reward have them: height, width, num_frames, guidance_scale, ...
    call: dict[str, Any] = field(default_factory=dict)
    block: str | None = None  #: The block that is read, by its name in the policy's denoisers; by default two thirds in.
    prompts: str = "tiny-train"  #: Prompts of the samples: a file or an embedded set.
    eval_prompts: str = "tiny-test"  #: Prompts of the held-out samples.
    num_inference_steps: int = 10  #: Denoising steps of the samples.
    rollout_batch_size: int = 64  #: Samples drawn and decoded at once.
    generations: int = 4  #: Samples of each prompt, which the ranking loss compares.
    pool: int = 3072  #: Samples to learn from at any time.
    refresh_steps: int = 250  #: Steps after which the oldest samples are replaced by fresh ones.
    refresh_samples: int = 256  #: How many are replaced.
    views: int = 4  #: Noise levels at which each sample is seen; one of them is 0.
    eval_samples: int = 480  #: Held-out samples.
    hidden: int = 128  #: Width of the head.
    dropout: float = 0.3  #: Of the head.
    rank_weight: float = 0.5  #: Weight of the ranking loss beside the regression.

    def prepare(self, recipe: RewardRecipe, device: torch.device) -> nn.Module:
        """Draws the first pool and the held-out samples, and makes the head."""
        if self.rollout_batch_size < 1:
            raise ConfigError(f"task.rollout_batch_size={self.rollout_batch_size}: must be positive")
        if self.generations < 2 or self.refresh_samples % self.generations or self.pool % self.refresh_samples:
            raise ConfigError(
                f"task: refresh_samples={self.refresh_samples} must hold whole groups of generations={self.generations} (two or"
                f" more), and pool={self.pool} whole refreshments"
            )
        self.recipe, self.device = recipe, device
        self.policy = Policy.load(self.model, dtype=self.dtype, device=device, **self.call)
        self.at = self.block or middle_block(self.policy)
        self.scorer = load_reward(self.reward)
        self.train_prompts, self.test_prompts = load_prompts(self.prompts), load_prompts(self.eval_prompts)
        self.chunks: dict[int, tuple[Tensor, ...]] = {}
        self.samples, self.pooled = Pool(0), -1
        pool = self._pool(0)
        if len(pool) < 2 or pool.scores.std() == 0:
            raise ConfigError(f"task.reward={self.scorer.name}: {len(pool)} scores that do not differ leave nothing to learn")
        self.head = LatentHead(pool.features.shape[1], self.hidden, self.dropout)
        self.head.fit_units(pool.features, pool.scores)
        rng = np.random.default_rng([recipe.seed, 1])
        self.held_out, self.truth = self._draw(self.test_prompts, self.eval_samples // self.generations, rng)
        return self.head.to(device)

    def _draw(self, prompts: list[Prompt], count: int, rng: np.random.Generator) -> tuple[Samples, Tensor]:
        """Samples of `count` prompts, and their true scores; decoded once and forgotten."""
        chosen = [prompts[i] for i in rng.integers(len(prompts), size=count) for _ in range(self.generations)]
        seeds = [int(seed) for seed in rng.integers(1 << 31, size=len(chosen))]
        group = torch.arange(count).repeat_interleave(self.generations)
        parts, scores = [], []
        for i in range(0, len(chosen), self.rollout_batch_size):
            rows = slice(i, i + self.rollout_batch_size)
            part = self.policy.rollout(chosen[rows], seeds[rows], group=group[rows], num_inference_steps=self.num_inference_steps)
            part.images = self.policy.decode(part, num_inference_steps=self.num_inference_steps)
            scores.append(score_one(self.scorer.name, self.scorer, part))
            part.images = None
            parts.append(part)
        return concatenate(parts), torch.cat(scores)

    def _pool(self, refreshed: int) -> Pool:
        """The pool after so many refreshments. Chunks depend on their number alone, so that a run can be resumed."""
        if refreshed == self.pooled:
            return self.samples
        process = positions(self.recipe).start // len(positions(self.recipe))
        wanted = range(refreshed, refreshed + self.pool // self.refresh_samples)
        missing = [number for number in wanted if number not in self.chunks]
        for number in tqdm(missing, f"drawing {self.refresh_samples} at a time", disable=len(missing) < 2 or process > 0):
            rng = np.random.default_rng([self.recipe.seed, 0, process, number])
            drawn, scores = self._draw(self.train_prompts, self.refresh_samples // self.generations, rng)
            generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
            with torch.no_grad():
                self.chunks[number] = noisy_examples(self.policy, self.at, drawn, scores, self.views, generator)
        self.chunks = {number: chunk for number, chunk in self.chunks.items() if number >= refreshed}
        self.samples, self.pooled = Pool(self.pool * self.views), refreshed
        for number in sorted(self.chunks):
            self.samples.add(*self.chunks[number])
        return self.samples

    def batch(self, step: int) -> tuple[Pool, Tensor]:
        """The pool, and rows of it: pairs of samples of one prompt."""
        pool, places = self._pool(step // self.refresh_steps), positions(self.recipe)
        generator = torch.Generator().manual_seed(sample_seed(self.recipe.seed, step, places.start))
        return pool, pool.pairs(len(places) // 2, generator)

    def loss(self, batch: tuple[Pool, Tensor]) -> tuple[Tensor, dict[str, float]]:
        pool, rows = batch
        return latent_loss(self.head, pool, rows, self.rank_weight, self.device)

    def evaluate(self) -> dict[str, Score]:
        """Rank correlation with the true reward per noise level, and how often the better of two of a prompt scores higher."""
        known, result = ~self.truth.isnan(), {}
        pairs = int(better_than(self.truth, self.held_out.group).sum())
        for t in TIMES:
            value = self._values(t)
            result[f"spearman/t{t}"] = Score(spearman(value[known], self.truth[known]), int(known.sum()))
            result[f"pair_accuracy/t{t}"] = Score(pair_accuracy(value, self.truth, self.held_out.group), pairs)
        return result

    def _values(self, t: float) -> Tensor:
        x0 = self.held_out.latents.float()
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(self.recipe.seed)).to(x0.device)
        x, times, parts = (1 - t) * x0 + t * eps, torch.full((len(x0),), t, device=x0.device), []
        for rows in torch.arange(len(x0)).split(at_once(x0)):
            texts = [self.held_out.texts[i] for i in rows]
            parts.append(self.head(block_features(self.policy, self.at, x[rows], times[rows], texts), times[rows]).cpu())
        return torch.cat(parts)

    def save(self, folder: Path) -> None:
        save_head(self.head, folder, self.model, self.at, imitates=self.scorer.name, call=self.call)

    @property
    def tried_by(self) -> str:
        return "tiny-video-nft" if self.policy.facts.draws_clips else "quickstart"

    def describe(self) -> str:
        return f"""\
`{self.scorer.name}` read off the latents of `{self.model}`, without decoding: its expected value given a noisy latent x_t, the
prompt and t. A perceptron on what `{self.at}` of the frozen denoiser says, averaged and maximised over tokens.

Learnt on samples of `{self.model}` in {self.num_inference_steps} steps for the prompts of `{self.prompts}`: {self.pool:,} at
a time, {self.refresh_samples} of them replaced every {self.refresh_steps} steps, each at {self.views} noise levels. Held out:
{len(self.held_out)} samples for the prompts of `{self.eval_prompts}`; rank correlation with the true reward over all of them, and
how often the better of two samples of one prompt scores higher (0.5 is chance), at noise levels t (1 is noise)."""


def better_than(truth: Tensor, group: Tensor) -> Tensor:
    """(N, N) bool: the first is truly better than the second, of the same group."""
    return (group[:, None] == group) & (truth[:, None] > truth)


def pair_accuracy(value: Tensor, truth: Tensor, group: Tensor) -> float:
    """How often `value` has two of a group in their true order, over all pairs that differ. NaN where there are none."""
    return float(wins((value[:, None] - value)[better_than(truth, group)]).mean())
