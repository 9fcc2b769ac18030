"""A reward on latents, learnt from any pixel reward on the policy's own samples (DOLLAR, arXiv 2412.15689; Flow-NRG, 2501.13918).

    r_phi(x_t, t, y) ~ E[ r(decode(x0), y) | x_t ]          x_t = (1 - t) x0 + t eps, x0 from the policy

A verifier, a detector or a judge gives no gradient and needs a decoded picture; this needs neither. At t = 0 it stands in for
the pixel reward; at t > 0 it is the process reward that guidance climbs (`estimate: noisy`, Euphonium). It is a small head on
what the first blocks of a frozen denoiser make of the noisy latent, the time and the prompt: they have read more of both than any
network learns from a few thousand scores. It knows the samples that it was shown and no others: a policy that climbs it leaves
them within some hundred updates, so `refresh` it, and watch its rank correlation with the true reward on unseen samples.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.batch import Samples
from flowrl.policy import Policy
from flowrl.reward_models.base import Reward, RewardError, Traits, load_reward, score_one
from flowrl.reward_models.latent_head import (
    LatentHead,
    Pool,
    at_once,
    block_features,
    latent_loss,
    load_head,
    middle_block,
    noisy_examples,
    save_head,
    spearman,
)

__all__ = [
    "LatentHead",
    "LatentReward",
    "Pool",
    "at_once",
    "block_features",
    "latent_loss",
    "load_head",
    "middle_block",
    "noisy_examples",
    "save_head",
    "spearman",
]


class LatentReward:
    """The learnt reward, in the units of the reward it imitates; no decoding. Differentiable in the latents."""

    name = "latent"
    traits = Traits(needs=("latents",), differentiable=True)

    def __init__(
        self,
        folder: str | Path,  #: What `flowrl train-reward tiny-latent`, or another recipe of the task, wrote.
        #: The reward that it goes on imitating while a policy trains on it: updates score fresh samples with it and learn from
        #: them; unset: it stays as it is.
        of: Any = None,
        policy: Policy | None = None,  #: Whose blocks it reads, frozen; unset: loaded anew from the model that the folder names.
        every: int = 1,  #: Of the chances to update, one after each scoring, every so many-th is taken.
        steps: int = 50,  #: Optimiser steps of an update.
        batch_size: int = 128,  #: Examples of such a step.
        learning_rate: float = 3e-4,  #: Of the AdamW of updates.
        views: int = 4,  #: Noise levels at which each fresh sample is seen; one of them is 0.
        pool: int = 8192,  #: Examples that updates learn from, the latest ones.
        #: Below this rank correlation with `of` on fresh samples it abstains, until it has caught up.
        min_spearman: float = -1.0,
        seed: int = 0,  #: Of the updates' random numbers.
        dtype: str = "float32",  #: Of the weights of the model that is loaded: float32 or bfloat16.
    ):
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"latent: dtype={dtype!r}: choose float32 or bfloat16")
        self.head, card = load_head(folder)
        self.policy = policy or Policy.load(card["model"], dtype=dtype, **card.get("call", {}))
        self.block = card["block"]
        self.of: Reward | None = None if of is None else load_reward(of)
        self.every, self.steps, self.batch_size, self.views = every, steps, batch_size, views
        self.pool, self.min_spearman = Pool(pool), min_spearman
        self.optimizer = torch.optim.AdamW(self.head.parameters(), learning_rate)
        self.generator = torch.Generator().manual_seed(seed)
        self.calls, self.spearman = 0, 1.0

    def __call__(self, samples: Samples) -> Tensor:
        if self.spearman < self.min_spearman:
            return torch.full((len(samples),), torch.nan)
        return self.noisy(samples.latents, torch.zeros(len(samples)), samples.texts)

    def noisy(self, x: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        """Expected reward of noisy states, (B,) with graph. x: (B, ...) in flow coordinates; t: (B,), 1 is noise."""
        if self.policy.device != x.device:
            self.policy.pipe.to(x.device)
        head = self.head.to(x.device).eval()
        times = t.float().to(x.device)
        return head.offset + head.scale * head(block_features(self.policy, self.block, x, times, prompts), times)

    def update(self, samples: Samples, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Score fresh samples with `of` and learn from them. Nothing without `of`."""
        self.calls += 1
        if self.of is None or (self.calls - 1) % self.every:
            return {}
        return self.refresh(samples, score_one(self.of.name, self.of, samples), reduce)

    def refresh(
        self, samples: Samples, scores: Tensor, reduce: Callable[[Tensor], Tensor] = lambda value: value
    ) -> dict[str, float]:
        """Learn from on-policy samples and their true scores (N,): what a trainer that climbs this reward calls now and then.

        reduce: averages a tensor over processes. Returns the rank correlation with the true scores, measured before anything is
        learnt from these samples, and the mean loss. Raises RewardError where no sample has a score.
        """
        if scores.isnan().all():
            raise RewardError(f"reward {self.name!r}: no true score to learn from")
        device = samples.latents.device
        with torch.no_grad():
            self.head.to(device).eval()
            examples = noisy_examples(self.policy, self.block, samples, scores, self.views, self.generator)
            features, t, truth = (value[: len(scores)] for value in examples[:3])  # the clean ones
            guess, known = self.head(features.to(device), t.to(device)).cpu(), ~truth.isnan()
        self.spearman = float(reduce(torch.tensor(spearman(guess[known], truth[known])).nan_to_num().to(device)))
        self.pool.add(*examples)
        losses = []
        self.head.train()
        with torch.enable_grad():
            for _ in range(self.steps):
                rows = self.pool.pairs(self.batch_size // 2, self.generator)
                value, _ = latent_loss(self.head, self.pool, rows, 0.5, device)
                self.optimizer.zero_grad()
                value.backward()
                for parameter in self.head.parameters():
                    if parameter.grad is not None:
                        parameter.grad = reduce(parameter.grad)
                nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
                self.optimizer.step()
                losses.append(float(value.detach()))
        return {"spearman": self.spearman, "loss": sum(losses) / max(1, len(losses)), "pool": float(len(self.pool))}

    def state_dict(self) -> dict[str, Any]:
        """Head, optimizer, pool and random state."""
        return {
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pool": {name: getattr(self.pool, name) for name in Pool.NAMES},
            "generator": self.generator.get_state(),
            "place": torch.tensor([float(self.calls), self.spearman], dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["pool"].items():
            setattr(self.pool, name, value)
        self.generator.set_state(state["generator"])
        self.calls, self.spearman = int(state["place"][0]), float(state["place"][1])
