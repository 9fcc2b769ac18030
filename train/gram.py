"""Weights of several gradients from their K x K products alone: small problems, solved exactly, fp64 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Up to so many gradients every set of them is tried, which is exact.
EXHAUSTIVE = 10


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


def _sets(K: int) -> Tensor:
    """(2^K, K) every set of K things, as rows of 0 and 1; the empty one first."""
    return ((torch.arange(2**K).unsqueeze(1) >> torch.arange(K)) & 1).double()


def _solve_on(sets: Tensor, G: Tensor, right: Tensor) -> Tensor:
    """For each set S, the solution of G_SS x_S = right_S, 0 elsewhere. sets: (M, K). right: (K, R). Returns (M, K, R)."""
    blocks = sets.unsqueeze(2) * sets.unsqueeze(1) * G + torch.diag_embed(1 - sets)
    return torch.linalg.solve(blocks, sets.unsqueeze(2) * right)


def min_norm(G: Tensor, floor: float = 0.0, ridge: float = 1e-6) -> Tensor:
    """(K,) fp64, the alpha on the simplex, each at least floor / K, with the smallest alpha^T G alpha. G: (K, K) products.

    Up to 10 gradients exactly: the answer is the best of the stationary points of all faces that lie inside their face. Beyond
    by Frank-Wolfe, to a gap of 1e-8 of the mean square norm.
    """
    K = len(G)
    mixing = (1 - floor) * torch.eye(K, dtype=torch.float64) + floor / K  # alpha = mixing beta, with beta on the whole simplex
    H = mixing @ conditioned(G, ridge) @ mixing.T
    return mixing.T @ (_min_norm(H) if K <= EXHAUSTIVE else _frank_wolfe(H))


def _min_norm(H: Tensor) -> Tensor:
    sets = _sets(len(H))[1:]
    x = _solve_on(sets, H, torch.ones(len(H), 1, dtype=torch.float64)).squeeze(2)
    total = x.sum(1)  # 1 / |the face's point|^2
    inside = (x >= -1e-12).all(1) & (total > 0)
    best = torch.where(inside, total, -torch.inf).argmax()
    return (x[best] / total[best]).clamp(min=0)


def _frank_wolfe(H: Tensor, gap: float = 1e-8, steps: int = 100_000) -> Tensor:
    alpha = torch.full((len(H),), 1 / len(H), dtype=torch.float64)
    for _ in range(steps):
        products = H @ alpha
        k, norm = int(products.argmin()), alpha @ products
        if norm - products[k] < gap:
            break
        gamma = ((norm - products[k]) / (norm - 2 * products[k] + H[k, k])).clamp(0, 1)
        alpha = (1 - gamma) * alpha
        alpha[k] += gamma
    return alpha


def upgrad(G: Tensor, ridge: float = 1e-6) -> Tensor:
    """(K,) UPGrad, arXiv 2406.16232: the mean of the gradients, each projected on what harms none: v >= e_k."""
    H, K = conditioned(G, ridge), len(G)
    if K > EXHAUSTIVE:
        return torch.stack([_project(H, k) for k in range(K)]).mean(0)
    x = _solve_on(_sets(K), H, -H).transpose(1, 2)  # [set, k]: what the others add to e_k
    v = x + torch.eye(K, dtype=torch.float64)
    inside = (x >= -1e-12).all(2)
    best = torch.where(inside, (v @ H * v).sum(2), torch.inf).argmin(0)
    return v[best, torch.arange(K)].mean(0)


def _project(H: Tensor, k: int, sweeps: int = 1000) -> Tensor:
    """argmin of v^T H v over v >= e_k, one coordinate at a time."""
    lower = torch.zeros(len(H), dtype=torch.float64)
    lower[k] = 1
    v = lower.clone()
    for _ in range(sweeps):
        for j in range(len(H)):
            v[j] = (v[j] - (H[j] @ v) / H[j, j]).clamp(min=float(lower[j]))
    return v


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
