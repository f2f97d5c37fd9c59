"""Self-play preference optimisation with hard labels."""

from __future__ import annotations

from torch import Tensor

from ...base import Metrics
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from .log_ratio import LogRatioLoss


@LossFunctionRegistry.register("sppo_hard")
class SPPOHardLoss(LogRatioLoss):
    """SPPO with win probabilities 1 and 0: pulls the log-ratios to +1/(2 beta) and -1/(2 beta).

    loss = (log_ratio_chosen - 1/(2 beta))^2 + (log_ratio_rejected + 1/(2 beta))^2

    Args:
        beta: Reciprocal of the paper's eta, > 0.

    Source: Wu et al. 2024, arXiv:2405.00675, equation 4.7.
    """

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        chosen, rejected = model_outputs.log_ratios.chunk(2)
        return (chosen - 0.5 / self.beta) ** 2 + (rejected + 0.5 / self.beta) ** 2, {}
