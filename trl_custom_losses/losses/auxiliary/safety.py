"""Unlikelihood of unsafe completions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base import Metrics, PreferenceLoss
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from ..preference.unsafe_labels import UNSAFE_COLUMNS, unsafe_labels

# A log-probability is a difference of numbers of size 10 in float32 and so exact to about 1e-6. Nearer to 0 than that,
# 1 - p is rounding noise.
_NEAREST = 1e-6


@LossFunctionRegistry.register("safety")
class SafetyLoss(PreferenceLoss):
    """Unlikelihood: lowers the probability of the tokens of completions that are marked unsafe.

    loss = - sum_t unsafe log(1 - p_t) / number of tokens,  t and number: all completion tokens of the optimizer step

    Chosen and rejected completions alike count by their column `chosen_unsafe` or `rejected_unsafe`: 0 is safe and gets
    no gradient, 1 is unsafe, a value between weights. The divisor counts safe completions too, as the authors'
    sequence-level code divides by all tokens and not by the penalised ones: the rarer unsafe text is, the smaller the
    term, and a batch without any gives 0.

    The authors hold 1 - p above 1e-20 or 1e-5, so that a token gets no gradient where p is (nearly) 1, which is where
    it needs it. Here log(1 - p) goes on as its tangent from log p = -1e-6, so value and gradient are finite everywhere
    and the gradient is largest at p = 1. Logs `unsafe_fraction`, the mean label.

    Args:
        scorer: Import path `package.module:function` of a function that takes a list of texts, the completions without
            their prompts (of a conversation, the assistant's turns), and returns a list of numbers, 0 (safe) to 1
            (unsafe). The trainer fills missing columns with it, once, before training; a column that the data set has
            is left as it is. None: the data set must have the columns.

    Errors: Neither columns nor `scorer` (at the trainer's construction), a `scorer` that cannot be imported. A label
    outside of 0..1 makes the loss NaN, on which the trainer stops.

    Source: Welleck et al. 2019, arXiv:1908.04319.
    """

    columns = UNSAFE_COLUMNS
    prefers_chosen = False
    reduction = "token_mean"
    f_divergence = "independent"

    def __init__(self, *, scorer: str | None = None) -> None:
        super().__init__()
        self.scorer = scorer

    @property
    def column_scorers(self) -> Mapping[str, tuple[str, str]]:
        """Which completion's text makes which column."""
        return {} if self.scorer is None else {f"{side}_unsafe": (side, self.scorer) for side in ("chosen", "rejected")}

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        unsafe = torch.cat(unsafe_labels(batch, model_outputs.per_token_logps))
        loss = unsafe.unsqueeze(1) * unlikelihood(model_outputs.per_token_logps)
        return loss, {"unsafe_fraction": unsafe}


def unlikelihood(logps: Tensor) -> Tensor:
    """-log(1 - exp(logps)), continued from -1e-6 on by its tangent, of any shape.

    Args:
        logps: Log-probabilities, nats.
    """
    inside = -torch.log(-torch.expm1(logps.clamp(max=-_NEAREST)))
    return inside + F.relu(logps + _NEAREST) / math.expm1(_NEAREST)
