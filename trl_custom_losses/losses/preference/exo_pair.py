"""Exact optimisation (EXO) on pairs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base import Metrics
from ...hyperparameters import check_range
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from .score_difference import ScoreDifferenceLoss


@LossFunctionRegistry.register("exo_pair")
class EXOPairLoss(ScoreDifferenceLoss):
    """EXO: reverse KL from the policy's preference distribution over the pair to the smoothed labels.

    q = sigmoid(beta (score_chosen - score_rejected)),  e = label_smoothing
    loss = q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e)

    Args:
        label_smoothing: Probability e that the rejected completion is the better one, 0 < e < 1; the paper takes
            1e-3. There is no loss at e = 0, so it has no default.
        beta: Strength of the constraint towards the reference, > 0.
        f_divergence_type, f_alpha_divergence_coef: The scores (see `ScoreDifferenceLoss`).

    Source: Ji et al. 2024, arXiv:2402.00856, equation 16.
    """

    example = {"label_smoothing": 0.1}

    def __init__(self, *, label_smoothing: float, **options: Any) -> None:
        super().__init__(**options)
        self.label_smoothing = check_range("label_smoothing", label_smoothing, above=0, below=1)

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        margin = self.margin(model_outputs)
        chosen = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-self.label_smoothing))
        rejected = torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(self.label_smoothing))
        return chosen + rejected, {}
