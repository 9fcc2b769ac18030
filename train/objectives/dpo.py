"""Diffusion-DPO, arXiv 2311.12908, eq. 14, in velocities (Flow-DPO, arXiv 2501.13918): from pairs, against a reference.

    D = w(t) [(m_w - m_w,ref) - (m_l - m_l,ref)],    m = mean (v - (noise - x0))^2,    the same t and noise for both
    L = -log sigmoid(-beta / 2 D)

With weighting eps, w(t) m is the error of the noise: Diffusion-DPO itself, with a mean where the paper has a sum, as in its code
and all others. Some leave out the half: their beta is half of this one. Flow-DPO's w is constant; its beta is not published.
Linear-DPO (arXiv 2605.21123) is loss_type linear with reference_weights=ema. The winner's error may rise along with the loser's
(`change_winner`). Diffusion-SDPO (arXiv 2511.03317) slows the loser's gradient g_l so that, to first order, it does not:

    lambda = min(1, (1 - mu) |g_w|^2 / <g_w, g_l>)  where <g_w, g_l> > 0, else 1;    g is proportional to v - target (derived)

The released code has one lambda for a batch; here every pair has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowrl.batch import Loss, Noised, Samples
from flowrl.train.objectives.base import Needs, Predict, check_choice, check_positive, error
from flowrl.train.objectives.preference import WEIGHTINGS, best_and_worst, implicit_accuracy, pair_loss


@dataclass(frozen=True)
class DPO:
    """Options of DPO: of data, its pairs; of the policy's own samples, the best and the worst of each group."""

    #: At a margin of 6 / beta a pair stops to teach: larger holds closer to the reference. Published: 2000 to 5000; online 100.
    beta: float = 2000.0
    #: Of the margin; see preference.py. All scaled so that beta means the same.
    loss_type: Literal["sigmoid", "hinge", "ipo", "linear", "dmpo"] = "sigmoid"
    #: Share of pairs whose label is taken to be wrong.
    label_smoothing: float = 0.0
    #: What errors at time t count. constant, eps: (1 - t)^2, kl: (1 - t) / t up to 5.
    weighting: Literal["constant", "eps", "kl"] = "constant"
    #: The loser's gradient is scaled by this. Below 1 less of the margin comes from making losers worse.
    loser_scale: float = 1.0
    #: mu of Diffusion-SDPO, in [0, 1], which chooses that scale for each pair. Published: 0.9 (SD 1.5), 0.6 (SDXL).
    safeguard: float | None = None
    #: Weight of the winner's error itself: some supervised training besides.
    anchor: float = 0.0
    #: Weigh each pair: of data by its own weight, of samples by half the difference of their advantages.
    weighted: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "beta")
        check_positive(self, "loser_scale", "anchor", or_zero=True)
        check_choice(self, "loss_type", "weighting")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing}: must lie in [0, 0.5)")
        if self.safeguard is not None and not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard={self.safeguard}: must lie in [0, 1]")

    @property
    def needs(self) -> Needs:
        return Needs(points="noised", unit="pair", shared_noise=True, reference=True)

    def choose(self, samples: Samples, advantage: Tensor) -> tuple[Tensor, Tensor]:
        return best_and_worst(samples, advantage, weighted=self.weighted)

    def loss(self, predict: Predict, noised: Noised, advantage: Tensor) -> Loss:
        """Loss per pair (B / 2,) at noised latents, the better row first. advantage: (B,) fp32, the pair's weight times 1, -1."""
        target = noised.target
        r = error(predict.reference(noised), target)
        v = predict(noised)
        m = error(v, target)
        scale = self.loser_scale * torch.ones_like(m[1::2])
        if self.safeguard is not None:
            scale = scale * safe_scale((v.detach().float() - target).flatten(1), self.safeguard)
        slowed = m[1::2].detach() + scale * (m[1::2] - m[1::2].detach())
        h = WEIGHTINGS[self.weighting](noised.t[0::2]) * ((r[0::2] - m[0::2]) - (r[1::2] - slowed))
        u = self.beta / 2 * h
        values = advantage[0::2] * (pair_loss(self.loss_type, u, self.label_smoothing) + self.anchor * m[0::2])
        change = (m - r).detach()
        metrics: dict[str, Tensor | float] = {
            "policy_loss": values.detach(),
            "implicit_accuracy": implicit_accuracy(u),
            "margin": h.detach(),
            "logit": u.detach(),
            "error_winner": m[0::2].detach(),
            "error_loser": m[1::2].detach(),
            "change_winner": change[0::2],
            "change_loser": change[1::2],
        }
        if self.safeguard is not None:
            metrics["loser_scale"] = scale
        return Loss(values, metrics)


def safe_scale(residual: Tensor, mu: float) -> Tensor:
    """(n,) lambda of each pair, in [0, 1]. residual: (2 n, D), v - target, the winner's first."""
    winner, loser = residual[0::2], residual[1::2]
    across = (winner * loser).sum(1)
    bound = (1 - mu) * winner.square().sum(1) / across.clamp(min=1e-12)
    return torch.where(across > 0, bound.clamp(0, 1), torch.ones_like(bound))
