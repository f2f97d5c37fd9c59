"""Alignment via optimal transport, on pairs."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...base import Metrics
from ...hyperparameters import check_range
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from .log_ratio import LogRatioLoss


@LossFunctionRegistry.register("aot")
class AOTLoss(LogRatioLoss):
    """AOT: compares the sorted policy margins of a batch with its sorted reference margins.

    d_i = i-th smallest (logp_chosen - logp_rejected) - i-th smallest (the same of the reference)
    loss_i = -(1 - e) log sigmoid(beta d_i) - e log sigmoid(-beta d_i)

    The pairs of a micro-batch are sorted together, so the value depends on how a batch is split.

    Args:
        beta: Strength of the constraint towards the reference, > 0.
        label_smoothing: Probability e that a label is flipped, 0 <= e < 1.

    Source: Melnyk et al. 2024, arXiv:2406.05882.
    """

    batch_coupled = True

    def __init__(self, *, label_smoothing: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.label_smoothing = check_range("label_smoothing", label_smoothing, at_least=0, below=1)

    def differences(self, outputs: ModelOutputs) -> Tensor:
        """d_i, (B,), nats."""
        chosen, rejected = outputs.logps.chunk(2)
        ref_chosen, ref_rejected = outputs.ref_logps.chunk(2)
        return (chosen - rejected).sort().values - (ref_chosen - ref_rejected).sort().values

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        z = self.beta * self.differences(model_outputs)
        return -(1 - self.label_smoothing) * F.logsigmoid(z) - self.label_smoothing * F.logsigmoid(-z), {}
