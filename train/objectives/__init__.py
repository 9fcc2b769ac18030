"""One method, one file. Each is a frozen dataclass of options with `needs` and `loss(predict, point, advantage) -> Loss`."""

from flowrl.train.objectives.align_prop import AlignProp
from flowrl.train.objectives.awm import AWM
from flowrl.train.objectives.b2diffurl import B2DiffuRL
from flowrl.train.objectives.base import Needs, Predict
from flowrl.train.objectives.branch_grpo import BranchGRPO
from flowrl.train.objectives.consistency import Consistency
from flowrl.train.objectives.crd import CRD
from flowrl.train.objectives.d3po import D3PO
from flowrl.train.objectives.dense_dpo import DenseDPO
from flowrl.train.objectives.dgpo import DGPO
from flowrl.train.objectives.dpo import DPO
from flowrl.train.objectives.draft import DRaFT, DRaFTLV
from flowrl.train.objectives.dragon import DRAGON
from flowrl.train.objectives.euphonium import Euphonium
from flowrl.train.objectives.flow_dppo import FlowDPPO
from flowrl.train.objectives.g2rpo import G2RPO
from flowrl.train.objectives.grpo import GRPO
from flowrl.train.objectives.grpo_guard import GRPOGuard
from flowrl.train.objectives.inpo import InPO
from flowrl.train.objectives.kto import KTO
from flowrl.train.objectives.mapo import MaPO
from flowrl.train.objectives.nft import NFT
from flowrl.train.objectives.refl import ReFL
from flowrl.train.objectives.reward_gradient import R0
from flowrl.train.objectives.rwr import RWR
from flowrl.train.objectives.sft import SFT
from flowrl.train.objectives.soar import SOAR
from flowrl.train.objectives.sparse import Sparse
from flowrl.train.objectives.srum import SRUM

#: Objectives by the name that a recipe uses.
OBJECTIVES = {
    "align_prop": AlignProp,
    "awm": AWM,
    "b2diffurl": B2DiffuRL,
    "branch_grpo": BranchGRPO,
    "consistency": Consistency,
    "crd": CRD,
    "d3po": D3PO,
    "dense_dpo": DenseDPO,
    "dgpo": DGPO,
    "dpo": DPO,
    "draft": DRaFT,
    "draft_lv": DRaFTLV,
    "dragon": DRAGON,
    "euphonium": Euphonium,
    "flow_dppo": FlowDPPO,
    "g2rpo": G2RPO,
    "grpo": GRPO,
    "grpo_guard": GRPOGuard,
    "inpo": InPO,
    "kto": KTO,
    "mapo": MaPO,
    "nft": NFT,
    "r0": R0,
    "refl": ReFL,
    "rwr": RWR,
    "sft": SFT,
    "soar": SOAR,
    "sparse": Sparse,
    "srum": SRUM,
}

__all__ = [
    "AWM",
    "CRD",
    "D3PO",
    "DGPO",
    "DPO",
    "DRAGON",
    "G2RPO",
    "GRPO",
    "KTO",
    "NFT",
    "OBJECTIVES",
    "R0",
    "RWR",
    "SFT",
    "SOAR",
    "SRUM",
    "AlignProp",
    "B2DiffuRL",
    "BranchGRPO",
    "Consistency",
    "DRaFT",
    "DRaFTLV",
    "DenseDPO",
    "Euphonium",
    "FlowDPPO",
    "GRPOGuard",
    "InPO",
    "MaPO",
    "Needs",
    "Predict",
    "ReFL",
    "Sparse",
]
