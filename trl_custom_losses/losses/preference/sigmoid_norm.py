"""DPO on length-normalised scores."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...base import Metrics
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from .score_difference import ScoreDifferenceLoss


@LossFunctionRegistry.register("sigmoid_norm")
class SigmoidNormLoss(ScoreDifferenceLoss):
    """Length-normalised DPO: logistic loss on the margin of scores per token.

    loss = -log sigmoid(beta (score_chosen / length_chosen - score_rejected / length_rejected))

    Args:
        beta: Strength of the constraint towards the reference, > 0.
        f_divergence_type, f_alpha_divergence_coef: The scores (see `ScoreDifferenceLoss`).

    Source: Lambert et al. 2024, arXiv:2411.15124 (Tulu 3), equation 6.
    """

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        return -F.logsigmoid(self.beta * self.mean_margin(model_outputs)), {}
