"""GRPO's surrogate summed over each sequence."""

from __future__ import annotations

from ...registry import LossFunctionRegistry
from .grpo import GRPOLoss


@LossFunctionRegistry.register("luspo")
class LUSPOLoss(GRPOLoss):
    """LUSPO: the clipped surrogate summed over each sequence's tokens, then averaged over sequences.

    loss = mean_sequences sum_tokens loss_t

    The paper's setting is `importance_sampling_level: sequence`.

    Args:
        epsilon, epsilon_high, delta, importance_sampling_level: As for `grpo`.

    Source: Liu et al. 2026, arXiv:2602.05261.
    """

    reduction = "sequence_sum"
