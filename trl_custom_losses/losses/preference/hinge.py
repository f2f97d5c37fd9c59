"""Hinge loss (SLiC / RSO)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...base import Metrics
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from .score_difference import ScoreDifferenceLoss


@LossFunctionRegistry.register("hinge")
class HingeLoss(ScoreDifferenceLoss):
    """Hinge loss on the implicit reward margin.

    loss = max(0, 1 - beta (score_chosen - score_rejected))

    Args:
        beta: Strength of the constraint towards the reference, > 0; 1 / beta is the hinge's margin in nats.
        f_divergence_type, f_alpha_divergence_coef: The scores (see `ScoreDifferenceLoss`).

    Source: Liu et al. 2023, arXiv:2309.06657 (RSO); Zhao et al. 2023, arXiv:2305.10425 (SLiC-HF).
    """

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        return torch.relu(1 - self.margin(model_outputs)), {}
