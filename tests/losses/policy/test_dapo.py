from __future__ import annotations

import pytest

from trl_custom_losses.losses.policy import DAPOLoss
from trl_custom_losses.testing import random_data

from ..singles import on_policy_loss, token_losses


def test_surrogate_is_grpos() -> None:
    assert token_losses(DAPOLoss(epsilon_high=0.28), [0.5, 1.5], 2.0) == pytest.approx([-2 * 0.5, -2 * 1.28])
    assert token_losses(DAPOLoss(), [0.5, 1.5], -2.0) == pytest.approx([2 * 0.8, 2 * 1.5])


def test_averages_over_all_tokens() -> None:
    assert on_policy_loss(DAPOLoss()) == pytest.approx((-2.0 + 3 * 1.0) / 4)


def test_divides_by_the_tokens_of_the_whole_batch() -> None:
    data = random_data("policy", lengths=[1, 2, 3, 4])
    part = data.take([1])
    assert part.loss(DAPOLoss(), data.denominators()).item() == pytest.approx(part.loss(DAPOLoss()).item() * 2 / 10)
