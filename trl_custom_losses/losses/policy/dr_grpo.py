"""GRPO's surrogate with a fixed length as its normaliser."""

from __future__ import annotations

from typing import Any

from ...hyperparameters import check_range
from ...reductions import FixedLengthMean
from ...registry import LossFunctionRegistry
from .grpo import GRPOLoss


@LossFunctionRegistry.register("dr_grpo")
class DrGRPOLoss(GRPOLoss):
    """Dr. GRPO: the clipped surrogate summed over tokens and divided by a fixed length, so that long answers count.

    loss = sum_tokens loss_t / (number of sequences x max_completion_length)

    The paper also leaves the advantages unscaled: set the trainer's `scale_rewards="none"`.

    Args:
        max_completion_length: Tokens a sequence counts for, >= 1; falls back to the trainer's field of that name.
        epsilon, epsilon_high, delta, importance_sampling_level: As for `grpo`.

    Source: Liu et al. 2025, arXiv:2503.20783.
    """

    example = {"max_completion_length": 256}

    def __init__(self, *, max_completion_length: int, **options: Any) -> None:
        super().__init__(**options)
        self.max_completion_length = int(check_range("max_completion_length", max_completion_length, at_least=1))

    @property
    def reduction(self) -> FixedLengthMean:  # type: ignore[override]
        """Tokens over a fixed length; read anew, since the length may be scheduled."""
        return FixedLengthMean(self.max_completion_length)
