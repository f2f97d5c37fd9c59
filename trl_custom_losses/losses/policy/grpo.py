"""GRPO's clipped surrogate; its relatives differ in the reduction alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...base import Metrics
from ...registry import LossFunctionRegistry
from ...types import Metric, ModelOutputs, PolicyBatch
from .importance import ImportanceWeightedLoss, check_delta, clip_bounds


@LossFunctionRegistry.register("grpo")
class GRPOLoss(ImportanceWeightedLoss):
    """GRPO: clipped surrogate, averaged over each sequence's tokens, then over sequences.

    loss_t = -min(w_t A, clip(w_t, 1 - epsilon, 1 + epsilon_high) A),  w_t capped at delta in the first term

    Logs TRL's `clip_ratio/*`, and `clipped_sequences` where gradients are monitored.

    Args:
        epsilon: Lower clip range, >= 0.
        epsilon_high: Upper clip range, >= 0; None takes epsilon.
        delta: Upper bound of the unclipped ratio (two-sided clipping, arXiv:2505.07291), > 0; None has none.
        importance_sampling_level: "token", or "sequence" for GSPO (arXiv:2507.18071).

    Source: Shao et al. 2024, arXiv:2402.03300.
    """

    reduction = "sequence_mean"

    def __init__(
        self,
        *,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        delta: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        clip_bounds(epsilon, epsilon_high)
        self.epsilon, self.epsilon_high = epsilon, epsilon_high
        self.delta = check_delta(delta)

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        below, above = clip_bounds(self.epsilon, self.epsilon_high)
        low, high = 1 - below, 1 + above
        free = ratio = torch.exp(self.log_weights(model_outputs))
        clipped = torch.clamp(ratio, low, high)
        if self.delta is not None:
            ratio = torch.clamp(ratio, max=self.delta)
        loss = -torch.min(ratio * batch.advantages, clipped * batch.advantages)
        with torch.no_grad():
            low_clipped = ((ratio < low) & (batch.advantages < 0)).float()
            high_clipped = ((ratio > high) & (batch.advantages > 0)).float()

        def held() -> Tensor:
            """Where the loss no longer follows the ratio: past `top` for A > 0, below `low` or past `cap` for A < 0."""
            top, cap = (high, torch.inf) if self.delta is None else (min(high, self.delta), max(high, self.delta))
            past = torch.where(batch.advantages > 0, free > top, (free < low) | (free > cap))
            return past & (batch.advantages != 0)

        return loss, {
            **self.clipped_sequences(held, batch, model_outputs),
            "clip_ratio/low_mean": Metric(low_clipped, per="micro_batch"),
            "clip_ratio/high_mean": Metric(high_clipped, per="micro_batch"),
            "clip_ratio/region_mean": Metric(low_clipped + high_clipped, per="micro_batch"),
            "clip_ratio/low_min": Metric(low_clipped, reduce="min"),
            "clip_ratio/high_max": Metric(high_clipped, reduce="max"),
        }
