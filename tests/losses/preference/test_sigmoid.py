from __future__ import annotations

from math import exp, log, log1p

import pytest

from trl_custom_losses.losses.preference import SigmoidLoss

from ..singles import pair_gradient, pair_loss


@pytest.mark.parametrize(
    ("beta", "chosen", "rejected", "expected"),
    [
        (0.1, 2.0, -1.0, log1p(exp(-0.3))),  # -log sigmoid(0.1 (2 + 1))
        (0.5, -4.0, 2.0, log1p(exp(3.0))),
        (0.1, 3.0, 3.0, log(2)),
    ],
)
def test_values(beta: float, chosen: float, rejected: float, expected: float) -> None:
    assert pair_loss(SigmoidLoss(beta=beta), chosen, rejected) == pytest.approx(expected, rel=1e-12)


def test_falls_as_the_margin_grows() -> None:
    losses = [pair_loss(SigmoidLoss(), margin, 0.0) for margin in (-5.0, -1.0, 0.0, 1.0, 5.0)]
    assert losses == sorted(losses, reverse=True)


def test_gradient_at_margin_zero_is_half_beta() -> None:
    assert pair_gradient(SigmoidLoss(beta=0.4), 1.0, 1.0) == pytest.approx((-0.2, 0.2))


def test_length_does_not_matter() -> None:
    assert pair_loss(SigmoidLoss(), 2.0, -1.0, lengths=(4, 2)) == pytest.approx(pair_loss(SigmoidLoss(), 2.0, -1.0))
