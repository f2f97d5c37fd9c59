from __future__ import annotations

from math import exp, log, log1p

import pytest

from trl_custom_losses.losses.preference import BCOPairLoss

from ..singles import pair_gradient, pair_loss


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (0.0, 0.0, 2 * log(2)),
        (2.0, -4.0, log1p(exp(-1.0)) + log1p(exp(-2.0))),  # r = 1, -2
        (-2.0, 6.0, log1p(exp(1.0)) + log1p(exp(3.0))),
    ],
)
def test_values(chosen: float, rejected: float, expected: float) -> None:
    assert pair_loss(BCOPairLoss(beta=0.5), chosen, rejected) == pytest.approx(expected, rel=1e-12)


def test_classifies_each_completion_by_itself() -> None:
    assert pair_gradient(BCOPairLoss(beta=0.4), 0.0, 0.0) == pytest.approx((-0.2, 0.2))
    assert pair_gradient(BCOPairLoss(beta=0.4), 0.0, 9.0)[0] == pytest.approx(-0.2)
