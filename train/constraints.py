"""Rewards that are to stay above a value: a Lagrangian (constrained policy optimisation), whose multipliers are their weights.

    max E r_0  subject to  E r_k >= c_k
    A = A_0 + sum_k lambda_k A_k,    lambda_k <- clip(lambda_k + rate (c_k - m_k) / s_k, 0, most)

m_k and s_k are running means of the raw reward's mean and deviation over a step's samples: c_k is in the reward's own units, and
the pace of lambda does not depend on them. A constraint that holds costs nothing: its multiplier falls to 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowrl.config import ConfigError, make, unknown
from flowrl.train.objectives.base import check_positive


@dataclass(frozen=True)
class Constraint:
    """What a reward's mean over the policy's samples has to be."""

    #: The least that the raw reward's mean should be.
    at_least: float | None = None
    #: The most that it should be; one of the two.
    at_most: float | None = None
    #: What the multiplier gains in a step for each deviation that the mean is off.
    rate: float = 0.05
    #: What a step's running mean keeps of the one before.
    decay: float = 0.9
    #: The multiplier's largest value, where a constraint cannot be met.
    most: float = 10.0

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("one of at_least and at_most says what the reward's mean has to be")
        check_positive(self, "rate", "most")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay}: must lie in [0, 1)")

    @property
    def sign(self) -> int:
        return 1 if self.at_most is None else -1

    @property
    def level(self) -> float:
        level = self.at_least if self.at_most is None else self.at_most
        assert level is not None
        return level


class Constraints:
    """The constraints of a run, by the name of their reward, and how far their multipliers are."""

    def __init__(self, constraints: Mapping[str, Constraint]):
        self.constraints, self.signs = dict(constraints), {name: float(c.sign) for name, c in constraints.items()}
        self.state = {name: {"mean": 0.0, "deviation": 0.0, "multiplier": 0.0, "steps": 0.0} for name in self.constraints}

    @classmethod
    def of(cls, section: Mapping[str, Any], rewards: Iterable[str]) -> Constraints:
        """From a recipe's section: for each of some rewards the least value of its mean, or options. Raises ConfigError."""
        made = {}
        for name, value in section.items():
            if name not in list(rewards):
                raise ConfigError(unknown("reward in constraints", name, rewards))
            made[name] = make(Constraint, value if isinstance(value, dict) else {"at_least": value}, f"constraints.{name}")
        return cls(made)

    def update(self, rewards: Tensor, names: Sequence[str]) -> dict[str, float]:
        """Take one step's raw rewards (N, K) of all processes into account; returns the metrics. A reward that abstains waits."""
        for name, constraint in self.constraints.items():
            values = rewards[:, list(names).index(name)].double()
            values = values[~values.isnan()]
            if len(values) < 2:
                continue
            own = self.state[name]
            decay = constraint.decay if own["steps"] else 0.0
            own["mean"] += (1 - decay) * (float(values.mean()) - own["mean"])
            own["deviation"] += (1 - decay) * (float(values.std()) - own["deviation"])
            missing = constraint.sign * (constraint.level - own["mean"]) / max(own["deviation"], 1e-12)
            own["multiplier"] = min(constraint.most, max(0.0, own["multiplier"] + constraint.rate * missing))
            own["steps"] += 1
        return {f"constraints/{name}/{key}": own[key] for name, own in self.state.items() for key in ("mean", "multiplier")}

    def weights(self, weights: Tensor, names: Sequence[str]) -> Tensor:
        """(K,) the rewards' weights, with the multipliers in the place of those that are constrained."""
        row = weights.clone()
        for name, constraint in self.constraints.items():
            row[list(names).index(name)] = constraint.sign * self.state[name]["multiplier"]
        return row

    def free(self, weights: Tensor, names: Sequence[str]) -> Tensor:
        """(K,) the rewards' weights, 0 for those that are constrained: what is to be large."""
        return torch.tensor([0.0 if name in self.constraints else float(w) for name, w in zip(names, weights, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(own) for name, own in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What a checkpoint holds of constraints that are still there; new ones start from 0."""
        for name, own in state.items():
            if name in self.state:
                self.state[name] = dict(own)
