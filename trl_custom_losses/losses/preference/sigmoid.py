"""DPO's logistic loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...base import Metrics
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from .score_difference import ScoreDifferenceLoss


@LossFunctionRegistry.register("sigmoid")
class SigmoidLoss(ScoreDifferenceLoss):
    """DPO: logistic loss on the implicit reward margin.

    loss = -log sigmoid(beta (score_chosen - score_rejected))

    Args:
        beta: Strength of the constraint towards the reference, > 0.
        f_divergence_type, f_alpha_divergence_coef: The scores (see `ScoreDifferenceLoss`).

    Source: Rafailov et al. 2023, arXiv:2305.18290.
    """

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        return -F.logsigmoid(self.margin(model_outputs)), {}
