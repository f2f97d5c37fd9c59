"""Likelihood of the completions, reported as perplexity."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ...base import Metrics
from ...hyperparameters import check_choice
from ...registry import LossFunctionRegistry
from ...types import Metric, ModelOutputs, PreferenceBatch
from ..preference.sft import SFTLoss

Completions = Literal["chosen", "both"]


@LossFunctionRegistry.register("perplexity")
class PerplexityLoss(SFTLoss):
    """Negative log-likelihood per completion token, which keeps the model fluent beside a preference loss.

    loss = - sum_tokens log p(token) / number of tokens,  over the completions of the optimizer step

    With `completions="chosen"` it is `sft`. Logs `perplexity`, exp of the mean over all tokens since the last log, of
    all micro-batches and ranks; in evaluation, that of the data set.

    The tutorial averages over all positions, prompts and padding included, and compares each logit with the token at
    its own position in place of the next one; this is the likelihood of the completions.

    Args:
        completions: "chosen", or "both" for the rejected ones too.

    Source: NeMo RL's tutorial on custom losses.
    """

    def __init__(self, *, completions: Completions = "chosen") -> None:
        super().__init__()
        self.completions = check_choice("completions", completions, Completions)
        self.prefers_chosen = completions == "chosen"

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        if self.completions == "both":
            loss = -model_outputs.per_token_logps
        else:
            loss, _ = super().forward(batch, model_outputs)
        return loss, {"perplexity": Metric(loss.detach(), reduce="exp")}
