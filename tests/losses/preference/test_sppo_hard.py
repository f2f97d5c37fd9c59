from __future__ import annotations

import pytest

from trl_custom_losses.losses.preference import SPPOHardLoss

from ..singles import pair_gradient, pair_loss


@pytest.mark.parametrize(
    ("beta", "chosen", "rejected", "expected"),
    [
        (0.1, 5.0, -5.0, 0.0),  # the minimum, at +-1 / (2 beta)
        (0.1, 0.0, 0.0, 5.0**2 + 5.0**2),
        (0.5, 3.0, 2.0, (3 - 1) ** 2 + (2 + 1) ** 2),
        (0.5, -2.0, -4.0, (-2 - 1) ** 2 + (-4 + 1) ** 2),
    ],
)
def test_values(beta: float, chosen: float, rejected: float, expected: float) -> None:
    assert pair_loss(SPPOHardLoss(beta=beta), chosen, rejected) == pytest.approx(expected, abs=1e-9)


def test_gradient_points_to_the_targets() -> None:
    assert pair_gradient(SPPOHardLoss(beta=0.5), 0.0, 0.0) == pytest.approx((-2.0, 2.0))
    assert pair_gradient(SPPOHardLoss(beta=0.5), 3.0, -3.0) == pytest.approx((4.0, -4.0))
