"""Binary classifier optimisation on pairs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...base import Metrics
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from .log_ratio import LogRatioLoss


@LossFunctionRegistry.register("bco_pair")
class BCOPairLoss(LogRatioLoss):
    """BCO on pairs: a binary classifier whose logit is the implicit reward (without the paper's reward shift).

    r = beta log_ratio;  loss = -log sigmoid(r_chosen) - log sigmoid(-r_rejected)

    Args:
        beta: Reward scale, > 0.

    Source: Jung et al. 2024, arXiv:2404.04656.
    """

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        chosen, rejected = (self.beta * model_outputs.log_ratios).chunk(2)
        return -F.logsigmoid(chosen) - F.logsigmoid(-rejected), {}
