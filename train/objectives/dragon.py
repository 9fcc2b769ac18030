"""DRAGON, arXiv 2504.15217: what makes a set of samples better, learnt from the contrast of a better and a worse set.

    D+ = (x_1 ... x_n),  D- = (y_1 ... y_n)    the first and the second samples of n pairs, each of one prompt
    x_i, y_i change places    where y_i is the better sample (`instance`), or where D+ becomes a better set (a set reward)
    L  = Diffusion-DPO of the pairs (x_i, y_i),    or Diffusion-KTO of D+ as desirable and D- as undesirable

A set reward need not be differentiable, nor say anything of one sample. Exchanges are tried pair by pair until none helps, in ten
rounds at most (what was published leaves the order, and when to stop, open). Each process makes sets of its own samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from flowrl.batch import Loss, Noised, Samples
from flowrl.train.objectives.base import Needs, Predict, check_choice, check_positive
from flowrl.train.objectives.dpo import DPO
from flowrl.train.objectives.kto import KTO

if TYPE_CHECKING:
    from flowrl.train.sets import SetReward

SURROGATES: dict[str, type[DPO] | type[KTO]] = {"dpo": DPO, "kto": KTO}


@dataclass(frozen=True)
class DRAGON:
    """Options of DRAGON. Samples by the ODE, without guidance."""

    #: What is better: the sample with the larger advantage, by the recipe's rewards (instance), or the set that is nearer to
    #: exemplars by Frechet or by kernel distance, or more diverse (vendi). Beside a set reward, `rewards` are measured only.
    better: Literal["instance", "frechet", "mmd", "vendi"] = "instance"
    #: Of set rewards: what sees the pictures. tiny_clip, pixels, or a folder or hub id of an encoder.
    features: str = "tiny_clip"
    #: Of frechet and mmd: `samples` (the recipe's `references`), a folder of pictures, or a file of texts (dual encoders).
    exemplars: str = "samples"
    #: dpo contrasts the two samples of a pair; kto, each sample with the mean.
    surrogate: Literal["dpo", "kto"] = "dpo"
    #: Sharpness, as of that objective: larger holds closer to the reference.
    beta: float = 100.0

    def __post_init__(self) -> None:
        check_choice(self, "better", "surrogate")
        check_positive(self, "beta")
        if self.better != "instance":
            _ = self.set_reward  # what cannot be loaded is refused now

    @cached_property
    def set_reward(self) -> SetReward:
        from flowrl.train.sets import SetReward

        return SetReward(self.better, self.features, self.exemplars)

    @property
    def needs(self) -> Needs:
        return Needs(points="noised", unit="pair", shared_noise=True, reference=True)

    def choose(self, samples: Samples, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs, the member of D+ first: rows (2 n,) int64 and advantages (2 n,), 1 and -1 in turn. advantage: (N,)."""
        pairs = torch.cat([places[: len(places) // 2 * 2] for places in samples.by_group()]).reshape(-1, 2)
        if self.better == "instance":
            gain = advantage[pairs[:, 0]] - advantage[pairs[:, 1]]
            pairs, told = torch.where(gain[:, None] < 0, pairs.flip(1), pairs), gain.abs() > 1e-6
        else:
            pairs, told = self.set_reward.ordered(pairs, samples)
        if self.surrogate == "dpo":  # KTO's mean is one over all processes: each brings as many rows, ties with a weight of 0
            pairs, told = pairs[told], told[told]
        return pairs.flatten(), (told[:, None] * torch.tensor([1.0, -1.0])).flatten()

    def loss(self, predict: Predict, noised: Noised, advantage: Tensor) -> Loss:
        """Loss per pair (n,) for dpo, per sample (2 n,) for kto. advantage: (2 n,), 1 of D+ and -1 of D-."""
        return SURROGATES[self.surrogate](beta=self.beta).loss(predict, noised, advantage)
