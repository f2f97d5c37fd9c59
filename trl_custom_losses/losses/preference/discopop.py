"""DiscoPOP: a loss discovered by a language model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base import Metrics
from ...hyperparameters import check_range
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from .score_difference import ScoreDifferenceLoss, bounded_exp


@LossFunctionRegistry.register("discopop")
class DiscoPOPLoss(ScoreDifferenceLoss):
    """DiscoPOP (log-ratio modulated loss): logistic where the margin is negative, exponential where it is positive.

    z = beta (score_chosen - score_rejected),  m = sigmoid(z / tau)
    loss = -(1 - m) log sigmoid(z) + m exp(-z)

    The paper's setting is beta = tau = 0.05. The loss is not convex: its slope at z = 0 is (1 - log 2) / (4 tau) - 1/2,
    so that for tau below 0.15 it rises there with the margin.

    Args:
        discopop_tau: Temperature tau of the modulation, > 0.
        beta: Strength of the constraint towards the reference, > 0.
        f_divergence_type, f_alpha_divergence_coef: The scores (see `ScoreDifferenceLoss`).

    Source: Lu et al. 2024, arXiv:2406.08414, equation 5.
    """

    prefers_chosen = False

    def __init__(self, *, discopop_tau: float = 0.05, **options: Any) -> None:
        super().__init__(**options)
        self.discopop_tau = check_range("discopop_tau", discopop_tau, above=0)

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        z = self.margin(model_outputs)
        modulation = torch.sigmoid(z / self.discopop_tau)
        # m exp(-z) = exp(log m - z) stays finite where exp(-z) alone overflows and m underflows: with tau < 1, m
        # vanishes faster than exp(-z) grows.
        exponential = bounded_exp(F.logsigmoid(z / self.discopop_tau) - z)
        return exponential - (1 - modulation) * F.logsigmoid(z), {}
