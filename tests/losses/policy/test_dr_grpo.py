from __future__ import annotations

import pytest

from trl_custom_losses import LossConfigError, LossFunctionRegistry
from trl_custom_losses.losses.policy import DrGRPOLoss

from ..singles import on_policy_loss, token_losses


def test_surrogate_is_grpos() -> None:
    loss = DrGRPOLoss(max_completion_length=8, epsilon_high=0.3)
    assert token_losses(loss, [0.5, 1.5], 2.0) == pytest.approx([-2 * 0.5, -2 * 1.3])
    assert token_losses(loss, [0.5, 1.5], -2.0) == pytest.approx([2 * 0.8, 2 * 1.5])


def test_every_sequence_counts_for_the_fixed_length() -> None:
    assert on_policy_loss(DrGRPOLoss(max_completion_length=8)) == pytest.approx((-2.0 + 3 * 1.0) / (2 * 8))


def test_length_comes_from_the_trainer() -> None:
    loss = LossFunctionRegistry.build("dr_grpo", family="policy", defaults={"max_completion_length": 4})
    assert on_policy_loss(loss) == pytest.approx((-2.0 + 3 * 1.0) / (2 * 4))


def test_length_is_needed_and_positive() -> None:
    with pytest.raises(LossConfigError, match="needs the hyperparameter 'max_completion_length'"):
        LossFunctionRegistry.build("dr_grpo")
    with pytest.raises(LossConfigError, match="'max_completion_length'"):
        DrGRPOLoss(max_completion_length=0)
