"""The conformance kit: is a loss right?

    from trl_custom_losses.testing import check_loss

    check_loss("my_losses:MyLoss", beta=0.1)  # raises LossCheckError, which lists what is wrong, or returns a report

In a test file, one test for each check:

    from trl_custom_losses.testing import parametrize_with_checks

    @parametrize_with_checks("my_losses:MyLoss", beta=0.1)
    def test_my_loss(check):
        check()

The checks see what a trainer would give the loss, made of random numbers: no model, no data set, about a second. What
they are is in `CHECKS`. A loss may declare facts that change what a check expects (`batch_coupled`, `stop_gradient`,
`prefers_chosen`, `reduction`, see `base.Loss`), but no check can be left out; where one then has nothing to say about
the loss, its result has a `note`.
"""

from __future__ import annotations

from .batches import Data
from .check import CHECKS, Check
from .kit import check_loss, parametrize_with_checks, run_checks
from .random_data import extreme_data, random_data
from .report import CheckReport, CheckResult, LossCheckError

__all__ = [
    "CHECKS",
    "Check",
    "CheckReport",
    "CheckResult",
    "Data",
    "LossCheckError",
    "check_loss",
    "extreme_data",
    "parametrize_with_checks",
    "random_data",
    "run_checks",
]
