"""DRAGON, arXiv 2504.15217: rewards of a whole set of samples, and what each sample does to them.

A set function F of features X = {x_1 ... x_n} becomes a reward of its members by leaving one out:

    r_i = (n - 1) (F(X without i) - F(X))      for distances (lower is better): an outlier makes F worse, so r_i < 0
    r_i = V(X) - V(X without i)                for diversity (higher is better)

Processes score what they sampled themselves. `better_half` is DRAGON's other use: the half of each group that is better as a set.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.batch import Samples
from flowrl.pairs import load_picture
from flowrl.reward_models.base import RewardError, Traits
from flowrl.reward_models.features import PixelFeatures, embed, load_features, picture_files
from flowrl.reward_models.gaussians import Gaussian, bures_map, frechet_distance, mixture, moments, shrunk

# ------------------------------------------------------------------------------------------------ set functions


def frechet_influence(x: Tensor, now: Gaussian, reference: Gaussian, shrinkage: float = 0.0, share: float = 1.0) -> Tensor:
    """(n - 1) (FD(without i) - FD) of the rows of x (n, d), to first order; (n,) fp64. One eigendecomposition for all of them.

    now: moments of the population that x is `share` of (1: x is all of it). Both covariances are shrunk alike. With
    A the Bures map and G = I - A,  d FD = 2 (m - m_ref)^T dm + tr(G dS).
    """
    d = x.shape[1]
    A = bures_map(shrunk(now, shrinkage).covariance, shrunk(reference, shrinkage).covariance)
    G = torch.eye(d, dtype=A.dtype, device=A.device) - A
    G = (1 - shrinkage) * G + shrinkage * G.trace() / d * torch.eye(d, dtype=A.dtype, device=A.device)
    delta = x.double() - now.mean
    influence = 2 * delta @ (now.mean - reference.mean) + ((delta @ G) * delta).sum(1)
    return share * (influence.mean() - influence)


def frechet_leave_one_out(x: Tensor, reference: Gaussian, shrinkage: float = 0.0) -> Tensor:
    """The same exactly, (n,) fp64: n eigendecompositions, on moments from which one row is taken back. Wants n >= 3."""
    n, x = len(x), x.double()
    whole, target = moments(x), shrunk(reference, shrinkage)
    base = frechet_distance(shrunk(whole, shrinkage), target)
    return torch.stack([(n - 1) * (frechet_distance(shrunk(without(whole, row, n), shrinkage), target) - base) for row in x])


def without(whole: Gaussian, row: Tensor, n: int) -> Gaussian:
    """Moments of n rows without one of them (d,)."""
    delta = row.double() - whole.mean
    covariance = ((n - 1) * whole.covariance - n / (n - 1) * torch.outer(delta, delta)) / (n - 2)
    return Gaussian(whole.mean - delta / (n - 1), covariance)


def polynomial(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """(a b^T / scale + 1)^3, (n, m); scale = d is the kernel of KID."""
    return (a @ b.T / scale + 1) ** 3


def rbf(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """exp(-|a - b|^2 / (2 scale^2)), (n, m)."""
    return torch.exp(-torch.cdist(a, b).square() / (2 * scale**2))


def mmd(xx: Tensor, xr: Tensor, rr: Tensor) -> Tensor:
    """Unbiased squared MMD from the kernels within x (n, n), between x and reference (n, m), and within the reference (m, m)."""
    n, m = xr.shape
    within = (xx.sum() - xx.trace()) / (n * (n - 1))
    return within + (rr.sum() - rr.trace()) / (m * (m - 1)) - 2 * xr.mean()


def mmd_leave_one_out(xx: Tensor, xr: Tensor) -> Tensor:
    """(n - 1) (MMD^2(without i) - MMD^2), exactly, (n,): near the reference is good, near one's mates is not. Wants n >= 3."""
    n = len(xx)
    mates = (xx.sum(1) - xx.diagonal()) / (n - 1)
    near = xr.mean(1)
    return 2 * (near - near.mean()) - 2 * (mates - mates.mean()) * (n - 1) / (n - 2)


def vendi_score(K: Tensor) -> Tensor:
    """exp(entropy of the eigenvalues of K / n): how many different samples there are, in [1, n]. K: (..., n, n), diagonal 1."""
    values = torch.linalg.eigvalsh(K.double() / K.shape[-1]).clamp(min=0)
    return torch.special.entr(values).sum(-1).exp()


def vendi_leave_one_out(x: Tensor) -> Tensor:
    """V(X) - V(X without i) of the cosine kernel, (n,) fp64: negative for near-duplicates. x: (n, d), n >= 2."""
    x = F.normalize(x.double(), dim=-1)
    K, n = x @ x.T, len(x)
    others = torch.tensor([[j for j in range(n) if j != i] for i in range(n)], device=x.device)
    return vendi_score(K) - vendi_score(K[others[:, :, None], others[:, None, :]])


def better_half(
    x: Tensor, group: Tensor, distance: Callable[[Tensor], Tensor], start: Tensor | None = None, sweeps: int = 2
) -> Tensor:
    """DRAGON's D+: a mask (n,) of half of every group (the smaller half of odd ones), such that distance(x[mask]) is small.

    Greedy: wherever exchanging a member of D+ for one of its group's D- lowers the distance, they change places. x: (n, d);
    group: (n,) int64; start: (n,) scores, whose best are D+ at first; rows of x that are not finite are in neither half
    (`x.isfinite().all(1) & ~mask` is D-). distance: of a set of rows, lower is better.
    """
    valid = x.isfinite().all(1)
    first = torch.zeros(len(x)) if start is None else start.cpu()
    members = [rows[valid[rows]] for rows in ((group == g).nonzero()[:, 0] for g in group.unique())]
    ranked = [rows[first[rows.cpu()].argsort(descending=True, stable=True).to(rows.device)] for rows in members]
    plus = [rows[: len(rows) // 2].tolist() for rows in ranked]
    minus = [rows[len(rows) // 2 :].tolist() for rows in ranked]

    def value() -> float:
        return float(distance(x[list(chain.from_iterable(plus))]))

    best = value() if any(plus) else 0.0
    for _ in range(sweeps):
        before = best
        for good, bad in zip(plus, minus, strict=True):
            for i in range(len(good)):
                for j in range(len(bad)):
                    good[i], bad[j] = bad[j], good[i]
                    if (now := value()) < best:
                        best = now
                    else:
                        good[i], bad[j] = bad[j], good[i]
        if best == before:
            break
    mask = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    mask[list(chain.from_iterable(plus))] = True
    return mask


# ------------------------------------------------------------------------------------------------ rewards


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


def median_distance(x: Tensor) -> float:
    """Between different rows of x (n, d); 1 where there is none."""
    distances = torch.pdist(x.double())
    distances = distances[distances > 0]
    return float(distances.median()) if len(distances) else 1.0


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
