"""Weights of several gradients from their K x K products alone: small problems, solved exactly, fp64 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gram(a: Tensor, b: Tensor | None = None) -> Tensor:
    """(K, L) fp64 on the CPU: products of the rows of a (K, P) and b (L, P; a itself by default)."""
    total = torch.zeros(len(a), len(a if b is None else b), dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], 1 << 20):
        part = a[:, start : start + (1 << 20)].double()
        total += part @ (part if b is None else b[:, start : start + (1 << 20)].double()).T
    return total.cpu()


def conditioned(G: Tensor, ridge: float) -> Tensor:
    """Symmetric, with mean diagonal 1 and `ridge` on it, so that gradients which coincide share their weight."""
    G = (G.double() + G.double().T) / 2
    return G / G.diagonal().mean().clamp(min=1e-300) + ridge * torch.eye(len(G), dtype=torch.float64)


def _nonnegative(H: Tensor, q: Tensor) -> Tensor:
    """(K,) argmin over x >= 0 of x^T H x / 2 - q^T x, by an active set: exact. H: (K, K) positive definite."""
    from scipy.optimize import nnls

    A = torch.linalg.cholesky(H).T  # |A x - b|^2 / 2 with A^T A = H and A^T b = q
    b = torch.linalg.solve_triangular(A.T, q.unsqueeze(1), upper=False).squeeze(1)
    return torch.as_tensor(nnls(A.numpy(), b.numpy())[0])


def min_norm(G: Tensor, floor: float = 0.0, ridge: float = 1e-6) -> Tensor:
    """(K,) fp64, the alpha on the simplex, each at least floor / K, with the smallest alpha^T G alpha. G: (K, K) products.

    Where it is reached, products with the gradients are one number on the support and no less elsewhere: alpha is x / sum x for
    the x >= 0 with the least x^T G x / 2 - sum x, for which that number is 1.
    """
    K = len(G)
    mixing = (1 - floor) * torch.eye(K, dtype=torch.float64) + floor / K  # alpha = mixing^T beta, beta on the whole simplex
    x = _nonnegative(conditioned(mixing @ G.double() @ mixing.T, ridge), torch.ones(K, dtype=torch.float64))
    return mixing.T @ (x / x.sum())


def upgrad(G: Tensor, ridge: float = 1e-6) -> Tensor:
    """(K,) UPGrad, arXiv 2406.16232: the mean of the gradients, each projected on what harms none.

    The projection of gradient k is v . g for the v >= e_k with the least v^T G v.
    """
    H = conditioned(G, ridge)
    return torch.stack([e + _nonnegative(H, -H @ e) for e in torch.eye(len(G), dtype=torch.float64)]).mean(0)


def pcgrad(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(K,) PCGrad, arXiv 2001.06782: each gradient loses what points against another one, in a random order; then their mean."""
    K = len(G)
    G = G.double()
    total = torch.zeros(K, dtype=torch.float64)
    for k in range(K):
        v = torch.zeros(K, dtype=torch.float64)
        v[k] = 1
        for j in torch.randperm(K, generator=generator).tolist():
            if j != k:
                v[j] -= (G[j] @ v).clamp(max=0) / G[j, j].clamp(min=1e-300)
        total += v / K
    return total


def cagrad(G: Tensor, c: float = 0.5, ridge: float = 1e-6) -> Tensor:
    """(K,) CAGrad, arXiv 2110.14048: within c |g_0| of the mean g_0, the direction with the largest smallest product.

    Its dual: w on the simplex with the least w . G 1/K + c |g_0| |g_w|; the direction is g_0 + c |g_0| g_w / |g_w|.
    """
    from scipy.optimize import minimize

    H = conditioned(G, ridge)
    mean = torch.full((len(H),), 1 / len(H), dtype=torch.float64)
    radius = c * float((mean @ H @ mean).sqrt())

    def value(w: Any) -> tuple[float, Any]:
        w = torch.as_tensor(w)
        length = (w @ H @ w).sqrt()
        return float(w @ H @ mean + radius * length), (H @ mean + radius * H @ w / length).numpy()

    simplex = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: [1.0] * len(w)}
    options = {"ftol": 1e-12, "maxiter": 500}
    found = minimize(value, mean.numpy(), jac=True, bounds=[(0, 1)] * len(H), constraints=simplex, options=options)
    w = torch.as_tensor(found.x).clamp(min=0)
    w = w / w.sum()
    return mean + radius / (w @ H @ w).sqrt() * w
