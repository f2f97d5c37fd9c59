from __future__ import annotations

from math import exp

import pytest

from trl_custom_losses.losses.preference import APODownLoss

from ..singles import pair_gradient, pair_loss


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (0.0, 0.0, 1.0),
        (2.0, -4.0, 1 / (1 + exp(-1.0)) + 1 - 1 / (1 + exp(-3.0))),  # r = 1, -2
        (-2.0, 6.0, 1 / (1 + exp(1.0)) + 1 - 1 / (1 + exp(4.0))),
        (-100.0, -300.0, 0.0),
    ],
)
def test_values(chosen: float, rejected: float, expected: float) -> None:
    assert pair_loss(APODownLoss(beta=0.5), chosen, rejected) == pytest.approx(expected, abs=1e-12)


def test_lowers_both_once_the_margin_is_there() -> None:
    # At 0 the two pulls on chosen cancel.
    assert pair_gradient(APODownLoss(beta=0.4), 0.0, 0.0) == pytest.approx((0.0, 0.1))
    chosen, rejected = pair_gradient(APODownLoss(beta=0.4), 0.0, -20.0)
    assert chosen > 0.09 and rejected > 0
