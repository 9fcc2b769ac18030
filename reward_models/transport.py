"""PISCES, arXiv 2602.01624: rewards of optimal transport between texts and pictures.

    Transport       R_q = cos(T(y), x)                        y, x: text and picture embedding; T carries texts onto real pictures
    TokenTransport  R_s = sum_ij P_ij S_ij / sum_ij P_ij      S_ij: cosine of word i and patch j; P: a plan between them

An encoder keeps texts and pictures in different parts of its space, so that a plain cosine also rewards pictures for being
unlike pictures. T takes the gap away. `flowrl train-reward` makes the folder that holds it (task: transport).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl.batch import Samples
from flowrl.reward_models.backbones import Frames, check_frames, cosine, score_pictures
from flowrl.reward_models.base import REWARD_FILE, Traits, place_of
from flowrl.reward_models.features import load_backbone
from flowrl.reward_models.gaussians import bures_map, moments, shrunk
from flowrl.reward_models.sinkhorn import balanced, partial, unbalanced, uniform

MAP_FILE = "map.safetensors"
Kind = Literal["mean_shift", "gaussian", "neural"]


def network(width: int, hidden: int, out: int) -> nn.Sequential:
    """The paper's three layers with ReLU and LayerNorm; the last one starts at 0."""
    last = nn.Linear(hidden, out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    first = nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU()
    return nn.Sequential(*first, nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU(), last)


class TransportMap(nn.Module):
    """T: (N, D) -> (N, D), fp32. Closed forms are G(y) = m_x + A (y - m_y); a neural map is G(y) + MLP(G(y)).

    mean_shift: A = 1, which removes the modality gap and nothing else. gaussian: A is the Bures map between the covariances.
    neural: G is the gaussian map, and the MLP, 0 at first, is trained (`flowrl.train.rewards.transport`).
    """

    def __init__(self, kind: Kind, dim: int, hidden: int = 256):
        super().__init__()
        if kind not in ("mean_shift", "gaussian", "neural"):
            raise ValueError(f"kind={kind!r}: choose mean_shift, gaussian or neural")
        self.kind, self.dim, self.hidden = kind, dim, hidden
        self.source: Tensor
        self.target: Tensor
        self.matrix: Tensor
        self.register_buffer("source", torch.zeros(dim))
        self.register_buffer("target", torch.zeros(dim))
        self.register_buffer("matrix", torch.eye(dim))
        self.residual = network(dim, hidden, dim) if kind == "neural" else None

    def fit(self, y: Tensor, x: Tensor, shrinkage: float = 0.01) -> TransportMap:
        """The closed form from samples y (n, D) and x (m, D), which need not be pairs. Both covariances are shrunk alike."""
        from_y, to_x = (shrunk(moments(rows), shrinkage) for rows in (y, x))
        self.source.copy_(from_y.mean)
        self.target.copy_(to_x.mean)
        if self.kind != "mean_shift":
            self.matrix.copy_(bures_map(from_y.covariance, to_x.covariance))
        return self

    def forward(self, y: Tensor) -> Tensor:
        moved = self.target + (y.float() - self.source) @ self.matrix
        return moved if self.residual is None else moved + self.residual(moved)

    def save(self, folder: str | Path, backbone: str, **facts: Any) -> None:
        """A folder that load_reward reads. backbone: the encoder's name, place, or "." where it lies in the folder itself."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}, folder / MAP_FILE)
        card = {"reward": "transport", "options": {}, "kind": self.kind, "dim": self.dim, "hidden": self.hidden}
        (folder / REWARD_FILE).write_text(json.dumps({**card, "backbone": backbone, **facts}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, encoder: Callable[[Any], Any] = load_backbone) -> tuple[TransportMap, Any]:
        """What `save` wrote, frozen, and what `encoder` makes of its encoder's place. Raises ValueError for something else.

        folder: or the name of one that ships.
        """
        from safetensors.torch import load_file

        folder = Path(place_of(folder))
        try:
            card = json.loads((folder / REWARD_FILE).read_text(encoding="utf-8"))
            transport = cls(card["kind"], card["dim"], card["hidden"])
            transport.load_state_dict(load_file(folder / MAP_FILE))
            backbone = card["backbone"]
        except (OSError, KeyError, RuntimeError) as error:
            raise ValueError(f"{folder} holds no transport map: {' '.join(str(error).split())}") from None
        return transport.requires_grad_(False).eval(), encoder(folder if backbone == "." else backbone)


class Transport:
    """How near a picture is to where its text is carried among real pictures, in [-1, 1]. Differentiable. Clips by frame."""

    def __init__(
        self,
        #: What `flowrl train-reward tiny-transport`, or another recipe of the task, wrote; the one that ships by default.
        folder: str | Path = "tiny_transport",
        frames: Frames = "mean",  #: How a clip's frames count: mean, min (the worst one), or softmin (mostly the worst ones).
    ):
        self.map, self.backbone = TransportMap.load(folder)
        self.name, self.frames = "transport", check_frames(frames)
        self.traits = Traits(range=(-1, 1), differentiable=True, licence="see the card of its encoder")

    def __call__(self, samples: Samples) -> Tensor:
        return score_pictures(self.values, samples, self.frames)

    def values(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images: (N, 3, H, W); returns (N,) with graph."""
        x = self.backbone.pictures(images)
        y = F.normalize(self.backbone.texts(prompts).float(), dim=-1)
        return cosine(self.map.to(x.device)(y), x)


# ------------------------------------------------------------------------------------------------ words and patches


def token_cost(S: Tensor, mask: Tensor, *priors: tuple[float, Tensor]) -> Tensor:
    """C = [1 - S] + sum weight prior; each term and the sum scaled to [0, 1] in a sample. S, priors: (B, N, M); mask: (B, N)."""
    C = _ranged(1 - S, mask)
    if not priors:
        return C
    return _ranged(C + sum(weight * _ranged(prior, mask) for weight, prior in priors), mask)


def _ranged(x: Tensor, mask: Tensor) -> Tensor:
    words = mask[:, :, None]
    low = x.masked_fill(~words, torch.inf).amin((1, 2), keepdim=True)
    high = x.masked_fill(~words, -torch.inf).amax((1, 2), keepdim=True)
    return ((x - low) / (high - low).clamp(min=1e-8)).masked_fill(~words, 1.0)


@torch.no_grad()
def token_plan(
    S: Tensor,
    mask: Tensor,
    places: Tensor,
    mass: float = 0.9,
    eta: float = 0.2,
    epsilon: float = 0.05,
    published: bool = False,
    times: Tensor | None = None,
    gamma: float = 0.0,
) -> Tensor:
    """A plan (B, N, M) between words and patches, whose row sums say how much of each word found a place.

    S: (B, N, M) cosines; mask: (B, N), true for words; places: (M, 2) centres of the patches in [0, 1]; times: (M,) of their
    frames, likewise. With eta or gamma above 0 a first plan says where, or when, each word looks, and the second one charges for
    the distance from there. mass: what is moved, of 1; the rest of the words, those that fit nowhere, are let go. published: the
    paper's scheme, in which it is an exponent (`unbalanced`).
    """

    def solve(C: Tensor) -> Tensor:
        if mass == 1:
            return balanced(C, a, b, epsilon)
        return (unbalanced if published else partial)(C, a, b, epsilon, mass)

    S = S.detach().float()
    a, b = uniform(mask), uniform(torch.ones_like(S[:, 0], dtype=torch.bool))
    plan = solve(token_cost(S, mask))
    share = plan / plan.sum(2, keepdim=True).clamp(min=1e-12)
    priors = []
    if times is not None and gamma:
        priors.append((gamma, ((share @ times)[..., None] - times).abs()))  # |tau_i - t_j|
    if eta:
        priors.append((eta, torch.cdist(share @ places, places.expand(len(S), -1, -1))))  # |pi_i - s_j|
    return solve(token_cost(S, mask, *priors)) if priors else plan


class TokenTransport:
    """How well the words that found a place among the patches fit there, in [-1, 1]. Differentiable, but not through the plan.

    Clips are scored frame by frame; `video_token_transport` takes them whole. A prompt without a word abstains.
    """

    def __init__(
        self,
        backbone: str | Path = "tiny_clip",  #: A dual encoder: an embedded one, a folder or a hub id.
        mass: float = 0.9,  #: How much of the words is moved, of 1; the rest, those that fit nowhere, are let go.
        #: What distance costs in a second plan, from the place where the first one found each word; 0 for one plan.
        eta: float = 0.2,
        epsilon: float = 0.05,  #: Weight of the plan's entropy: the larger, the more places share a word.
        published: bool = False,  #: The paper's scheme, in which `mass` is an exponent and not the mass moved.
        frames: Frames = "mean",  #: How a clip's frames count: mean, min (the worst one), or softmin (mostly the worst ones).
    ):
        if not 0 < mass <= 1 or (published and mass == 1) or eta < 0 or epsilon <= 0:
            raise ValueError(f"token_transport: mass={mass} lies in (0, 1], eta={eta} >= 0, epsilon={epsilon} > 0")
        self.backbone = load_backbone(backbone)
        self.options: dict[str, Any] = {"mass": mass, "eta": eta, "epsilon": epsilon, "published": published}
        self.name, self.frames = "token_transport", check_frames(frames)
        self.traits = Traits(range=(-1, 1), differentiable=True, licence="see the card of its encoder")

    def __call__(self, samples: Samples) -> Tensor:
        return score_pictures(self.values, samples, self.frames)

    def values(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images: (N, 3, H, W); returns (N,) with graph, NaN where the prompt has no word."""
        S, mask = self.similarities(images, prompts)
        P = token_plan(S, mask, places(*self.backbone.grid).to(S), **self.options)
        score = (P * S.masked_fill(~mask[:, :, None], 0.0)).sum((1, 2)) / P.sum((1, 2))
        return torch.where(mask.any(1), score, torch.nan)

    def similarities(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Cosines of words and patches (N, L, M), and which of the L places are words."""
        patches = F.normalize(self.backbone.shared(self.backbone.patches(images), "patches").float(), dim=-1)
        states, mask = self.backbone.words(prompts)
        words = F.normalize(self.backbone.shared(states, "words").float(), dim=-1)
        return words @ patches.transpose(1, 2), mask


def places(height: int, width: int) -> Tensor:
    """Centres of a grid's cells, row by row, (h w, 2) as (y, x) in [0, 1]."""
    y, x = ((torch.arange(n) + 0.5) / n for n in (height, width))
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)
