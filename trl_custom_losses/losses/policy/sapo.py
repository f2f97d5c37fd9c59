"""SAPO: a soft gate in place of clipping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...base import Metrics
from ...hyperparameters import check_range
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PolicyBatch
from .importance import ImportanceWeightedLoss


@LossFunctionRegistry.register("sapo")
class SAPOLoss(ImportanceWeightedLoss):
    """SAPO: the ratio passes a sigmoid gate whose slope is 1 at ratio 1 and fades on both sides.

    loss_t = -(4 / tau) sigmoid(tau (w_t - 1)) A,  tau by the sign of A;  averaged as in grpo

    Args:
        sapo_temperature_pos: tau where A > 0, > 0.
        sapo_temperature_neg: tau where A <= 0, > 0; larger fades faster.
        importance_sampling_level: "token" or "sequence".

    Source: Gao et al. 2025, arXiv:2511.20347.
    """

    reduction = "sequence_mean"

    def __init__(
        self, *, sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05, **options: Any
    ) -> None:
        super().__init__(**options)
        self.sapo_temperature_pos = check_range("sapo_temperature_pos", sapo_temperature_pos, above=0)
        self.sapo_temperature_neg = check_range("sapo_temperature_neg", sapo_temperature_neg, above=0)

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        ratio = torch.exp(self.log_weights(model_outputs))
        positive, negative = (ratio.new_full((), tau) for tau in (self.sapo_temperature_pos, self.sapo_temperature_neg))
        tau = torch.where(batch.advantages > 0, positive, negative)
        return -torch.sigmoid(tau * (ratio - 1)) * (4 / tau) * batch.advantages, {}
