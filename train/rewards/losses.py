"""Losses and measures of models that learn from comparisons: plain functions of score differences.

d is a difference of scores, first minus second; label is who was preferred: 1 the first, 0 the second, 0.5 neither, or a
probability between. Losses return one value per pair (or list), fp32; the mean is the caller's, and so are weights and masks.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# ------------------------------------------------------------------------------------------------ pairs


def bradley_terry(d: Tensor, label: Tensor, margin: float | Tensor = 0.0) -> Tensor:
    """-log sigma(d - margin) where the first is preferred, mirrored where the second is; between, a cross-entropy.

    A soft label's entropy is taken off, so that the least value is 0 (PickScore's ties: 0 at d = 0, not ln 2). margin >= 0, for
    all or per pair (VideoAlign: 0.57, or scaled by how decided the label is), asks for more than the right order.
    """
    label = label.float()
    cross = -label * F.logsigmoid(d.float() - margin) - (1 - label) * F.logsigmoid(-d.float() - margin)
    return cross - torch.special.entr(label) - torch.special.entr(1 - label)


def bradley_terry_with_ties(d: Tensor, label: Tensor, k: float = 5.0) -> Tensor:
    """Rao and Kupper's model, as VideoReward (2501.13918) has it: -log of the probability of what was said, k > 1.

    P(first) = sigma(d - ln k), P(second) = sigma(-d - ln k), P(tie) = (k^2 - 1) P(first) P(second): they sum to 1. A label of 0.5
    is a tie; others count as their nearer end.
    """
    if not k > 1:
        raise ValueError(f"k={k}: must exceed 1, where ties are impossible")
    first, second = F.logsigmoid(d.float() - math.log(k)), F.logsigmoid(-d.float() - math.log(k))
    tie = first + second + math.log(k * k - 1)
    return -torch.where(label == 0.5, tie, torch.where(label > 0.5, first, second))


def triplet(positive: Tensor, negative: Tensor, margin: float = 0.3) -> Tensor:
    """Social Reward: relu(|t - i+|^2 - |t - i-|^2 + margin) of features of length 1, here from their cosines with the text."""
    return F.relu(2 * negative.float() - 2 * positive.float() + margin)


def gaussian(
    mean: Tensor, log_std: Tensor, label: Tensor, kind: Literal["expected", "expansion", "marginal"] = "expected"
) -> Tensor:
    """Bradley-Terry where each score is a Gaussian (HPSv3, 2508.03789). mean, log_std: (B, 2), of the first and the second.

    m is the difference of the means and S^2 the sum of the variances:
    expected: E[-log sigma(m + S z)], what HPSv3 estimates with 1000 draws, here by quadrature. It punishes variance.
    expansion: softplus(-m) + S^2 / 2 sigma(m) sigma(-m), its second order in S; good below S of 1.
    marginal: -log E[sigma(m + S z)], by -log sigma(m / sqrt(1 + pi S^2 / 8)): variance takes up the noise of the labels.
    """
    m = (mean[:, 0] - mean[:, 1]).float()
    variance = (2 * log_std.float()).exp().sum(1)

    def cost(m: Tensor) -> Tensor:
        if kind == "expected":
            nodes, weights = np.polynomial.hermite_e.hermegauss(24)
            z, w = (torch.as_tensor(a, dtype=m.dtype, device=m.device) for a in (nodes, weights / weights.sum()))
            return (F.softplus(-m[:, None] - variance.sqrt()[:, None] * z) * w).sum(1)
        if kind == "expansion":
            return F.softplus(-m) + variance / 2 * m.sigmoid() * (-m).sigmoid()
        return -F.logsigmoid(m / (1 + math.pi / 8 * variance).sqrt())

    label = label.float()
    return label * cost(m) + (1 - label) * cost(-m)


# ------------------------------------------------------------------------------------------------ lists


def ranked_pairs(scores: Tensor, ranks: Tensor) -> Tensor:
    """ImageReward (2304.05977): Bradley-Terry over all pairs of a list that differ in rank, mean over the list's pairs.

    scores, ranks: (L, n), rank 1 is the best, equal ranks are ties, NaN fills shorter lists. A list without an order costs 0.
    """
    better = ranks[:, :, None] < ranks[:, None, :]  # False where one is NaN
    d = (scores[:, :, None] - scores[:, None, :]).float()
    cost = torch.where(better, -F.logsigmoid(torch.where(better, d, 0)), 0)
    return cost.sum((1, 2)) / better.sum((1, 2)).clamp(min=1)


def plackett_luce(scores: Tensor, ranks: Tensor) -> Tensor:
    """-log probability that the list is drawn best first, each place by a softmax over what is left; mean over its choices.

    scores, ranks: (L, n) as in `ranked_pairs`. Ties compete with each other and with what ranks below (Breslow's rule). For two
    it is Bradley-Terry; HPSv2's cross-entropy of the best among n is its first choice.
    """
    here = ~ranks.isnan()
    left = (ranks[:, :, None] <= ranks[:, None, :]) & here[:, None, :]  # j is left when i is chosen
    logits = torch.where(left, scores.float()[:, None, :], -torch.inf)
    choice = here & ((ranks[:, :, None] < ranks[:, None, :]).any(2))  # the last place is no choice
    cost = torch.where(choice, torch.logsumexp(torch.where(choice[:, :, None], logits, 0), 2) - scores.float(), 0)
    return cost.sum(1) / choice.sum(1).clamp(min=1)


# ------------------------------------------------------------------------------------------------ measures


def wins(d: Tensor) -> Tensor:
    """1 where a difference is positive, 1/2 where it is 0, else 0; NaN stays NaN: a comparison that failed is not a lost one."""
    return ((d.sign() + 1) / 2).masked_fill(d.isnan(), math.nan)


def accuracy(d: Tensor, label: Tensor) -> float:
    """Share of the decided pairs (label not 0.5) whose preferred one scores higher; equal scores count half. NaN without any."""
    d, label = d.flatten(), label.flatten()
    decided = label != 0.5
    return float(wins(d * (label - 0.5).sign())[decided].mean()) if decided.any() else math.nan


def accuracy_within(scores: Tensor, truth: Tensor) -> tuple[float, int]:
    """Of two samples of one prompt, how often the truly better one scores higher, and of how many pairs. Both (P, n): a row is a
    prompt, so that what makes one prompt easier than another does not count."""
    better = (truth[:, :, None] - truth[:, None]).sign()
    return accuracy(scores[:, :, None] - scores[:, None], (better + 1) / 2), int((better > 0).sum())


def accuracy_with_ties(d: Tensor, label: Tensor, threshold: float | None = None) -> tuple[float, float]:
    """Share of pairs called right, where |d| <= threshold calls a tie, and the threshold: the best one unless given.

    Tie calibration (Deutsch et al. 2023, 2305.14324): as there, the threshold is chosen on the pairs that are scored.
    """
    d, said = d.flatten().double(), (label.flatten() - 0.5).sign()
    size, order = d.abs().sort()
    if threshold is None:
        tie, right = (said == 0)[order].long(), (d.sign() == said)[order].long()
        # ties below the threshold, right orders above it; the first entry is a threshold below all differences
        gained = torch.cat([tie.new_zeros(1), tie.cumsum(0)]) + right.sum() - torch.cat([right.new_zeros(1), right.cumsum(0)])
        last = torch.cat([size[1:] != size[:-1], torch.ones(1, dtype=torch.bool)])  # equal differences go together
        allowed = torch.cat([torch.ones(1, dtype=torch.bool), last])
        best = int(torch.where(allowed, gained, -1).argmax())
        threshold = float(size[best - 1]) if best else -1.0
    called = torch.where(d.abs() <= threshold, torch.zeros_like(d), d.sign())
    return float((called == said).double().mean()), threshold


def calibration_error(probability: Tensor, label: Tensor, bins: int = 10) -> float:
    """Expected calibration error: over decided pairs, |confidence - share right| in equal bins of confidence from 0.5 to 1.

    probability: that the first is preferred. NaN without a decided pair.
    """
    probability, label = probability.flatten().double(), label.flatten()
    decided = label != 0.5
    if not decided.any():
        return math.nan
    p, first = probability[decided], label[decided] > 0.5
    confidence, right = p.maximum(1 - p), ((p > 0.5) == first).double()
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = [(confidence[place == b].sum() - right[place == b].sum()).abs() for b in range(bins)]
    return float(torch.stack(gaps).sum() / len(p))


def rank_correlation(scores: Tensor, truth: Tensor) -> float:
    """Mean over lists (L, n) of Kendall's tau-b; lists in which either side is constant count as NaN and are left out."""
    from scipy.stats import kendalltau

    with np.errstate(invalid="ignore"):
        taus = [kendalltau(s, t).statistic for s, t in zip(scores.tolist(), truth.tolist(), strict=True)]
    known = [tau for tau in taus if tau == tau]
    return float(np.mean(known)) if known else math.nan
