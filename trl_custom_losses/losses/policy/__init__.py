"""Losses on sampled completions, one a module; the module's name is the name in the registry."""

from .bnpo import BNPOLoss
from .cispo import CISPOLoss
from .dapo import DAPOLoss
from .dr_grpo import DrGRPOLoss
from .grpo import GRPOLoss
from .importance import ImportanceWeightedLoss
from .luspo import LUSPOLoss
from .sapo import SAPOLoss
from .vespo import VESPOLoss

__all__ = [
    "BNPOLoss",
    "CISPOLoss",
    "DAPOLoss",
    "DrGRPOLoss",
    "GRPOLoss",
    "ImportanceWeightedLoss",
    "LUSPOLoss",
    "SAPOLoss",
    "VESPOLoss",
]
