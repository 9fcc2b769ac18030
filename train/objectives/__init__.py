"""One method, one file. Each is a frozen dataclass of options with `needs` and `loss(predict, point, advantage) -> Loss`."""

from flowrl.train.objectives.awm import AWM
from flowrl.train.objectives.base import Needs, Predict
from flowrl.train.objectives.crd import CRD
from flowrl.train.objectives.dgpo import DGPO
from flowrl.train.objectives.grpo import GRPO
from flowrl.train.objectives.nft import NFT
from flowrl.train.objectives.rwr import RWR
from flowrl.train.objectives.sft import SFT

#: Objectives by the name that a recipe uses.
OBJECTIVES = {
    "awm": AWM,
    "crd": CRD,
    "dgpo": DGPO,
    "grpo": GRPO,
    "nft": NFT,
    "rwr": RWR,
    "sft": SFT,
}

__all__ = [
    "AWM",
    "CRD",
    "DGPO",
    "GRPO",
    "NFT",
    "OBJECTIVES",
    "RWR",
    "SFT",
    "Needs",
    "Predict",
]
