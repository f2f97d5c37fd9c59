"""GRPO's surrogate averaged over all tokens of the batch."""

from __future__ import annotations

from ...registry import LossFunctionRegistry
from .grpo import GRPOLoss


@LossFunctionRegistry.register("dapo")
class DAPOLoss(GRPOLoss):
    """DAPO: the clipped surrogate averaged over all tokens of the generation batch.

    loss = sum_tokens loss_t / number of tokens,  over all ranks and accumulated micro-batches

    The paper averages over the tokens of each prompt's group; the batch's tokens are TRL's reading.

    Args:
        epsilon, epsilon_high, delta, importance_sampling_level: As for `grpo`.

    Source: Yu et al. 2025, arXiv:2503.14476.
    """

    reduction = "token_mean"
