"""Several rewards, balanced by their gradients, not their values: MARBLE (arXiv 2605.06507, and its released code) and others.

    g_k = mean over the samples that k scores of grad L(A_k),    h_k = g_k / |g_k|
    alpha = argmin over the simplex of |sum_k alpha_k h_k|,    update = mean_k |g_k| sum_k alpha_k h_k + g_penalty

The shortest vector between the unit gradients has the same product with every reward that has a weight, and no smaller one with
the others: while it is not 0, it improves them all. Only the K x K products of the gradients are needed to find it.

Measuring every gradient is dear. In between, one pass with the last weights serves all rewards (`flowrl.train.affine`).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl.train.gram import cagrad, conditioned, min_norm, pcgrad, upgrad
from flowrl.train.objectives.base import check_choice, check_positive

#: Gradients shorter than this count as none.
NO_GRADIENT = 1e-12


# ------------------------------------------------------------------------------------------------ options


@dataclass(frozen=True)
class Balance:
    """What every way of balancing shares."""

    #: Updates from one measurement of every reward's gradient to the next; 1 measures at each. In between, one backward pass with
    #: the last measurement's weights serves all rewards, for objectives whose loss is affine in the advantage.
    refresh: int = 10
    #: What the weights (and the norms that they come with) keep of themselves at a measurement.
    ema: float = 0.7
    #: Balance directions, with every gradient at length 1. Otherwise short gradients, which may be mere noise, weigh most.
    normalize: bool = True
    #: How gradients are measured. exact: a backward pass for each reward. lora: the same numbers from each sample's own gradients
    #: at the LoRA layers, in two or three passes for any number of rewards. batch: exact, on the first batch and point of the
    #: update alone, as released. output: products of the gradients at the denoiser's output, with no pass through it.
    gram: Literal["exact", "lora", "batch", "output"] = "exact"
    #: Also measure every reward's cosine with the update at each so-manieth update (balance/NAME/cosine), at the cost of a
    #: measurement; 0 only where one is made anyway.
    watch: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "refresh")
        check_positive(self, "watch", or_zero=True)
        check_choice(self, "gram")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema}: must lie in [0, 1)")

    def solve(self, G: Tensor, generator: torch.Generator) -> Tensor:
        """(K,) weights of gradients with products G (K, K)."""
        raise NotImplementedError

    def pull(self, weights: Tensor) -> Tensor:
        """(K,) what the rewards' own weights (K,), of mean 1, multiply the unit gradients by, before the weights are found."""
        return weights


@dataclass(frozen=True)
class Marble(Balance):
    """The shortest combination of the rewards' gradients: all of them improve. A reward's weight is the progress it asks for."""

    #: Every reward keeps at least this share of an equal weight.
    floor: float = 0.0
    #: Added to the products, of which the mean square is 1: gradients that nearly coincide then share their weight.
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "ridge")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor}: must lie in [0, 1]; 1 weighs all rewards the same")

    def solve(self, G: Tensor, generator: torch.Generator) -> Tensor:
        return min_norm(G, self.floor, self.ridge)

    def pull(self, weights: Tensor) -> Tensor:
        """The shortest combination favours short vectors, and has the same product with all: with g' / w, w times as much."""
        return 1 / weights


@dataclass(frozen=True)
class Equal(Balance):
    """The mean of the normalised gradients: what MARBLE's weights are to be better than. The same for two rewards."""

    def solve(self, G: Tensor, generator: torch.Generator) -> Tensor:
        return torch.full((len(G),), 1 / len(G), dtype=torch.float64)


@dataclass(frozen=True)
class UPGrad(Balance):
    """UPGrad, arXiv 2406.16232: the mean of the gradients after each was turned as little as harms no reward."""

    def solve(self, G: Tensor, generator: torch.Generator) -> Tensor:
        return upgrad(G)


@dataclass(frozen=True)
class PCGrad(Balance):
    """PCGrad, arXiv 2001.06782: each gradient loses its part against any other one."""

    def solve(self, G: Tensor, generator: torch.Generator) -> Tensor:
        return pcgrad(G, generator)


@dataclass(frozen=True)
class CAGrad(Balance):
    """CAGrad, arXiv 2110.14048: near the mean gradient, as good as can be for the worst reward."""

    #: How far from the mean, over the mean's length. 0 is the mean.
    c: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "c", or_zero=True)

    def solve(self, G: Tensor, generator: torch.Generator) -> Tensor:
        return cagrad(G, self.c)


