"""Losses made of losses, one a module; the module's name is the name in the registry."""

from .clipped_loss import ClippedLoss
from .composed import ComposedLoss
from .composed_dpo_grpo import ComposedDPOGRPOLoss
from .dynamic_multi_objective import DynamicMultiObjectiveLoss
from .multi_objective_dpo import MultiObjectiveDPOLoss
from .multi_objective_grpo import MultiObjectiveGRPOLoss

__all__ = [
    "ClippedLoss",
    "ComposedDPOGRPOLoss",
    "ComposedLoss",
    "DynamicMultiObjectiveLoss",
    "MultiObjectiveDPOLoss",
    "MultiObjectiveGRPOLoss",
]
