"""Alignment via optimal transport, on unpaired completions."""

from __future__ import annotations

from torch import Tensor

from ...registry import LossFunctionRegistry
from ...types import ModelOutputs
from .aot import AOTLoss


@LossFunctionRegistry.register("aot_unpaired")
class AOTUnpairedLoss(AOTLoss):
    """AOT without pairs: compares the sorted log-ratios of chosen completions with those of rejected ones.

    d_i = i-th smallest log_ratio_chosen - i-th smallest log_ratio_rejected
    loss_i = -(1 - e) log sigmoid(beta d_i) - e log sigmoid(-beta d_i)

    The completions of a micro-batch are sorted together, so the value depends on how a batch is split.

    Args:
        beta: Strength of the constraint towards the reference, > 0.
        label_smoothing: Probability e that a label is flipped, 0 <= e < 1.

    Source: Melnyk et al. 2024, arXiv:2406.05882.
    """

    def differences(self, outputs: ModelOutputs) -> Tensor:
        chosen, rejected = outputs.log_ratios.chunk(2)
        return chosen.sort().values - rejected.sort().values
