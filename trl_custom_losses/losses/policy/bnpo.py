"""GRPO's surrogate averaged over the tokens of each micro-batch."""

from __future__ import annotations

from ...registry import LossFunctionRegistry
from .grpo import GRPOLoss


@LossFunctionRegistry.register("bnpo")
class BNPOLoss(GRPOLoss):
    """BNPO: the clipped surrogate averaged over the tokens of each micro-batch.

    loss = sum_tokens loss_t / number of tokens,  within each micro-batch, then the mean over micro-batches

    The normaliser is the micro-batch's own, as in TRL, so the value depends on how a batch is split.

    Args:
        epsilon, epsilon_high, delta, importance_sampling_level: As for `grpo`.

    Source: TRL's `bnpo`, which names no paper; the surrogate is that of arXiv:2402.03300.
    """

    reduction = "local_token_mean"
