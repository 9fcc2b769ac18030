"""Several rewards in one pass, where a sample's loss is affine in its advantage: n_i + A d_i.

    g_k = grad 1/N_k sum_{k scores i} (n_i + A_ik d_i)
    sum_k u_k g_k = grad sum_i [c_i n_i + a_i d_i],    c_i = sum_{k scores i} u_k / N_k,    a_i = sum_{k scores i} u_k A_ik / N_k

with u_k = alpha_k mean |g| / |g_k| for MARBLE. DiffusionNFT's loss is affine while |A| is within its clip, so each A_k is clipped
before it is mixed. MARBLE's released code mixes with u = alpha, clips what comes out, and divides by N in place of N_k; the sum
above is the one that a full step would take (derived; checked in the tests).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl.batch import Loss, Point


def clipped(objective: Any, advantage: Tensor) -> tuple[Tensor, Tensor, float]:
    """Advantages (B, K) as the objective clips them, NaN as 0; where they are valid (B, K); and a magnitude inside the clip."""
    clip = float(getattr(objective, "advantage_clip", torch.inf))
    return advantage.nan_to_num(0.0).clamp(-clip, clip), ~advantage.isnan(), min(1.0, clip)


def mixed(objective: Any, predict: Any, point: Point, advantage: Tensor, u: Tensor, counts: Tensor, rows: int) -> Loss:
    """The loss whose mean over `rows` samples has the gradient sum_k u_k g_k.

    objective: with values (B,) affine in the advantage. advantage: (B, K), NaN where a reward abstains. u: (K,).
    counts: (K,) the samples of the update, over all processes, that each reward scores.

    d_i is taken on the side of a_i's sign: where a loss has a kink at A = 0 and is clipped by the sign of A, as GRPO's is once
    the policy has moved, the mixed advantage is clipped as one of its own would be.
    """
    A, valid, probe = clipped(objective, advantage)
    share = (u / counts.clamp(min=1)).to(A)
    c, a = (valid * share).sum(1), (A * share).sum(1)
    neutral = objective.loss(predict, point, torch.zeros_like(a))
    tilted = objective.loss(predict, point, probe * a.sign())
    if len(neutral.values) != len(a):
        raise ValueError(f"{type(objective).__name__} has no loss for each sample: use balance.refresh=1")
    d = (tilted.values - neutral.values) / probe
    values = rows * (c * neutral.values + a.abs() * d)
    per_reward = (neutral.values + A.mean(1) * a.sign() * d).detach()  # the mean of the rewards' losses, to be comparable
    return Loss(values, {**neutral.metrics, "policy_loss": per_reward}, neutral.penalty)


def output_gradients(
    objective: Any, predict: Any, point: Point, advantage: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Loss]:
    """The policy's velocity v (B, ...) with graph, and the gradients of every reward's loss at it, as sums of few.

    objective: with values affine in the advantage on either side of 0, through predict(point) alone. advantage: (B, K), NaN
    abstains. Each pair is q (B, ...) and factors (K, B): the gradient of reward k's summed loss is sum over pairs of factor x q.
    The loss is the objective's at the mean advantage's value, for its metrics and its penalty.
    """
    A, _, probe = clipped(objective, advantage)
    valid = (~advantage.isnan()).to(A)
    v = predict(point)
    zero = torch.zeros_like(A[:, 0])
    losses = [objective.loss(predict, point, zero + side) for side in (0.0, probe, -probe)]
    if len(losses[0].values) != len(zero):
        raise ValueError(f"{type(objective).__name__} has no loss for each sample: use balance.gram=exact")
    neutral, up, down = (_at(loss.values, v) for loss in losses)
    up, down = (up - neutral) / probe, (down - neutral) / probe
    size = max(float(up.abs().max()), float(down.abs().max()))
    pairs = [(neutral, valid)]
    if float((up + down).abs().max()) <= 1e-6 * size:
        pairs.append((up, A))
    else:  # clipped on one side
        pairs += [(up, A.clamp(min=0)), (down, (-A).clamp(min=0))]
    sides = [(loss.values - losses[0].values).detach() / probe for loss in losses[1:]]
    per_reward = losses[0].values.detach() + A.clamp(min=0).mean(1) * sides[0] + (-A).clamp(min=0).mean(1) * sides[1]
    loss = Loss(losses[0].values, {**losses[0].metrics, "policy_loss": per_reward}, losses[0].penalty)
    return v, [(q, factor.T) for q, factor in pairs if float(q.abs().max()) > 1e-6 * size], loss


def _at(values: Tensor, v: Tensor) -> Tensor:
    (q,) = torch.autograd.grad(values.sum(), v, retain_graph=True, allow_unused=True, materialize_grads=True)
    return q


def output_gram(pairs: list[tuple[Tensor, Tensor]], counts: Tensor) -> Tensor:
    """(K, K) fp64: products of the rewards' gradients at the denoiser's output, sample by sample, for one point.

    What the gradients' products would be, up to a factor, if no two samples shared a weight.
    """
    K = len(counts)
    total = torch.zeros(K, K, dtype=torch.float64)
    for q, factor in pairs:
        for other, other_factor in pairs:
            inner = (q.double() * other.double()).flatten(1).sum(1)
            total += ((factor.double() * inner) @ other_factor.double().T).cpu()
    share = 1 / counts.double().clamp(min=1)
    return total * share.unsqueeze(1) * share
