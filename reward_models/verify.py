"""Exact verifiers: rewards that read a picture back and compare it with what its prompt says."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.base import RewardError, Traits


class TinyVerifier:
    """Did the picture of coloured shapes follow its caption? For the embedded world (`flowrl.tiny`).

    strict: 1 when objects, colours, counts and relation are all right, else 0. dense: partial credit in [0, 1]. Both abstain
    (NaN) where the prompt carries no scene description (`kind`, `include` columns of the embedded prompt sets). clean: 1 when
    every component of the picture is a known shape, whatever the caption says, else 0: an artifact measure that is not learnt.
    """

    def __init__(self, mode: str = "strict"):
        if mode not in ("strict", "dense", "clean"):
            raise ValueError(f"mode={mode!r}: choose strict, dense or clean")
        self.mode, self.name = mode, f"tiny_{mode}"
        self.traits = Traits(columns=() if mode == "clean" else ("include",), range=(0.0, 1.0))

    def __call__(self, samples: Samples) -> Tensor:
        from flowrl.tiny import verify
        from flowrl.tiny.corrupt import unknown

        if samples.images is None or samples.images.ndim != 4:
            raise RewardError(f"reward {self.name!r} scores pictures (N, 3, H, W)")
        if self.mode == "clean":
            return torch.from_numpy(~unknown(samples.images)).float()
        scores = torch.full((len(samples),), torch.nan)
        known = [i for i, prompt in enumerate(samples.prompts) if "include" in prompt.columns]
        if known:
            specs = [{"prompt": samples.prompts[i].text, **samples.prompts[i].columns} for i in known]
            strict, dense = verify(samples.images[known].cpu(), specs)
            scores[known] = (strict if self.mode == "strict" else dense).float()
        return scores
