from __future__ import annotations

import pytest

from trl_custom_losses.losses.preference import IPOLoss
from trl_custom_losses.testing import extreme_data

from ..singles import pair_gradient, pair_loss


@pytest.mark.parametrize(
    ("beta", "chosen", "rejected", "lengths", "expected"),
    [
        (0.25, 0.0, 0.0, (1, 1), (1 / (2 * 0.25)) ** 2),
        (0.25, 3.0, -2.0, (2, 4), (3 / 2 + 2 / 4 - 2.0) ** 2),  # per token: the minimum
        (0.1, 3.0, -2.0, (1, 1), (5.0 - 5.0) ** 2),
        (0.1, 1.0, 2.0, (1, 2), (1 - 2 / 2 - 5.0) ** 2),
        (0.5, 4.0, -1.0, (1, 1), (5.0 - 1.0) ** 2),
    ],
)
def test_values(beta: float, chosen: float, rejected: float, lengths: tuple[int, int], expected: float) -> None:
    assert pair_loss(IPOLoss(beta=beta), chosen, rejected, lengths) == pytest.approx(expected, abs=1e-12)


def test_pulls_the_margin_to_its_target_from_both_sides() -> None:
    assert pair_gradient(IPOLoss(beta=0.1), 2.0, 0.0) == pytest.approx((2 * (2 - 5), -2 * (2 - 5)))
    assert pair_gradient(IPOLoss(beta=0.1), 9.0, 0.0) == pytest.approx((2 * (9 - 5), -2 * (9 - 5)))
    assert pair_gradient(IPOLoss(beta=0.1), 5.0, 0.0) == pytest.approx((0, 0), abs=1e-12)


@pytest.mark.parametrize("coefficient", [0.5, 0.999, 1.004, 2.0])
@pytest.mark.parametrize("nats", [-1e4, 1e4])
def test_squares_of_scores_are_finite_in_float32(coefficient: float, nats: float) -> None:
    options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": coefficient}
    data = extreme_data("preference", log_ratios=[nats, -nats])
    loss = IPOLoss(**options)
    assert data.loss(loss).isfinite() and data.gradient(loss).isfinite().all()
