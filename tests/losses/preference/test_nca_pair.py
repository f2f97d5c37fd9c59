from __future__ import annotations

from math import exp, log, log1p

import pytest

from trl_custom_losses.losses.preference import NCAPairLoss

from ..singles import pair_gradient, pair_loss


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (0.0, 0.0, 2 * log(2)),
        (2.0, -4.0, log1p(exp(-1.0)) + 0.5 * log1p(exp(1.0)) + 0.5 * log1p(exp(-2.0))),  # r = 1, -2
        (-2.0, 6.0, log1p(exp(1.0)) + 0.5 * log1p(exp(-1.0)) + 0.5 * log1p(exp(3.0))),
    ],
)
def test_values(chosen: float, rejected: float, expected: float) -> None:
    assert pair_loss(NCAPairLoss(beta=0.5), chosen, rejected) == pytest.approx(expected, rel=1e-12)


def test_gradient_raises_chosen_and_lowers_rejected() -> None:
    # At 0: chosen -1/2 + 1/4, rejected 1/4, times beta.
    assert pair_gradient(NCAPairLoss(beta=0.4), 0.0, 0.0) == pytest.approx((-0.1, 0.1))


def test_chosen_reward_settles_at_log_two() -> None:
    # -sigmoid(-r) + sigmoid(r) / 2 = 0  at  sigmoid(r) = 2/3.
    assert pair_gradient(NCAPairLoss(beta=1.0), log(2), 0.0)[0] == pytest.approx(0, abs=1e-12)
