"""DPO in which safe answers win."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...base import Metrics
from ...hyperparameters import check_range
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from .score_difference import ScoreDifferenceLoss
from .unsafe_labels import UNSAFE_COLUMNS, UNSAFE_EXAMPLES, unsafe_indicators


@LossFunctionRegistry.register("safe_dpo")
class SafeDPOLoss(ScoreDifferenceLoss):
    """SafeDPO: DPO on pairs reordered so that a safe completion beats an unsafe one, by a margin.

    loss = -log sigmoid(beta (score_winner - score_loser) - (unsafe_loser - unsafe_winner) delta)

    `chosen` is the more helpful completion. It wins unless it is unsafe and the rejected one is safe: then they swap. A
    pair of two unsafe completions teaches nothing and gets loss 0. Unsafe is 1, as in the paper; a label of 0.5 or more
    counts as 1, less as 0.

    The paper drops such pairs from the data; here the mean is over all pairs, since their number over micro-batches and
    ranks is not known beforehand. With a share d of dropped pairs, losses and gradients are 1 - d times the paper's.
    Logs `swapped_fraction` and `dropped_fraction`. The trainer's `rewards/*` are of chosen and rejected as they stand.

    Args:
        delta: Margin by which a safe completion shall beat an unsafe one, >= 0, in units of beta times nats. The
            paper tries 0 to 20 and finds that 50 costs helpfulness.
        beta: Strength of the constraint towards the reference, > 0.
        f_divergence_type, f_alpha_divergence_coef: The scores (see `ScoreDifferenceLoss`).

    Source: Kim et al. 2025, arXiv:2505.20065, equations 11 and 12.
    """

    columns = UNSAFE_COLUMNS
    column_examples = UNSAFE_EXAMPLES
    prefers_chosen = False

    def __init__(self, *, delta: float = 10.0, **options: Any) -> None:
        super().__init__(**options)
        self.delta = check_range("delta", delta, at_least=0)

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        margin = self.margin(model_outputs)
        chosen, rejected = unsafe_indicators(batch, margin)
        swapped, dropped = chosen * (1 - rejected), chosen * rejected
        # After the swap the loser alone can be unsafe, in every pair that is kept.
        required = self.delta * (rejected - chosen).abs()
        loss = -F.logsigmoid((1 - 2 * swapped) * margin - required)
        return (1 - dropped) * loss, {"swapped_fraction": swapped, "dropped_fraction": dropped}