@dataclass(frozen=True)
class TorchJD(Balance):
    """Any of torchjd's weightings of a Gram matrix that keep no state. pip install torchjd."""

    #: Which: AlignedMTL, IMTLG, DualProj, GradVac, ... (`torchjd.aggregation.NAMEWeighting`).
    weighting: str = "AlignedMTL"
    #: Its own options.
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._made()

    def _made(self) -> Any:
        """Raises ValueError with the cause where it cannot be made."""
        try:
            from torchjd import aggregation
        except ImportError:
            raise ValueError("torchjd is not installed: pip install torchjd") from None
        name = f"{self.weighting.removesuffix('Weighting')}Weighting"
        known = [n.removesuffix("Weighting") for n in dir(aggregation) if n.endswith("Weighting") and n != "Weighting"]
        if not hasattr(aggregation, name):
            raise ValueError(f"weighting={self.weighting}: torchjd has {', '.join(known)}")
        found = getattr(aggregation, name)
        if hasattr(found, "reset") or any(p.default is p.empty and p.name not in self.options for p in _arguments(found)):
            needed = [p.name for p in _arguments(found) if p.default is p.empty]
            why = "keeps a state, which a checkpoint would lose" if hasattr(found, "reset") else f"wants options: {needed}"
            raise ValueError(f"weighting={self.weighting} {why}")
        try:
            return found(**self.options)
        except (ImportError, TypeError) as error:
            raise ValueError(f"weighting={self.weighting}: {error}") from None

    def solve(self, G: Tensor, generator: torch.Generator) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            return self._made()(conditioned(G, 1e-6)).double()


def _arguments(cls: type) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(cls).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


@dataclass(frozen=True)
class Unbalanced:
    """Advantages are added up before the loss (see the recipe's `aggregation`)."""

    #: Measure every reward's cosine with the update at each so-manieth update (balance/NAME/cosine); 0 never does.
    watch: int = 0
    #: How: see the other ways of balancing.
    gram: Literal["exact", "lora"] = "exact"

    def __post_init__(self) -> None:
        check_positive(self, "watch", or_zero=True)
        check_choice(self, "gram")


#: By the name that a recipe's `balance` uses.
BALANCES = {
    "none": Unbalanced,
    "marble": Marble,
    "equal": Equal,
    "upgrad": UPGrad,
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
    "torchjd": TorchJD,
}


# ------------------------------------------------------------------------------------------------ weights over time


@dataclass
class Weights:
    """What is known of the rewards' gradients, on the CPU in fp64.

    alpha: (K,) weights. norms: (K,) lengths of the gradients; NaN before the first measurement. since: updates since then.
    """

    alpha: Tensor
    norms: Tensor
    since: int = 0

    @classmethod
    def new(cls, K: int) -> Weights:
        return cls(torch.full((K,), 1 / K, dtype=torch.float64), torch.full((K,), torch.nan, dtype=torch.float64))

    def refresh(
        self, options: Balance, G: Tensor, present: Tensor, reward_weights: Tensor, generator: torch.Generator
    ) -> Weights:
        """After a measurement. G: (K, K) products of the gradients. present: (K,) bool, the rewards that say something now.

        The others keep their weight, and so does a reward whose gradient vanishes.
        """
        norms = G.diagonal().clamp(min=0).sqrt()
        used = present & (norms > NO_GRADIENT)
        if not used.any():
            return Weights(self.alpha, self.norms, 1)
        scale = _pull(options, reward_weights, used) / (norms if options.normalize else 1.0)
        H = (G * scale.unsqueeze(1) * scale)[used][:, used]
        known = ~self.norms.isnan()
        keep = torch.where(known, options.ema, 0.0)
        mass = self.alpha[used].abs().sum() / self.alpha.abs().sum()
        alpha, kept_norms = self.alpha.clone(), self.norms.clone()
        fresh = not bool((known & used).any())
        keep_alpha = 0.0 if fresh else options.ema
        alpha[used] = keep_alpha * self.alpha[used] + (1 - keep_alpha) * mass * options.solve(H, generator)
        kept_norms[used] = (keep * self.norms.nan_to_num(0.0) + (1 - keep) * norms)[used]
        return Weights(alpha, kept_norms, 1)

    def coefficients(self, options: Balance, present: Tensor, reward_weights: Tensor, norms: Tensor | None = None) -> Tensor:
        """(K,) u: the update is sum_k u_k g_k. norms: those of the gradients themselves, where they are at hand.

        Over the rewards that are present, whose alpha are scaled up to all; 0 for the others.
        """
        norms = self.norms if norms is None else norms
        usable = present & ~(norms <= NO_GRADIENT)
        if not usable.any():
            return torch.zeros_like(self.alpha)
        alpha = torch.where(usable, self.alpha, 0.0)
        alpha = alpha * self.alpha.abs().sum() / alpha.abs().sum().clamp(min=1e-300)
        u = alpha * _pull(options, reward_weights, usable)
        if options.normalize:
            mean = norms[usable & ~norms.isnan()].mean() if bool((usable & ~norms.isnan()).any()) else torch.tensor(1.0)
            u = u * torch.where(norms.isnan() | ~usable, 1.0, mean / norms.clamp(min=NO_GRADIENT))
        return torch.where(usable, u, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "norms": self.norms, "since": self.since}


def _pull(options: Balance, reward_weights: Tensor, used: Tensor) -> Tensor:
    """(K,) of the rewards' weights' magnitudes, brought to mean 1 over those used; 1 for the others."""
    w = reward_weights.double().abs()
    return options.pull(torch.where(used, w / w[used].mean(), 1.0))
