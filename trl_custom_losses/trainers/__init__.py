"""Drop-in subclasses of TRL's trainers and configs; the only part of the package that touches TRL."""

from .config import CustomDPOConfig, CustomGRPOConfig, LossFunctionArguments
from .dpo import CustomDPOTrainer
from .grpo import CustomGRPOTrainer

__all__ = [
    "CustomDPOConfig",
    "CustomDPOTrainer",
    "CustomGRPOConfig",
    "CustomGRPOTrainer",
    "LossFunctionArguments",
]
