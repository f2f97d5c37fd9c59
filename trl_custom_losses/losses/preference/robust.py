"""Robust DPO for noisy labels."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...base import Metrics
from ...hyperparameters import check_range
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from .score_difference import ScoreDifferenceLoss


@LossFunctionRegistry.register("robust")
class RobustLoss(ScoreDifferenceLoss):
    """Robust DPO: unbiased estimate of the DPO loss when labels are flipped with a known probability.

    z = beta (score_chosen - score_rejected),  e = label_smoothing
    loss = (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e)

    Args:
        label_smoothing: Probability e that a label is flipped, 0 <= e < 1/2.
        beta: Strength of the constraint towards the reference, > 0.
        f_divergence_type, f_alpha_divergence_coef: The scores (see `ScoreDifferenceLoss`).

    Source: Ray Chowdhury et al. 2024, arXiv:2403.00409.
    """

    def __init__(self, *, label_smoothing: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.label_smoothing = check_range("label_smoothing", label_smoothing, at_least=0, below=0.5)

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        margin, flip = self.margin(model_outputs), self.label_smoothing
        loss = flip * F.logsigmoid(-margin) - (1 - flip) * F.logsigmoid(margin)
        return loss / (1 - 2 * flip), {}
