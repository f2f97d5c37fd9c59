"""Anchored preference optimisation, zero variant."""

from __future__ import annotations

import torch
from torch import Tensor

from ...base import Metrics
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from .log_ratio import LogRatioLoss


@LossFunctionRegistry.register("apo_zero")
class APOZeroLoss(LogRatioLoss):
    """APO-zero: chosen up, rejected down; for data better than the model's own output.

    r = beta log_ratio;  loss = 1 - sigmoid(r_chosen) + sigmoid(r_rejected)

    Args:
        beta: Reward scale, > 0.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7, plus a constant 1.
    """

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        chosen, rejected = (self.beta * model_outputs.log_ratios).chunk(2)
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected), {}
