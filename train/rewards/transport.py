"""PISCES, arXiv 2602.01624: the map that carries text embeddings onto real-picture embeddings, for the reward `transport`.

    sup_f inf_T  mean f(x) + mean [c(y, T(y)) - f(T(y))],    c(y, z) = |y - z|^2      (Korotin et al. 2023)

alternating: `inner` steps of T down c - f(T(y)), then one of f down f(T(y)) - f(x). T starts as the Gaussian map, so that the
network learns what the moments leave. The closed forms (mean_shift, gaussian) are there after `prepare`: steps train f alone,
whose loss says how well carried texts and pictures can still be told apart, and one is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from flowrl.config import ConfigError
from flowrl.data import load_prompts
from flowrl.pairs import load_picture
from flowrl.reward_models import EMBEDDED
from flowrl.reward_models.features import load_backbone
from flowrl.reward_models.gaussians import frechet_distance, moments
from flowrl.reward_models.transport import TransportMap, network
from flowrl.tiny import Spec, render, sample_scene
from flowrl.tiny.scenes import GRAMMAR
from flowrl.train.rewards.loop import RewardRecipe, Score, picks


class Game(nn.Module):
    """T and its opponent f: (N, D) -> (N,)."""

    def __init__(self, transport: TransportMap):
        super().__init__()
        self.transport = transport
        self.critic = network(transport.dim, transport.hidden, 1)


@dataclass
class Transport:
    """Options of the task `transport`."""

    grammar: ClassVar = GRAMMAR
    column: ClassVar = "image"
    wanted: ClassVar = 'an "image", the path of a picture'

    kind: Literal["mean_shift", "gaussian", "neural"] = "gaussian"  #: neural: gaussian plus what a network learns.
    pairs: str = "tiny"  #: `tiny` draws scenes; else a .jsonl file of {"prompt": ..., "image": path}, relative to the file.
    count: int = 4096  #: Pairs of `tiny`.
    held_out: int = 512  #: Pairs to measure on: of the test prompts, or the last ones of the file.
    backbone: str = "tiny_clip"  #: Frozen dual encoder: an embedded one, a folder or a hub id.
    hidden: int = 256  #: Width of both networks. 1024 for encoders of 512 dimensions and more.
    inner: int = 10  #: Steps of T for each step of f.
    shrinkage: float = 0.01  #: Of both covariances towards a multiple of the identity, in the Gaussian map.

    def prepare(self, recipe: RewardRecipe, device: torch.device) -> nn.Module:
        """Embeds all pairs, once, and fits the closed form."""
        if self.inner < 1 or self.held_out < 2:
            raise ConfigError(f"task: inner={self.inner} must be at least 1, and held_out={self.held_out} at least 2")
        self.recipe = recipe
        self.encoder = self._encoder().to(device)
        rng = np.random.default_rng([recipe.seed, 0])
        if self.pairs == "tiny":
            self.y, self.x, _ = self._drawn(self.count, "train", rng)
            self.test_y, self.test_x, self.test_prompts = self._drawn(self.held_out, "test", rng)
        else:
            y, x, prompts = self._read()
            self.y, self.x = y[: -self.held_out], x[: -self.held_out]
            self.test_y, self.test_x, self.test_prompts = y[-self.held_out :], x[-self.held_out :], prompts[-self.held_out :]
        if len(self.y) < 2:
            raise ConfigError(f"task.pairs={self.pairs}: {len(self.y)} pairs are left beside the held-out {self.held_out}")
        transport = TransportMap(self.kind, self.encoder.dim, self.hidden).to(device)
        self.game = Game(transport.fit(self.y, self.x, self.shrinkage)).to(device)
        return self.game

    def _encoder(self) -> Any:
        return load_backbone(self.backbone)

    def _drawn(self, count: int, split: str, rng: np.random.Generator) -> tuple[Tensor, Tensor, list[str]]:
        specs = [self.grammar.random_spec(rng, split) for _ in range(count)]
        prompts = [spec["prompt"] for spec in specs]
        return self._embedded((torch.from_numpy(self._draw(spec, rng)) for spec in specs), prompts)

    def _draw(self, spec: Spec, rng: np.random.Generator) -> np.ndarray:
        return render(sample_scene(spec, rng), rng)

    def _read(self) -> tuple[Tensor, Tensor, list[str]]:
        rows = load_prompts(self.pairs)
        if not all(isinstance(row.columns.get(self.column), str) for row in rows):
            raise ConfigError(f"task.pairs={self.pairs}: every line wants {self.wanted}")
        files = [Path(self.pairs).parent / row.columns[self.column] for row in rows]
        return self._embedded((self._load(file) for file in files), [row.text for row in rows])

    def _load(self, file: Path) -> Tensor:
        return load_picture(file)

    @torch.no_grad()
    def _embedded(self, images: Any, prompts: list[str]) -> tuple[Tensor, Tensor, list[str]]:
        """Unit embeddings of texts and pictures, (n, D) each."""
        device = self.encoder.mean.device
        x = torch.cat([self.encoder.pictures(image[None].to(device)) for image in images])
        return F.normalize(self.encoder.texts(prompts).float(), dim=-1), F.normalize(x.float(), dim=-1), prompts

    def batch(self, step: int) -> tuple[bool, Tensor]:
        """Whose turn it is (f's: True), and rows of the embeddings."""
        turn = self.kind != "neural" or step % (self.inner + 1) == self.inner
        return turn, torch.tensor(picks(len(self.y), self.recipe, step))

    def loss(self, batch: tuple[bool, Tensor]) -> tuple[Tensor, dict[str, float]]:
        critics_turn, rows = batch
        y, x = self.y[rows], self.x[rows]
        critic = self.game.critic
        if critics_turn:
            with torch.no_grad():
                moved = self.game.transport(y)
            loss = (critic(moved) - critic(x)).mean()
            return loss, {"critic_loss": loss.item()}
        moved = self.game.transport(y)
        frozen = {name: p.detach() for name, p in critic.named_parameters()}
        cost = (y - moved).square().sum(1)
        loss = (cost - functional_call(critic, frozen, moved)[:, 0]).mean()
        return loss, {"transport_loss": loss.item(), "cost": cost.mean().item()}

    def evaluate(self) -> dict[str, Score]:
        """Frechet distance of carried texts to pictures (and of texts as they are); mean cosine of pairs; and for two pictures of
        which one belongs to the text, how often it scores higher."""
        moved = F.normalize(self.game.transport(self.test_y), dim=-1)
        target = moments(self.test_x)
        cosines = moved @ self.test_x.T
        own = cosines.diagonal()
        other = torch.tensor([[a != b for b in self.test_prompts] for a in self.test_prompts], device=own.device)
        values = {
            "frechet": float(frechet_distance(moments(moved), target)),
            "frechet_of_texts": float(frechet_distance(moments(self.test_y), target)),
            "cosine": own.mean().item(),
            "accuracy": (own[:, None] > cosines)[other].float().mean().item(),
        }
        return {name: Score(value, len(own)) for name, value in values.items()}

    def save(self, folder: Path) -> None:
        """The map, and the encoder too where it is a folder of the user's."""
        backbone = self.backbone
        if backbone not in EMBEDDED and Path(backbone).is_dir():
            self.encoder.save(folder)
            backbone = "."
        self.game.transport.save(folder, backbone, **self._facts())

    def _facts(self) -> dict[str, Any]:
        """What reward.json says besides."""
        return {}

    def describe(self) -> str:
        source = "drawn scenes of the training prompts" if self.pairs == "tiny" else f"`{Path(self.pairs).name}`"
        closed = (
            "" if self.kind == "neural" else " The map is a closed form; the weights counted below are an opponent's, not kept."
        )
        return (
            f"Cosine of a picture and of where its text is carried among real pictures, by a map of the kind {self.kind} between"
            f" embeddings of the frozen encoder `{self.backbone}` ({self.encoder.dim} dimensions).{closed}\n\n"
            f"Fitted to {len(self.y):,} pairs from {source}; the pairing itself is not used. Held out: {len(self.test_y)} pairs."
        )
