from __future__ import annotations

from math import log

import pytest
import torch

from trl_custom_losses import LossConfigError, LossFunctionRegistry, ModelOutputs
from trl_custom_losses.losses.policy.importance import ImportanceLevel, check_delta, clip_bounds, log_importance_weights


def _outputs() -> ModelOutputs:
    return ModelOutputs(
        per_token_logps=torch.tensor([[-1.0, -2.0, 5.0], [-3.0, 5.0, 5.0]]),
        old_per_token_logps=torch.tensor([[-2.0, -4.0, 0.0], [-2.5, 0.0, 0.0]]),
        mask=torch.tensor([[1, 1, 0], [1, 0, 0]]),
    )


def test_token_level_is_the_difference() -> None:
    assert log_importance_weights(_outputs(), "token")[0, :2].tolist() == [1.0, 2.0]


def test_sequence_level_is_the_mean_over_scored_tokens() -> None:
    assert log_importance_weights(_outputs(), "sequence").tolist() == [[(1.0 + 2.0) / 2], [-0.5]]


def test_sequence_level_of_an_empty_completion_is_zero() -> None:
    outputs = _outputs()
    outputs.mask = torch.zeros_like(outputs.mask)
    assert log_importance_weights(outputs, "sequence").tolist() == [[0.0], [0.0]]


def test_sequence_weights_are_geometric_means() -> None:
    logs = torch.tensor([[log(2.0), log(8.0)]])
    outputs = ModelOutputs(
        per_token_logps=logs, old_per_token_logps=torch.zeros(1, 2), mask=torch.ones(1, 2, dtype=torch.long)
    )
    assert log_importance_weights(outputs, "sequence").exp().item() == pytest.approx(4.0)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_log_weights_are_held_within_60_nats(level: ImportanceLevel) -> None:
    logs = torch.tensor([[59.0], [61.0], [1e4], [-1e4]], requires_grad=True)
    outputs = ModelOutputs(
        per_token_logps=logs, old_per_token_logps=torch.zeros(4, 1), mask=torch.ones(4, 1, dtype=torch.long)
    )
    weights = log_importance_weights(outputs, level)
    weights.sum().backward()
    assert weights.flatten().tolist() == [59.0, 60.0, 60.0, -60.0]
    assert logs.grad.flatten().tolist() == [1, 0, 0, 0]


def test_upper_clip_range_defaults_to_the_lower() -> None:
    assert clip_bounds(0.2, None) == (0.2, 0.2)
    assert clip_bounds(0.2, 0.0) == (0.2, 0.0)
    assert clip_bounds(0.2, 0.28) == (0.2, 0.28)


@pytest.mark.parametrize(("low", "high", "named"), [(-0.1, None, "epsilon"), (0.2, -0.1, "epsilon_high")])
def test_clip_range_is_checked(low: float, high: float | None, named: str) -> None:
    with pytest.raises(LossConfigError, match=f"'{named}'"):
        clip_bounds(low, high)


@pytest.mark.parametrize("delta", [0.0, -1.0])
def test_delta_is_checked(delta: float) -> None:
    with pytest.raises(LossConfigError, match="'delta'"):
        check_delta(delta)


def test_unknown_level_is_refused() -> None:
    with pytest.raises(LossConfigError, match="importance_sampling_level"):
        LossFunctionRegistry.build({"type": "grpo", "importance_sampling_level": "turn"})
