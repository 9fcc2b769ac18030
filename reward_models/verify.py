"""Exact verifiers of the embedded world (`flowrl.tiny`): they read a picture back and compare it with what its prompt says."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.base import Traits
from flowrl.reward_models.detectors import pictures_of

_TRAITS = Traits(columns=("include",), range=(0.0, 1.0))


class TinyStrict:
    """1 when the picture of coloured shapes shows what its caption says, all of it: objects, colours, counts, relation; else 0.

    Abstains (NaN) where the prompt carries no scene description (`kind`, `include` columns of the embedded prompt sets).
    """

    name, traits = "tiny_strict", _TRAITS

    def __call__(self, samples: Samples) -> Tensor:
        return read_back(samples, self.name)[0]


class TinyDense:
    """How much of its caption the picture of coloured shapes shows, in [0, 1]: partial credit, 1 where `tiny_strict` is 1.

    Abstains (NaN) where the prompt carries no scene description (`kind`, `include` columns of the embedded prompt sets).
    """

    name, traits = "tiny_dense", _TRAITS

    def __call__(self, samples: Samples) -> Tensor:
        return read_back(samples, self.name)[1]


class TinyClean:
    """1 when every component of the picture is a known shape, whatever its caption says; else 0: artifacts, read off exactly."""

    name = "tiny_clean"
    traits = Traits(range=(0.0, 1.0))

    def __call__(self, samples: Samples) -> Tensor:
        from flowrl.tiny.corrupt import unknown

        return torch.from_numpy(~unknown(pictures_of(samples, self.name))).float()


def read_back(samples: Samples, name: str) -> tuple[Tensor, Tensor]:
    """All or nothing, and partial credit, (N,) each; NaN where the prompt carries no scene description."""
    from flowrl.tiny import verify

    images = pictures_of(samples, name)
    strict, dense = torch.full((2, len(samples)), torch.nan)
    known = [i for i, prompt in enumerate(samples.prompts) if "include" in prompt.columns]
    if known:
        specs = [{"prompt": samples.prompts[i].text, **samples.prompts[i].columns} for i in known]
        found = verify(images[known].cpu(), specs)
        strict[known], dense[known] = (values.float() for values in found)
    return strict, dense
