"""CISPO: clipped importance weights on the policy gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...base import Metrics
from ...registry import LossFunctionRegistry
from ...types import Metric, ModelOutputs, PolicyBatch
from .importance import ImportanceWeightedLoss, clip_bounds


@LossFunctionRegistry.register("cispo")
class CISPOLoss(ImportanceWeightedLoss):
    """CISPO: policy gradient with the importance weight capped and detached, so that no token loses its gradient.

    loss_t = -min(w_t, epsilon_high).detach() A logp_t,  averaged over all tokens of the generation batch

    Logs TRL's `cispo_clip_ratio`, for positive advantages alone, and `clipped_sequences` where gradients are monitored.

    Args:
        epsilon: Taken for epsilon_high if that is None, as in TRL.
        epsilon_high: Largest importance weight (not 1 + epsilon_high), >= 0.
        importance_sampling_level: "token" or "sequence".

    Source: MiniMax 2025, arXiv:2506.13585, with the upper cap alone as in arXiv:2510.13786.
    """

    stop_gradient = True

    def __init__(self, *, epsilon: float = 0.2, epsilon_high: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        clip_bounds(epsilon, epsilon_high)
        self.epsilon, self.epsilon_high = epsilon, epsilon_high

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        ratio = torch.exp(self.log_weights(model_outputs)).detach()
        _, cap = clip_bounds(self.epsilon, self.epsilon_high)
        loss = -torch.clamp(ratio, max=cap) * batch.advantages * model_outputs.per_token_logps
        clipped = ((ratio > cap) & (batch.advantages > 0)).float()
        metrics = self.clipped_sequences(lambda: (ratio > cap) & (batch.advantages != 0), batch, model_outputs)
        return loss, {"cispo_clip_ratio": Metric(clipped, per="micro_batch"), **metrics}
