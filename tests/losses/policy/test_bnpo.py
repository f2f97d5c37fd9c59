from __future__ import annotations

import pytest

from trl_custom_losses.losses.policy import BNPOLoss
from trl_custom_losses.testing import random_data

from ..singles import on_policy_loss, token_losses


def test_surrogate_is_grpos() -> None:
    assert token_losses(BNPOLoss(epsilon_high=0.3), [0.5, 1.5], 2.0) == pytest.approx([-2 * 0.5, -2 * 1.3])
    assert token_losses(BNPOLoss(), [0.5, 1.5], -2.0) == pytest.approx([2 * 0.8, 2 * 1.5])


def test_averages_over_all_tokens() -> None:
    assert on_policy_loss(BNPOLoss()) == pytest.approx((-2.0 + 3 * 1.0) / 4)


def test_divides_by_the_micro_batchs_own_tokens() -> None:
    data = random_data("policy")
    whole, part = data.denominators(micro_batches=2), data.take([0])
    assert part.loss(BNPOLoss(), whole).item() == pytest.approx(part.loss(BNPOLoss()).item() / 2)
