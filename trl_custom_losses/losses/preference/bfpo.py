"""Bi-factorial preference optimisation: helpfulness and safety as one target margin."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...base import Metrics
from ...hyperparameters import check_range
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from .log_ratio import LogRatioLoss
from .unsafe_labels import UNSAFE_COLUMNS, UNSAFE_EXAMPLES, unsafe_indicators


@LossFunctionRegistry.register("bfpo")
class BFPOLoss(LogRatioLoss):
    """BFPO: squared distance of the log-ratio difference from a target set by which completions are safe.

    loss = (log_ratio_chosen - log_ratio_rejected - target / beta)^2
    target = (b1 safe_chosen - safe_rejected) / (b1 - 1) - alpha,  safe = 1 - unsafe

    `chosen` is the more helpful completion. By default the targets are 1/2 (both safe: IPO with tau = beta on whole
    completions), 1 (only chosen safe), -1 (only rejected safe) and -1/2 (both unsafe: the less helpful one is
    preferred).

    The columns hold 1 for unsafe, as everywhere in this package; the paper's hold 1 for safe. A label of 0.5 or more
    counts as 1, less as 0. The log-ratios are those of whole completions, as in the authors' code; `ipo` here, as in
    TRL, takes them per token. The authors' beta is 0.1, in their recipe 0.01.

    Args:
        b1: How much the safety of `chosen` counts against that of `rejected`, > 1.
        alpha: What is subtracted from every target; at 1/2 the four targets are symmetric about 0.
        beta: Strength of the constraint towards the reference, > 0.

    Source: Zhang et al. 2024, arXiv:2408.15313, and the authors' code.
    """

    columns = UNSAFE_COLUMNS
    column_examples = UNSAFE_EXAMPLES
    prefers_chosen = False

    def __init__(self, *, b1: float = 3.0, alpha: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.b1 = check_range("b1", b1, above=1)
        self.alpha = alpha

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        chosen, rejected = model_outputs.log_ratios.chunk(2)
        chosen_unsafe, rejected_unsafe = unsafe_indicators(batch, chosen)
        factor = (self.b1 * (1 - chosen_unsafe) - (1 - rejected_unsafe)) / (self.b1 - 1)
        return (chosen - rejected - (factor - self.alpha) / self.beta) ** 2, {}
