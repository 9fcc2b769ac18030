"""An artifact reward: a light head on frozen features, trained on a small curated set (Understanding Reward Hacking, 2601.03468).

Preference and consistency rewards all drift towards pictures with artifacts, and averaging them helps little; a detector of its
own in the mix holds them back: as a summand, or as a gate (`gate`), which a large main reward cannot buy off. The paper asks a
vision language model one yes/no question; this is the trained, differentiable form of it, which also says where (`map`), and
which of MagicMirror's kinds (`assess`).
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
from flowrl.reward_models.backbones import ClipBackbone, per_frame
from flowrl.reward_models.base import REWARD_FILE, RewardError, Traits, place_of
from flowrl.reward_models.magic_mirror import TAXONOMY, Assessment

HEAD_FILE = "head.safetensors"


def encoder(place: str | Path) -> ClipBackbone:
    """A frozen encoder by the name of an embedded one, by folder or by hub id."""
    return ClipBackbone.load(place_of(place), resize="squash")


def features(backbone: ClipBackbone, images: Tensor, layers: Sequence[int]) -> Tensor:
    """Patch features of some layers side by side: (N, 3, H, W) -> (N, M, W len(layers)), with graph.

    Layer 0 is the embedded patches, -1 the last. Small defects live in early layers: late ones have learnt to look past them.
    """
    return torch.cat([backbone.patches(images, layer) for layer in layers], dim=-1)


class ArtifactHead(nn.Module):
    """What is trained. width: channels of `features`, of `layers` layers; grid: (h, w) of the patches; kinds: K names.

    Beside the features it has two convolutions of its own on the pixels: what a frozen encoder has learnt to look past, fine
    texture and bleeding colours, is what reward hacking finds first.
    Each patch sees its neighbours up to two patches away and says whether it is damaged. The picture's logit is the smooth
    maximum of theirs, so that few labels teach much. The kinds of damage are read off all of them.
    """

    def __init__(self, width: int, layers: int, grid: tuple[int, int], kinds: Sequence[str], hidden: int = 96):
        super().__init__()
        self.grid, self.layers, self.kinds = tuple(grid), layers, tuple(kinds)
        self.scale = nn.Parameter(torch.ones(width))
        self.into = nn.Linear(width, hidden)
        self.fine = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.GELU(), nn.Conv2d(32, hidden, 3, 2, 1), nn.GELU())
        self.around = nn.ModuleList(nn.Conv2d(hidden, hidden, 3, padding=1) for _ in range(2))
        self.where = nn.Linear(hidden, 1)
        self.gain, self.offset = nn.Parameter(torch.ones(())), nn.Parameter(torch.tensor(-math.log(grid[0] * grid[1])))
        self.what = nn.Linear(2 * hidden, len(self.kinds))

    def forward(self, states: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """states: (N, M, W); pixels: (N, 3, H, W), normalised as the encoder takes them. Logits of an artifact (N,), of the kinds
        (N, K), and of damage on the grid (N, h, w)."""
        each = states.float().unflatten(-1, (self.layers, -1))
        normed = F.layer_norm(each, each.shape[-1:]).flatten(-2) * self.scale
        h = F.gelu(self.into(normed)).transpose(1, 2).unflatten(-1, self.grid)
        h = h + F.adaptive_max_pool2d(self.fine(pixels), self.grid)
        for around in self.around:
            h = h + F.gelu(around(h))
        h = h.flatten(2).transpose(1, 2)
        where = self.where(h)[..., 0]
        damaged = self.gain * where.logsumexp(1) + self.offset
        return damaged, self.what(torch.cat([h.amax(1), h.mean(1)], -1)), where.unflatten(-1, self.grid)

    def save(self, folder: str | Path, backbone: str, layers: Sequence[int], **facts: Any) -> None:
        """A folder that load_reward reads. backbone: name or hub id of the encoder, or "." when it lies beside the head."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach().half().contiguous() for name, value in self.state_dict().items()}, folder / HEAD_FILE)
        card: dict[str, Any] = {
            "reward": "artifact",
            "options": {},
            "backbone": backbone,
            "layers": list(layers),
            "kinds": list(self.kinds),
        }
        card |= {"hidden": self.into.out_features, **facts}
        (folder / REWARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


class ArtifactDetector:
    """Probability that a picture has no artifact, in [0, 1]. Reads no prompt. Clips: their worst frame."""

    name = "artifact"
    traits = Traits(range=(0.0, 1.0), differentiable=True, licence="of the weights: see the model card")

    def __init__(
        self,
        folder: str | Path = "tiny_artifact",  #: What `flowrl train-reward tiny-artifact` wrote; the one that ships by default.
        threshold: float = 0.5,  #: Probability above which `assess` names a kind of artifact; the score does not ask.
    ):
        from safetensors.torch import load_file

        self.folder, self.threshold = Path(place_of(folder)), threshold
        try:
            card = json.loads((self.folder / REWARD_FILE).read_text(encoding="utf-8"))
            self.backbone = encoder(self.folder if card["backbone"] == "." else card["backbone"])
            weights = load_file(self.folder / HEAD_FILE)
            self.layers = tuple(card["layers"])
            width = weights["into.weight"].shape[1]
            self.head = ArtifactHead(width, len(self.layers), self.backbone.grid, card["kinds"], card["hidden"])
            self.head.load_state_dict(weights)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"{folder} holds no artifact detector: {' '.join(str(error).split())}") from None
        self.head.float().requires_grad_(False).eval()

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of pictures (N, 3, H, W): an artifact (N,), the kinds (N, K), damage on the grid (N, h, w); with graph."""
        self.head.to(images.device)
        return self.head(features(self.backbone, images, self.layers), self.backbone.pixels(images))

    def __call__(self, samples: Samples) -> Tensor:
        clean = per_frame(lambda images: torch.sigmoid(-self.logits(images)[0]), self._images(samples))
        return clean if clean.ndim == 1 else clean.amin(1)

    def kinds(self, samples: Samples) -> dict[str, Tensor]:
        """Probability of each kind of artifact, (N,) each; of clips, in their worst frame."""
        found = per_frame(lambda images: torch.sigmoid(self.logits(images)[1]), self._images(samples))
        values = found if found.ndim == 2 else found.amax(1)
        return dict(zip(self.head.kinds, values.unbind(1), strict=True))

    def map(self, samples: Samples) -> Tensor:
        """Where the picture is sound, (N, h, w) in [0, 1] on the encoder's grid of patches. Clips: (N, F, h, w)."""
        return per_frame(lambda images: torch.sigmoid(-self.logits(images)[2]), self._images(samples))

    def assess(self, samples: Samples) -> list[Assessment]:
        """MagicMirror's first two levels, for `magic_mirror.report`: nothing where the picture is more likely clean than not."""
        with torch.no_grad():
            clean, kinds = self(samples), self.kinds(samples)
        found = []
        for i in range(len(samples)):
            likely = {name: float(values[i]) for name, values in kinds.items()}
            names = [name for name, value in likely.items() if value > self.threshold] or [max(likely, key=lambda k: likely[k])]
            found.append(Assessment() if clean[i] > 0.5 else Assessment.of(*names))
        return found

    def _images(self, samples: Samples) -> Tensor:
        if samples.images is None:
            raise RewardError(f"reward {self.name!r} scores decoded pictures")
        return samples.images


#: Kinds in the order of the taxonomy, of those that the embedded world can show.
TINY_KINDS = tuple(kind for kind in TAXONOMY if kind not in ("human", "animal"))
