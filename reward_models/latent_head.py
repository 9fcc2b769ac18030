"""What the latent reward is made of: features of a frozen denoiser's block, a head h on them, its files, its examples, its loss.

    L = huber(h, r) + rank_weight * mean of -log sigma(sign(r_i - r_j) (h_i - h_j))      i, j: of one prompt, time and noise

r: the true reward in deviations from its mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl.batch import Samples
from flowrl.policy import Policy
from flowrl.reward_models.base import REWARD_FILE, place_of

WEIGHTS_FILE = "latent.safetensors"
CLEAN = 0.01  #: The time at which clean latents are shown to the denoiser, which was never trained at 0.


# ------------------------------------------------------------------------------------------------ features


class _Enough(Exception):
    """Ends the denoiser's pass: the blocks behind are not needed."""


def middle_block(policy: Policy) -> str:
    """Name of the block two thirds into the run of blocks that holds most weights, "transformer.transformer_blocks.4"."""
    runs = {
        f"{part}.{name}": module
        for part, denoiser in policy.denoisers.items()
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not runs:
        raise ValueError(f"{policy.name}'s denoiser has no run of blocks; name the module whose output to read as `block`")
    name = max(runs, key=lambda name: sum(p.numel() for p in runs[name].parameters()))
    return f"{name}.{2 * len(runs[name]) // 3}"


def block_features(policy: Policy, block: str, x: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
    """What a block of the denoiser says of noisy latents: mean and maximum over the tokens of each stream, (B, W), with graph.

    x: (B, ...) in flow coordinates; t: (B,), 1 is noise. Raises ValueError where there is no such block.
    """
    part, _, path = block.partition(".")
    try:
        module = policy.denoisers[part].get_submodule(path)
    except (KeyError, AttributeError):
        raise ValueError(f"block={block!r}: {policy.name} has no such module") from None
    found: list[Tensor] = []

    def read(_: nn.Module, inputs: Any, output: Any) -> None:
        streams = [s for s in (output if isinstance(output, tuple | list) else [output]) if isinstance(s, Tensor)]
        tokens = [s if s.dim() == 3 else s.flatten(2).transpose(1, 2) for s in streams]
        found.append(torch.cat([f(s.float()) for s in tokens for f in (lambda s: s.mean(1), lambda s: s.amax(1))], 1))
        raise _Enough

    handle = module.register_forward_hook(read)
    # Where guidance calls the denoiser twice it is off; where it is an input of a distilled denoiser it stays.
    unguided = {"guidance_scale": 1.0} if hasattr(type(policy.pipe), "do_classifier_free_guidance") else {}
    try:
        policy.velocity(list(prompts), x, t.clamp_min(CLEAN), **unguided)
    except _Enough:
        pass
    finally:
        handle.remove()
    if not found or len(found[0]) != len(x):
        raise ValueError(f"block={block!r} of {policy.name} does not see each latent once")
    return found[0]


# ------------------------------------------------------------------------------------------------ the head


class LatentHead(nn.Module):
    """A multilayer perceptron on standardised features and time. Its value is in units of `scale` around `offset`."""

    mean: Tensor
    std: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(self, width: int, hidden: int = 128, dropout: float = 0.3):
        super().__init__()
        for name, start in (("mean", torch.zeros(width)), ("std", torch.ones(width))):
            self.register_buffer(name, start)
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.net = nn.Sequential(nn.Linear(width + 2, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 1))

    def fit_units(self, features: Tensor, scores: Tensor) -> None:
        """Take the statistics of features (N, W) and of the target reward (N,)."""
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0).clamp_min(1e-3))
        self.offset.copy_(scores.mean())
        self.scale.copy_(scores.std().clamp_min(1e-6))

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        """features: (B, W); t: (B,). (B,)."""
        time = t.float()[:, None]
        return self.net(torch.cat([(features - self.mean) / self.std, time, time.square()], 1))[:, 0]


