"""DRAGON, arXiv 2504.15217: functions of sets of features, what each member does to them, and the better half of a set.

    FD(X)    Frechet distance to a reference, by two moments      lower is better
    MMD(X)   kernel distance to reference samples                 lower is better
    V(X)     Vendi score, how many different samples there are    higher is better (arXiv 2210.02410)

What a member does is seen by leaving it out: (n - 1) (F(X without i) - F(X)) of distances, V(X) - V(X without i) of diversity.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.reward_models.gaussians import Gaussian, bures_map, frechet_distance, moments, shrunk


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


def median_distance(x: Tensor) -> float:
    """Between different rows of x (n, d); 1 where there is none."""
    distances = torch.pdist(x.double())
    distances = distances[distances > 0]
    return float(distances.median()) if len(distances) else 1.0


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
