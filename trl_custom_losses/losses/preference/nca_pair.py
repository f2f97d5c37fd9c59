"""Noise-contrastive alignment on pairs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...base import Metrics
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from .log_ratio import LogRatioLoss


@LossFunctionRegistry.register("nca_pair")
class NCAPairLoss(LogRatioLoss):
    """NCA: raises the chosen reward's absolute value, not only its margin.

    r = beta log_ratio
    loss = -log sigmoid(r_chosen) - 1/2 log sigmoid(-r_chosen) - 1/2 log sigmoid(-r_rejected)

    Args:
        beta: Reward scale, > 0.

    Source: Chen et al. 2024, arXiv:2402.05369.
    """

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        chosen, rejected = (self.beta * model_outputs.log_ratios).chunk(2)
        return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)), {}
