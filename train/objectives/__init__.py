"""One method, one file. Each is a frozen dataclass of options with `needs` and `loss(predict, point, advantage) -> Loss`."""

from flowrl.train.objectives.base import Needs, Predict
from flowrl.train.objectives.grpo import GRPO
from flowrl.train.objectives.nft import NFT

#: Objectives by the name that a recipe uses.
OBJECTIVES = {"grpo": GRPO, "nft": NFT}

__all__ = ["GRPO", "NFT", "OBJECTIVES", "Needs", "Predict"]
