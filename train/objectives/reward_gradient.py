"""R0, or Reward-Instruct, arXiv 2503.13070: a few-step generator from rewards alone, without a distillation loss.

    x_n = G_theta(z) in a few steps,    L = - sum_k w_k <g_k / |g_k|, p(x_n)>,    g_k = grad_p r_k(p(x_n)),    p: decoded

The gradient of L in the picture is sum_k w_k g_k / |g_k|: each reward pulls with its weight, whatever its scale. L itself says
nothing, and is not logged. The sampler is DDIM with eta drawn anew for each batch, and the gradient goes back to the node that
`steps` names (a random one cuts the chain at random). What holds the weights near those it started from is a LoRA of low rank, or
`kl`, a distance of velocities where the paper has one of weights; without either the paper sees collapse. `intermediate` is R0+.
From summaries of the paper, which has no public code: norms per picture and the steps before the node (here by the ODE) are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.batch import Noised, Step
from flowrl.samplers.flow import x0_from
from flowrl.samplers.transitions import DDIM
from flowrl.train.objectives.base import Predict, check_positive
from flowrl.train.objectives.climb import Climb, Metrics, unroll


@dataclass(frozen=True)
class R0(Climb):
    """Options of R0. Samples by the ODE in few steps; `steps` names where the gradient ends, late."""

    #: Largest share of fresh noise in a step, drawn evenly from 0 up: 0 is the ODE, 1 DDPM's noise.
    eta: float = 1.0
    #: Weight of the same loss on the guess of the picture at the node itself (R0+). 0 leaves it out.
    intermediate: float = 0.0
    #: Keep only the states of the chain, and compute each step once more for the gradient.
    checkpoint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "intermediate", or_zero=True)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta}: must lie in [0, 1]")

    def end(self, predict: Predict, point: Step | Noised, v: Tensor) -> Tensor:
        assert isinstance(point, Step)
        eta = self.eta * float(torch.rand((), generator=predict.rng))
        return unroll(predict, point, v, transition=DDIM(eta), save=self.checkpoint)

    def value(self, predict: Predict, point: Step | Noised, v: Tensor) -> tuple[Tensor, Metrics]:
        values, r = self.normalised(predict, self.end(predict, point, v))
        if self.intermediate > 0:
            values = values + self.intermediate * self.normalised(predict, x0_from(point.x, v, point.t))[0]
        return values, self.told(r)

    def normalised(self, predict: Predict, x0: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) a value whose gradient is each reward's, divided by its norm; and the weighted rewards (B,), without graph.

        The gradient in the picture, and in the latents for rewards that read those.
        """
        seen = [x0, *([] if (images := predict.pictures(x0, self.frames)) is None else [images])]
        at = [tensor.detach().requires_grad_() for tensor in seen]
        with torch.enable_grad():
            scores = predict.scores(at[0], at[1] if len(at) > 1 else None)
        weights = predict.weighted(torch.eye(scores.shape[1], device=scores.device))
        r = predict.weighted(scores.detach())
        values = torch.zeros(len(x0), device=x0.device)
        for k, weight in enumerate(weights):
            g = torch.autograd.grad(scores[:, k].nansum(), at, retain_graph=True, allow_unused=True, materialize_grads=True)
            norm = torch.cat([part.flatten(1) for part in g], 1).norm(dim=1).clamp(min=1e-12)
            values = values - weight / norm * sum((part * of).flatten(1).sum(1) for part, of in zip(g, seen, strict=True))
        return values if self.cap is None else values * (r < self.cap), r
