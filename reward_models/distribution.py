"""DRAGON, arXiv 2504.15217: rewards of a whole set of samples, and what each sample does to them.

A set function F of features X = {x_1 ... x_n} becomes a reward of its members by leaving one out:

    r_i = (n - 1) (F(X without i) - F(X))      for distances (lower is better): an outlier makes F worse, so r_i < 0
    r_i = V(X) - V(X without i)                for diversity (higher is better)

The functions themselves are in `set_functions`. Processes score what they sampled themselves. `better_half` is DRAGON's other
use: the half of each group that is better as a set.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.batch import Samples
from flowrl.pairs import load_picture
from flowrl.reward_models.base import RewardError, Traits
from flowrl.reward_models.features import PixelFeatures, embed, load_features, picture_files
from flowrl.reward_models.gaussians import Gaussian, frechet_distance, mixture, moments, shrunk
from flowrl.reward_models.set_functions import (
    better_half,
    frechet_influence,
    frechet_leave_one_out,
    median_distance,
    mmd,
    mmd_leave_one_out,
    polynomial,
    rbf,
    vendi_leave_one_out,
    vendi_score,
    without,
)

__all__ = [
    "MMD",
    "Frechet",
    "Vendi",
    "better_half",
    "frechet_influence",
    "frechet_leave_one_out",
    "median_distance",
    "mmd",
    "mmd_leave_one_out",
    "polynomial",
    "rbf",
    "vendi_leave_one_out",
    "vendi_score",
    "without",
]


class _SetReward:
    """Features of samples, and of what they are compared with: the samples' references, a folder of pictures, or texts."""

    def __init__(self, name: str, features: Any, references: str):
        self.name, self.features, self.references = name, load_features(features), references
        self.traits = Traits("batch", ("images", "references") if references == "samples" else ("images",))
        if Path(references).suffix in (".txt", ".jsonl") and not hasattr(self.features, "texts"):
            raise ValueError(f"{name}: references={references} are texts, and features={features} see pictures only")
        # What is missing is found before anything is drawn.
        if Path(references).suffix in (".txt", ".jsonl", ".safetensors") and not Path(references).is_file():
            raise ValueError(f"{name}: references={references}: there is no such file")
        if references != "samples" and not Path(references).is_file():
            picture_files(references)
        self._kept: Tensor | None = None

    def embedded(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Features (N, d) fp64 on the CPU, and which of them are finite, (N,)."""
        assert samples.images is not None
        x = embed(self.features, samples.images).double().cpu()
        return x, x.isfinite().all(1)

    def compared(self, samples: Samples) -> Tensor:
        """Features (M, d) fp64 of the references; those of a folder or file are computed once."""
        if self.references == "samples":
            assert samples.references is not None
            first = [int(rows[0]) for rows in samples.by_group()]  # a prompt's samples share them
            return embed(self.features, samples.references[first].flatten(0, 1)).double().cpu()
        if self._kept is None:
            device = samples.images.device  # type: ignore[union-attr]
            if Path(self.references).suffix in (".txt", ".jsonl"):
                from flowrl.data import load_prompts

                texts = self.features.to(device).texts([prompt.text for prompt in load_prompts(self.references)])
                self._kept = F.normalize(texts.float(), dim=-1).double().cpu()
            else:
                rows = [embed(self.features, load_picture(file)[None].to(device)) for file in picture_files(self.references)]
                self._kept = torch.cat(rows).double().cpu()
        return self._kept


class Frechet(_SetReward):
    """What each sample does to the Frechet distance between the batch and a reference distribution, to first order."""

    def __init__(
        self,
        #: "pixels", an embedded dual encoder, or folder or hub id of a dual encoder or a vision transformer.
        features: Any = "tiny_clip",
        #: "samples" (what the loop provides), a folder of pictures, a file of texts (dual encoders only), or a .safetensors file
        #: with `mean` (d,) and `covariance` (d, d).
        references: str | Path = "samples",
        #: Of both covariances towards a multiple of the identity; wanted wherever there are fewer samples than dimensions.
        shrinkage: float = 0.1,
        #: Of the moments of earlier batches, in [0, 1): 0 knows this batch only, 0.9 about ten of them; averaged over processes.
        decay: float = 0.0,
    ):
        if not 0 <= shrinkage <= 1 or not 0 <= decay < 1:
            raise ValueError(f"frechet: shrinkage={shrinkage} lies in [0, 1], decay={decay} in [0, 1)")
        super().__init__("frechet", features, str(references))
        self.shrinkage, self.decay = shrinkage, decay
        self.past: Gaussian | None = None

    def target(self, samples: Samples) -> Gaussian:
        """The reference distribution."""
        if Path(self.references).suffix != ".safetensors":
            return moments(self.compared(samples))
        from safetensors.torch import load_file

        stored = load_file(self.references)
        found = Gaussian(stored["mean"].double(), stored["covariance"].double())
        if found.mean.shape != (self.features.dim,):
            raise RewardError(f"reward frechet: {self.references} is of {len(found.mean)} features, not of {self.features.dim}")
        return found

    def __call__(self, samples: Samples) -> Tensor:
        x, valid = self.embedded(samples)
        scores = torch.full((len(x),), torch.nan)
        if valid.sum() < 3:
            return scores
        now, share = moments(x[valid]), 1.0
        if self.past is not None:
            share = 1 - self.decay
            now = mixture(self.past, now, share)
        scores[valid] = frechet_influence(x[valid], now, self.target(samples), self.shrinkage, share).float()
        return scores

    def update(self, samples: Samples, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Remember the batch's moments, over all processes. Metric: the distance of what is remembered to the reference."""
        if self.decay == 0:
            return {}
        x, valid = self.embedded(samples)
        n, x = valid.sum(), x[valid]
        sums = [n.double().reshape(1), x.sum(0), (x.T @ x).flatten()]  # sums average over processes, whatever their numbers
        device = samples.images.device  # type: ignore[union-attr]
        count, first, second = reduce(torch.cat(sums).to(device)).cpu().split([len(s) for s in sums])
        if count < 2:
            return {}
        mean = first / count
        fresh = Gaussian(mean, second.view(len(mean), -1) / count - torch.outer(mean, mean))
        self.past = fresh if self.past is None else mixture(self.past, fresh, 1 - self.decay)
        target = shrunk(self.target(samples), self.shrinkage)
        return {"distance": float(frechet_distance(shrunk(self.past, self.shrinkage), target))}

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.past is None else dict(self.past._asdict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.past = Gaussian(**state) if state else None


class MMD(_SetReward):
    """What each sample does to the kernel distance between the batch and reference samples: exact, unbiased, fine for small ones.

    The kernel rbf is local: a lone outlier, far from references and mates alike, scores about 0; what it sees is places with too
    many samples or too few.
    """

    def __init__(
        self,
        #: "pixels", an embedded dual encoder, or folder or hub id of a dual encoder or a vision transformer.
        features: Any = "tiny_clip",
        #: "samples" (what the loop provides), a folder of pictures, or a file of texts (dual encoders only).
        references: str | Path = "samples",
        #: rbf, or polynomial (as KID, on features of unit length scaled to that).
        kernel: Literal["polynomial", "rbf"] = "rbf",
        bandwidth: float | None = None,  #: Of rbf; unset: the median distance between references.
    ):
        if kernel not in ("polynomial", "rbf"):
            raise ValueError(f"mmd: kernel={kernel!r}: choose polynomial or rbf")
        super().__init__("mmd", features, str(references))
        self.kernel, self.bandwidth = kernel, bandwidth

    def __call__(self, samples: Samples) -> Tensor:
        x, valid = self.embedded(samples)
        scores = torch.full((len(x),), torch.nan)
        if valid.sum() < 3:
            return scores
        x, reference = x[valid], self.compared(samples)
        if self.kernel == "polynomial":
            k, scale = polynomial, float(self.features.dim) if isinstance(self.features, PixelFeatures) else 1.0
        else:
            k, scale = rbf, self.bandwidth or median_distance(reference)
        scores[valid] = mmd_leave_one_out(k(x, x, scale), k(x, reference, scale)).float()
        return scores


class Vendi:
    """Diversity: what each sample adds to the number of different samples of its prompt (Vendi score, arXiv 2210.02410).

    Values lie within about +-1; near-duplicates are negative. Samples without mates abstain.
    """

    def __init__(
        self,
        #: "pixels", an embedded dual encoder, or folder or hub id of a dual encoder or a vision transformer.
        features: Any = "tiny_clip",
    ):
        self.name, self.features, self.traits = "vendi", load_features(features), Traits("group")

    def __call__(self, samples: Samples) -> Tensor:
        assert samples.images is not None
        x = embed(self.features, samples.images).double().cpu()
        valid = x.isfinite().all(1)
        scores = torch.full((len(x),), torch.nan)
        for rows in (rows[valid[rows]] for rows in samples.by_group()):
            if len(rows) > 1:
                scores[rows] = vendi_leave_one_out(x[rows]).float()
        return scores
