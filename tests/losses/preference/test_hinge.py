from __future__ import annotations

import pytest

from trl_custom_losses.losses.preference import HingeLoss

from ..singles import pair_gradient, pair_loss


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (1.0, 0.0, 1 - 0.5 * 1.0),
        (-2.0, 1.0, 1 + 0.5 * 3.0),
        (0.0, 0.0, 1.0),
        (2.0, 0.0, 0.0),  # the kink, at 1 / beta
        (5.0, -5.0, 0.0),
    ],
)
def test_values(chosen: float, rejected: float, expected: float) -> None:
    assert pair_loss(HingeLoss(beta=0.5), chosen, rejected) == pytest.approx(expected, abs=1e-12)


def test_gradient_is_beta_below_the_kink_and_nothing_above() -> None:
    assert pair_gradient(HingeLoss(beta=0.5), 1.9, 0.0) == (-0.5, 0.5)
    assert pair_gradient(HingeLoss(beta=0.5), 2.1, 0.0) == (0.0, 0.0)
