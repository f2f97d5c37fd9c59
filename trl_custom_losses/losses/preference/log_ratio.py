"""What the losses on the policy/reference log-ratios share: the need for a reference, and beta."""

from __future__ import annotations

from ...base import PreferenceLoss
from ...hyperparameters import check_range


class LogRatioLoss(PreferenceLoss):
    """Base of losses of `beta * log_ratio`, the implicit reward of a completion.

    Args:
        beta: Reward scale, > 0, per nat.
    """

    requires = frozenset({"ref_logps"})

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = check_range("beta", beta, above=0)
