"""Entropic optimal transport in the log domain, batched. Plain tensor functions; plans carry no gradient.

    P = argmin <C, P> + epsilon sum P (log P - 1)     subject to
        balanced     P 1 = a, P^T 1 = b
        unbalanced   no constraint, but + rho KL(P 1 | a) + rho KL(P^T 1 | b)
        partial      P 1 <= a, P^T 1 <= b, sum P = mass

cost: (B, N, M); a: (B, N) and b: (B, M) >= 0: rows and columns of weight 0 (padded words) get nothing. epsilon in units of the
cost. All return (B, N, M) in the cost's dtype. More iterations than needed do no harm; ranges of the cost much beyond 100 epsilon
want many. The oracles of the tests are those of POT: `sinkhorn`, `sinkhorn_unbalanced` (reg_type="entropy"),
`entropic_partial_wasserstein`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(mask: Tensor) -> Tensor:
    """Equal weights that add up to 1 over the true places of a mask (B, N); all 0 where there are none."""
    weights = mask.float()
    return weights / weights.sum(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def balanced(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, iterations: int = 200) -> Tensor:
    """Every row gives a, every column takes b; both must have the same sum."""
    return _scaled(cost, a, b, epsilon, iterations, tau=1.0)


@torch.no_grad()
def unbalanced(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, m: float, iterations: int = 200) -> Tensor:
    """PISCES, arXiv 2602.01624, algorithm 3: rho = epsilon m / (1 - m), whose exponent rho / (rho + epsilon) is m itself.

    m in (0, 1) says how strictly the weights are kept, not which mass is moved: that comes out, and exceeds 1 where costs are
    low. For a given mass see `partial`.
    """
    if not 0 < m < 1:
        raise ValueError(f"m={m} must lie between 0 and 1")
    return _scaled(cost, a, b, epsilon, iterations, tau=m)


@torch.no_grad()
def partial(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, mass: float, iterations: int = 200) -> Tensor:
    """Exactly `mass` is moved, wherever it is cheapest. mass in (0, min(sum a, sum b)].

    Dykstra's projections, as ascent in the dual: the multipliers f, g of the inequalities cannot be positive, h is free.
    """
    if not 0 < mass <= 1 + 1e-6:
        raise ValueError(f"mass={mass} must lie in (0, 1]")
    S, log_a, log_b = -cost / epsilon, a.to(cost).log(), b.to(cost).log()
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
    h = cost.new_zeros(len(cost), 1)
    log_mass = torch.tensor(mass, dtype=cost.dtype).log().item()
    for _ in range(iterations):
        f = (log_a - h - torch.logsumexp(S + g[:, None], 2)).clamp(max=0)
        g = (log_b - h - torch.logsumexp(S + f[:, :, None], 1)).clamp(max=0)
        h = log_mass - torch.logsumexp((S + f[:, :, None] + g[:, None]).flatten(1), 1, keepdim=True)
    return (S + f[:, :, None] + g[:, None] + h[:, :, None]).exp()


def _scaled(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, iterations: int, tau: float) -> Tensor:
    """Sinkhorn's u <- (a / K v)^tau, v <- (b / K^T u)^tau."""
    S, log_a, log_b = -cost / epsilon, a.to(cost).log(), b.to(cost).log()
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
    for _ in range(iterations):
        f = tau * (log_a - torch.logsumexp(S + g[:, None], 2))
        g = tau * (log_b - torch.logsumexp(S + f[:, :, None], 1))
    return (S + f[:, :, None] + g[:, None]).exp()
