from __future__ import annotations

from math import exp

import pytest

from trl_custom_losses import LossConfigError
from trl_custom_losses.losses.policy import SAPOLoss

from ..singles import on_policy_loss, token_gradients, token_losses

_RATIOS = [0.5, 1.0, 3.0]


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 2.0), (-2.0, 3.0)])
def test_values(advantage: float, tau: float) -> None:
    loss = SAPOLoss(sapo_temperature_pos=2.0, sapo_temperature_neg=3.0)
    expected = [-(4 / tau) / (1 + exp(-tau * (ratio - 1))) * advantage for ratio in _RATIOS]
    assert token_losses(loss, _RATIOS, advantage) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_slope_at_ratio_one_is_one_for_every_temperature(tau: float, advantage: float) -> None:
    loss = SAPOLoss(sapo_temperature_pos=tau, sapo_temperature_neg=tau)
    assert token_gradients(loss, [1.0], advantage) == pytest.approx([-advantage])


def test_slope_fades_on_both_sides() -> None:
    per_ratio = [-token_gradients(SAPOLoss(sapo_temperature_pos=5.0), [r], 1.0)[0] / r for r in (0.2, 0.6, 1, 1.4, 2)]
    assert per_ratio[0] < per_ratio[1] < per_ratio[2] > per_ratio[3] > per_ratio[4]


def test_averages_within_then_over_sequences() -> None:
    loss = SAPOLoss(sapo_temperature_pos=2.0, sapo_temperature_neg=4.0)
    assert on_policy_loss(loss) == pytest.approx((-(4 / 2) * 0.5 * 2 + (4 / 4) * 0.5 * 1) / 2)


@pytest.mark.parametrize("name", ["sapo_temperature_pos", "sapo_temperature_neg"])
def test_refuses_temperature_zero(name: str) -> None:
    with pytest.raises(LossConfigError, match=name):
        SAPOLoss(**{name: 0.0})
