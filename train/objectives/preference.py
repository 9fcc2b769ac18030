"""What the methods that learn from pairs share: the losses of a pair's margin, and which samples of a group make a pair.

    u = (beta / 2) h,    h > 0 where the policy prefers the better row more than the reference does; at the start u = 0
    sigmoid  -log s(u)               Diffusion-DPO, arXiv 2311.12908, eq. 14: ln 2 at u = 0, slope -1/2
    hinge    max(0, 1 - u)           SLiC, arXiv 2305.10425
    ipo      (u - 1/2)^2             IPO, arXiv 2310.12036, times beta^2, without which its gradient drowns in Adam's epsilon
    linear   -c u, c = clamp(1/2 - 0.4 u, 0.001, 0.999) a constant          Linear-DPO, arXiv 2605.21123, times beta / 2
    dmpo     KL(Bern(s(u)) || Bern(0.99))                                   as released with Diffusion-SDPO, arXiv 2511.03317

Errors m are means over latents of (v - target)^2, so that beta transfers between resolutions; (1 - t)^2 m is the error of the
noise, which an eps-predicting model was trained on. The scales of ipo and linear are chosen so that beta means the same in all
of them: the margin at which a pair stops to teach, and not the length of an update (derived: AdamW divides that away).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowrl.batch import Samples

DMPO_DOUBT = 0.01
LINEAR_FLOOR = 1e-3


def linear(u: Tensor) -> Tensor:
    """The slope of `sigmoid` as a straight line with a floor: no pair ever stops to teach."""
    return -(0.5 - 0.4 * u.detach()).clamp(LINEAR_FLOOR, 1 - LINEAR_FLOOR) * u


def dmpo(u: Tensor) -> Tensor:
    """The reverse divergence: falls until the policy is 0.99 sure of the pair, then rises."""
    p, log_p, log_not = u.sigmoid(), logsigmoid(u), logsigmoid(-u)
    q = torch.tensor([1 - DMPO_DOUBT, DMPO_DOUBT]).log().to(u)
    return p * (log_p - q[0]) + (1 - p) * (log_not - q[1])


#: Losses of u (n,) -> (n,), by the name that a recipe uses.
PAIR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda u: -logsigmoid(u),
    "hinge": lambda u: (1 - u).clamp(min=0),
    "ipo": lambda u: (u - 0.5).square(),
    "linear": linear,
    "dmpo": dmpo,
}


#: What an error at time t (n,) counts. constant: as flow models are trained, and as Flow-DPO (arXiv 2501.13918) found best.
#: eps: as in Diffusion-DPO. kl: as the tightest bound on the divergence of two SDE paths has it (derived), at most 5.
WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "eps": lambda t: (1 - t).square(),
    "kl": lambda t: ((1 - t) / t).clamp(max=5),
}


def pair_loss(kind: str, u: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(n,) the loss of each pair, with graph. u: (n,). label_smoothing: the share of pairs whose label is wrong, in [0, 1/2)."""
    loss = PAIR_LOSSES[kind]
    return loss(u) if label_smoothing == 0 else (1 - label_smoothing) * loss(u) + label_smoothing * loss(-u)


def implicit_accuracy(u: Tensor) -> Tensor:
    """(n,) 1 where the policy orders the pair as its label, 0 where not, 1/2 where it cannot say, as at the start."""
    return (u.detach().sign() + 1) / 2


def best_and_worst(samples: Samples, advantage: Tensor, tolerance: float = 1e-6, weighted: bool = False) -> tuple[Tensor, Tensor]:
    """A pair of each group: its best sample, and right after it its worst; groups without a difference are left out.

    advantage: (N,) fp32. Returns rows (2 n,) int64 into samples and their advantages (2 n,) fp32: 1 and -1 in turn, or, weighted,
    +- half the difference of the two, which of data is the weight of the pair.
    """
    pairs, weights = [], []
    for places in samples.by_group():
        own = advantage[places]
        gap = float(own.max() - own.min())
        if gap > tolerance:
            pairs += [int(places[own.argmax()]), int(places[own.argmin()])]
            weights += [gap / 2, -gap / 2] if weighted else [1.0, -1.0]
    return torch.tensor(pairs, dtype=torch.int64), torch.tensor(weights)
