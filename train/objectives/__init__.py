"""One method, one file. Each is a frozen dataclass of options with `needs` and `loss(predict, step, advantage) -> Loss`."""

from flowrl.train.objectives.base import Needs, Predict
from flowrl.train.objectives.grpo import GRPO

#: Objectives by the name that a recipe uses.
OBJECTIVES = {"grpo": GRPO}

__all__ = ["GRPO", "OBJECTIVES", "Needs", "Predict"]
