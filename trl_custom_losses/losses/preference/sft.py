"""Supervised fine-tuning on the chosen completions."""

from __future__ import annotations

from torch import Tensor

from ...base import Metrics, PreferenceLoss
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch


@LossFunctionRegistry.register("sft")
class SFTLoss(PreferenceLoss):
    """Negative log-likelihood of the chosen completions, averaged over all their tokens.

    loss = - sum_tokens log p(token) / number of tokens,  over the chosen completions of the optimizer step

    TRL averages within each micro-batch first, so its value depends on how a batch is split; here the mean is over
    the tokens of the whole batch, which is the same with one micro-batch.

    Source: TRL's `sft`; the generation loss of MPO (Wang et al. 2024, arXiv:2411.10442) averages within each
    completion first, which is the same for completions of one length.
    """

    reduction = "token_mean"
    pair_weighting = "mean"
    f_divergence = "independent"

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        return -model_outputs.per_token_logps[: batch.num_pairs], {}
