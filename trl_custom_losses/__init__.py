"""Change the objective of TRL's DPO and GRPO training without forking a trainer.

Losses, their registry and their types are imported at once; the trainers, which need trl, on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .base import Loss, LossFunction, PolicyLoss, PreferenceLoss
from .composition import ComposableLossFunction
from .errors import CheckpointError, LossConfigError, MissingFieldError, NonFiniteLossError, UnknownLossError
from .losses.composite import ComposedLoss
from .registry import LossFunctionRegistry
from .types import Denominators, Metric, ModelOutputs, PolicyBatch, PreferenceBatch, Ranks, Rollout

if TYPE_CHECKING:
    from .trainers import CustomDPOConfig, CustomDPOTrainer, CustomGRPOConfig, CustomGRPOTrainer

__version__ = "0.1.0"

_TRAINERS = ("CustomDPOConfig", "CustomDPOTrainer", "CustomGRPOConfig", "CustomGRPOTrainer")

__all__ = [
    "CheckpointError",
    "ComposableLossFunction",
    "ComposedLoss",
    "CustomDPOConfig",
    "CustomDPOTrainer",
    "CustomGRPOConfig",
    "CustomGRPOTrainer",
    "Denominators",
    "Loss",
    "LossConfigError",
    "LossFunction",
    "LossFunctionRegistry",
    "Metric",
    "MissingFieldError",
    "ModelOutputs",
    "NonFiniteLossError",
    "PolicyBatch",
    "PolicyLoss",
    "PreferenceBatch",
    "PreferenceLoss",
    "Ranks",
    "Rollout",
    "UnknownLossError",
]


def __getattr__(name: str) -> Any:
    if name in _TRAINERS:
        return getattr(importlib.import_module(f"{__name__}.trainers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_TRAINERS])
