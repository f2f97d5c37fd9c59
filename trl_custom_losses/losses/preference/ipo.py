"""Identity preference optimisation."""

from __future__ import annotations

import math

from torch import Tensor

from ...base import Metrics
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from .score_difference import ScoreDifferenceLoss

# The square of its exponential is within float32.
_LARGEST_EXPONENT = 40.0


@LossFunctionRegistry.register("ipo")
class IPOLoss(ScoreDifferenceLoss):
    """IPO: squared distance of the score margin per token from 1 / (2 beta).

    loss = (score_chosen / length_chosen - score_rejected / length_rejected - 1 / (2 beta))^2

    The paper's formula has the score of the whole completion; dividing by the number of its tokens is what TRL does,
    on the word of the paper's authors. Scores of f-divergences are held at e^40, where TRL's, held at e^80, have
    squares beyond float32.

    Args:
        beta: The paper's regularisation tau, > 0.
        f_divergence_type, f_alpha_divergence_coef: The scores (see `ScoreDifferenceLoss`).

    Source: Azar et al. 2023, arXiv:2310.12036, equation 17.
    """

    @property
    def largest_exponent(self) -> float:  # type: ignore[override]
        """Scores are squared, and those of the alpha-divergence divided by c - 1."""
        power = abs(self.f_alpha_divergence_coef - 1)
        return _LARGEST_EXPONENT + min(0.0, math.log(max(power, 1e-6)))

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        return (self.mean_margin(model_outputs) - 1 / (2 * self.beta)) ** 2, {}
