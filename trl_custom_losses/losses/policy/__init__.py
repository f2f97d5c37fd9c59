"""Losses on sampled completions, one a module; the module's name is the name in the registry."""

from .bnpo import BNPOLoss
from .cispo import CISPOLoss
from .dapo import DAPOLoss
from .dr_grpo import DrGRPOLoss
from .dra_grpo import DRAGRPOLoss
from .dynamic_grpo import DynamicGRPOLoss
from .group_advantages import SimilarityAdvantageLoss
from .grpo import GRPOLoss
from .importance import ImportanceWeightedLoss
from .luspo import LUSPOLoss
from .rollout_pairs import RolloutPairsLoss
from .sapo import SAPOLoss
from .vespo import VESPOLoss

__all__ = [
    "BNPOLoss",
    "CISPOLoss",
    "DAPOLoss",
    "DRAGRPOLoss",
    "DrGRPOLoss",
    "DynamicGRPOLoss",
    "GRPOLoss",
    "ImportanceWeightedLoss",
    "LUSPOLoss",
    "RolloutPairsLoss",
    "SAPOLoss",
    "SimilarityAdvantageLoss",
    "VESPOLoss",
]
