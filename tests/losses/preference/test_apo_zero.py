from __future__ import annotations

from math import exp

import pytest

from trl_custom_losses.losses.preference import APOZeroLoss

from ..singles import pair_gradient, pair_loss


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (0.0, 0.0, 1.0),
        (2.0, -4.0, 1 / (1 + exp(1.0)) + 1 / (1 + exp(2.0))),  # r = 1, -2
        (-2.0, 6.0, 1 / (1 + exp(-1.0)) + 1 / (1 + exp(-3.0))),
        (100.0, -100.0, 0.0),
    ],
)
def test_values(chosen: float, rejected: float, expected: float) -> None:
    assert pair_loss(APOZeroLoss(beta=0.5), chosen, rejected) == pytest.approx(expected, abs=1e-12)


def test_raises_chosen_and_lowers_rejected() -> None:
    assert pair_gradient(APOZeroLoss(beta=0.4), 0.0, 0.0) == pytest.approx((-0.1, 0.1))
