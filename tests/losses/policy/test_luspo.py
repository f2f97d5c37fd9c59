from __future__ import annotations

import pytest

from trl_custom_losses.losses.policy import LUSPOLoss

from ..singles import on_policy_loss, token_losses


def test_surrogate_is_grpos() -> None:
    assert token_losses(LUSPOLoss(epsilon_high=0.3), [0.5, 1.5], 2.0) == pytest.approx([-2 * 0.5, -2 * 1.3])
    assert token_losses(LUSPOLoss(), [0.5, 1.5], -2.0) == pytest.approx([2 * 0.8, 2 * 1.5])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sums_over_tokens_and_averages_over_sequences(level: str) -> None:
    assert on_policy_loss(LUSPOLoss(importance_sampling_level=level)) == pytest.approx((-2.0 + 3 * 1.0) / 2)