def save_head(head: LatentHead, folder: str | Path, model: str, block: str, **facts: Any) -> None:
    """A folder that load_reward reads. model, block: whose features they are. facts: for the card, stored beside."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}, folder / WEIGHTS_FILE)
    card = {"reward": "latent", "options": {}, "model": model, "block": block, **facts}
    (folder / REWARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def load_head(folder: str | Path) -> tuple[LatentHead, dict[str, Any]]:
    """What `save_head` wrote, and its card. Raises ValueError when the folder holds something else."""
    from safetensors.torch import load_file

    place = Path(place_of(folder))
    try:
        card = json.loads((place / REWARD_FILE).read_text(encoding="utf-8"))
        weights = load_file(place / WEIGHTS_FILE)
        head = LatentHead(len(weights["mean"]), len(weights["net.0.bias"]))
        head.load_state_dict(weights)
        return head, {"model": card["model"], "block": card["block"], **card}
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder} holds no latent reward: {' '.join(str(error).split())}") from None


# ------------------------------------------------------------------------------------------------ learning


class Pool:
    """The latest examples, oldest out first: features (N, W), times, true scores, and which of them may be compared (N,)."""

    NAMES = ("features", "t", "scores", "group")

    def __init__(self, size: int):
        self.size = size
        self.features, self.t, self.scores = torch.empty(0), torch.empty(0), torch.empty(0)
        self.group = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.scores)

    def add(self, features: Tensor, t: Tensor, scores: Tensor, group: Tensor) -> None:
        """Examples whose score is NaN are left out. group: equal for examples of one prompt, time and noise."""
        kept = ~scores.isnan()
        new = [value.detach()[kept].cpu() for value in (features.float(), t, scores.float(), group)]
        if len(self) and len(new[3]):
            new[3] = new[3] - new[3].min() + self.group.max() + 1  # groups of another call are other groups
        for name, value in zip(self.NAMES, new, strict=True):
            old = getattr(self, name)
            setattr(self, name, (torch.cat([old, value]) if len(old) else value)[-self.size :])

    def pairs(self, count: int, generator: torch.Generator) -> Tensor:
        """(2 count,) rows: rows i and i + count are two of one group, where it has two."""
        first = torch.randint(len(self), (count,), generator=generator)
        order = torch.randperm(len(self), generator=generator)
        order = order[self.group[order].argsort(stable=True)]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(self)))
        after, before = (order[(place[first] + step) % len(self)] for step in (1, -1))
        return torch.cat([first, torch.where(self.group[after] == self.group[first], after, before)])


def at_once(latents: Tensor) -> int:
    """How many of latents (N, ...) the blocks read in one go: 64 of pictures, fewer of long clips."""
    return max(1, min(64, (1 << 22) // latents[0].numel()))


def noisy_examples(
    policy: Policy, block: str, samples: Samples, scores: Tensor, views: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean samples at `views` noise levels each, as `Pool.add` takes them; the first level is 0.

    Samples of one prompt share time and noise, so that the samples alone tell them apart.
    """
    groups, of = samples.group.unique(return_inverse=True)
    latents, of = samples.latents.float(), of.cpu()
    parts = []
    for view in range(views):
        t = torch.rand(len(groups), generator=generator)[of] if view else torch.zeros(len(of))
        eps = torch.randn((len(groups), *latents.shape[1:]), generator=generator)[of]
        s = t.view(-1, *[1] * (latents.dim() - 1)).to(latents.device)
        x = (1 - s) * latents + s * eps.to(latents.device)
        chunks = [
            block_features(policy, block, x[rows], t[rows].to(x.device), [samples.texts[i] for i in rows])
            for rows in torch.arange(len(x)).split(at_once(x))
        ]
        parts.append((torch.cat(chunks).cpu(), t, scores.cpu(), of * views + view))
    features, times, values, group = (torch.cat(column) for column in zip(*parts, strict=True))
    return features, times, values, group


def latent_loss(head: LatentHead, pool: Pool, rows: Tensor, rank_weight: float, device: Any) -> tuple[Tensor, dict[str, float]]:
    """Huber loss of the standardised score, and the logistic loss of which of a pair scores higher. rows: of `Pool.pairs`."""
    value = head(pool.features[rows].to(device), pool.t[rows].to(device))
    target = (pool.scores[rows].to(device) - head.offset) / head.scale
    huber = F.huber_loss(value, target)
    half = len(rows) // 2
    difference, sign = value[:half] - value[half:], (target[:half] - target[half:]).sign()
    told = (sign != 0).float() / (sign != 0).sum().clamp_min(1)
    rank = (F.softplus(-sign * difference) * told).sum()
    right = ((sign * difference > 0).float() * told).sum()
    return huber + rank_weight * rank, {"huber": huber.item(), "rank": rank.item(), "pair_accuracy": right.item()}


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation, ties at their mean rank; NaN where one of them does not vary."""
    from scipy.stats import rankdata

    ranks = torch.stack([torch.from_numpy(rankdata(values.detach().cpu().numpy())) for values in (a, b)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    return float((ranks[0] * ranks[1]).sum() / ranks.norm(dim=1).prod()) if ranks.norm(dim=1).min() > 0 else math.nan
