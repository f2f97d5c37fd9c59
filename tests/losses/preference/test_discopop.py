from __future__ import annotations

from math import exp, log, log1p

import pytest

from trl_custom_losses import LossConfigError
from trl_custom_losses.losses.preference import DiscoPOPLoss

from ..singles import pair_gradient, pair_loss


@pytest.mark.parametrize(
    ("tau", "margin"),
    [(0.05, 0.4), (0.05, -0.4), (0.5, 1.5), (2.0, -3.0)],
)
def test_blends_logistic_and_exponential(tau: float, margin: float) -> None:
    z = 0.1 * margin
    m = 1 / (1 + exp(-z / tau))
    expected = (1 - m) * log1p(exp(-z)) + m * exp(-z)
    assert pair_loss(DiscoPOPLoss(beta=0.1, discopop_tau=tau), margin, 0.0) == pytest.approx(expected, rel=1e-12)


def test_value_at_margin_zero() -> None:
    assert pair_loss(DiscoPOPLoss(), 0.0, 0.0) == pytest.approx(0.5 * log(2) + 0.5)


def test_limits() -> None:
    assert pair_loss(DiscoPOPLoss(beta=1.0), 5.0, 0.0) == pytest.approx(exp(-5.0), rel=1e-9)
    assert pair_loss(DiscoPOPLoss(beta=1.0), -5.0, 0.0) == pytest.approx(log1p(exp(5.0)), rel=1e-9)


def test_a_very_negative_margin_is_logistic_not_infinite() -> None:
    assert pair_loss(DiscoPOPLoss(beta=1.0), -1000.0, 0.0) == pytest.approx(1000.0)
    assert pair_gradient(DiscoPOPLoss(beta=1.0), -1000.0, 0.0) == pytest.approx((-1.0, 1.0))


def test_refuses_temperature_zero() -> None:
    with pytest.raises(LossConfigError, match="discopop_tau"):
        DiscoPOPLoss(discopop_tau=0.0)
