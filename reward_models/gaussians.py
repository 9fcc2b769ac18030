"""Gaussians by their first two moments: distance and optimal map between them, in closed form, fp64.

For N(m, S) and N(m', S'):  FD = |m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2)      (Frechet, also squared Wasserstein-2)
                            T(y) = m' + A (y - m),   A = S^-1/2 (S^1/2 S' S^1/2)^1/2 S^-1/2      (Bures map)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """mean: (d,); covariance: (d, d); both fp64."""

    mean: Tensor
    covariance: Tensor


def moments(x: Tensor) -> Gaussian:
    """Mean and unbiased covariance of the rows of x (n, d). Raises ValueError for n < 2."""
    if len(x) < 2:
        raise ValueError(f"a covariance wants at least two samples, not {len(x)}")
    x = x.double()
    mean = x.mean(0)
    return Gaussian(mean, (x - mean).T @ (x - mean) / (len(x) - 1))


def mixture(old: Gaussian, new: Gaussian, share: float) -> Gaussian:
    """The moments of a population of which `share` is new."""
    apart = new.mean - old.mean
    covariance = (1 - share) * old.covariance + share * new.covariance + share * (1 - share) * torch.outer(apart, apart)
    return Gaussian(old.mean + share * apart, covariance)


def shrunk(gaussian: Gaussian, shrinkage: float) -> Gaussian:
    """S -> (1 - shrinkage) S + shrinkage tr(S)/d I: invertible even from fewer samples than dimensions."""
    S = gaussian.covariance
    eye = torch.eye(len(S), dtype=S.dtype, device=S.device)
    return Gaussian(gaussian.mean, (1 - shrinkage) * S + shrinkage * S.trace() / len(S) * eye)


def roots(S: Tensor) -> tuple[Tensor, Tensor]:
    """S^1/2 and S^-1/2 of a symmetric S (d, d); eigenvalues below 1e-12 of the largest count as that."""
    values, vectors = torch.linalg.eigh(S)
    values = values.clamp(min=float(values.max().clamp(min=1e-300)) * 1e-12).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def bures_map(S: Tensor, S_to: Tensor) -> Tensor:
    """A, symmetric, with A S A = S_to: the optimal map between centred Gaussians."""
    root, inverse = roots(S)
    return inverse @ roots(root @ S_to @ root)[0] @ inverse


def frechet_distance(a: Gaussian, b: Gaussian) -> Tensor:
    """FD, a scalar >= 0; 0 where both moments agree."""
    root = roots(a.covariance)[0]
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    return (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
