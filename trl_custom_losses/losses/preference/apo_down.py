"""Anchored preference optimisation, down variant."""

from __future__ import annotations

import torch
from torch import Tensor

from ...base import Metrics
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from .log_ratio import LogRatioLoss


@LossFunctionRegistry.register("apo_down")
class APODownLoss(LogRatioLoss):
    """APO-down: chosen down, rejected further down; for data worse than the model's own output.

    r = beta log_ratio;  loss = sigmoid(r_chosen) + 1 - sigmoid(r_chosen - r_rejected)

    Args:
        beta: Reward scale, > 0.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8, plus a constant 1.
    """

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        chosen, rejected = (self.beta * model_outputs.log_ratios).chunk(2)
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen), {}
