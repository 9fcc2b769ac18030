"""The network of our own models of preference: a dual encoder, a head on its two features, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl.reward_models.backbones import ClipBackbone, cosine
from flowrl.reward_models.base import REWARD_FILE

Head = Literal["cos", "linear", "gaussian"]


class PreferenceNetwork(nn.Module):
    """A dual encoder and a head on its two normalised features i, t (N, D): what `flowrl train-reward preference` trains.

    cos: exp(scale) cos(i, t). linear: an MLP on [i, t, i * t] to one number. gaussian: the same to a mean and the logarithm of a
    standard deviation. The last layer starts at 0, so that an MLP head starts indifferent (with standard deviation 1).
    """

    def __init__(self, backbone: ClipBackbone, head: Head = "cos", hidden: int = 256):
        super().__init__()
        if head not in ("cos", "linear", "gaussian"):
            raise ValueError(f"head={head!r}: choose cos, linear or gaussian")
        self.backbone, self.head, self.hidden = backbone, head, hidden
        self.mlp: nn.Module = nn.Identity()
        if head != "cos":
            last = nn.Linear(hidden, 2 if head == "gaussian" else 1)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.mlp = nn.Sequential(nn.Linear(3 * backbone.dim, hidden), nn.GELU(), last)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images: (N, 3, H, W) in [0, 1]. (N,) scores, or (N, 2) mean and log standard deviation of the gaussian head."""
        return self.compare(self.backbone.pictures(images), self.backbone.texts(prompts))

    def compare(self, pictures: Tensor, texts: Tensor) -> Tensor:
        """The head on features (N, D) as the encoder gives them."""
        if self.head == "cos":
            return self.backbone.logit_scale * cosine(pictures, texts)
        i, t = F.normalize(pictures, dim=-1), F.normalize(texts, dim=-1)
        values = self.mlp(torch.cat([i, t, i * t], dim=-1))
        return values if self.head == "gaussian" else values[:, 0]

    def save(self, folder: str | Path, options: dict[str, Any] | None = None, **facts: Any) -> None:
        """A folder that `load` and load_reward read. options: of `PreferenceModel`; facts: for the card, stored beside them."""
        from safetensors.torch import save_file

        folder = Path(folder)
        self.backbone.save(folder)
        save_file(
            {name: value.detach().contiguous() for name, value in self.mlp.state_dict().items()}, folder / "head.safetensors"
        )
        card = {"reward": "preference", "options": options or {}, "head": self.head, "hidden": self.hidden}
        card |= {"resize": self.backbone.resize, **facts}
        (folder / REWARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> PreferenceNetwork:
        """What `save` wrote, frozen. Raises ValueError when the folder holds something else."""
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            card = json.loads((folder / REWARD_FILE).read_text(encoding="utf-8"))
            network = cls(ClipBackbone.load(folder, card["resize"]), card["head"], card["hidden"])
            network.mlp.load_state_dict(load_file(folder / "head.safetensors"))
        except (OSError, KeyError, RuntimeError) as error:
            raise ValueError(f"{folder} holds no preference model: {' '.join(str(error).split())}") from None
        return network.requires_grad_(False).eval()
