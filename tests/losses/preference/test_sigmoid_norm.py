from __future__ import annotations

from math import exp, log, log1p

import pytest

from trl_custom_losses.losses.preference import SigmoidNormLoss

from ..singles import pair_gradient, pair_loss


@pytest.mark.parametrize(
    ("chosen", "rejected", "lengths", "expected"),
    [
        (2.0, -1.0, (1, 1), log1p(exp(-0.5 * 3.0))),
        (6.0, -4.0, (3, 2), log1p(exp(-0.5 * (6 / 3 + 4 / 2)))),
        (2.0, 4.0, (2, 4), log(2)),
        (-6.0, 3.0, (4, 1), log1p(exp(0.5 * (6 / 4 + 3)))),
    ],
)
def test_values(chosen: float, rejected: float, lengths: tuple[int, int], expected: float) -> None:
    assert pair_loss(SigmoidNormLoss(beta=0.5), chosen, rejected, lengths) == pytest.approx(expected, rel=1e-12)


def test_gradient_at_margin_zero_is_half_beta() -> None:
    assert pair_gradient(SigmoidNormLoss(beta=0.4), 1.0, 1.0) == pytest.approx((-0.2, 0.2))
