from __future__ import annotations

import pytest

from trl_custom_losses.losses.policy import GRPOLoss

from ..singles import on_policy_loss, single_sequence, token_gradients, token_losses

_RATIOS = [0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    ("options", "advantage", "expected"),
    [
        ({}, 2.0, [-2 * 0.5, -2 * 1.0, -2 * 1.2]),  # clipped above only
        ({}, -2.0, [2 * 0.8, 2 * 1.0, 2 * 1.5]),  # clipped below only
        ({"epsilon_high": 0.4}, 2.0, [-2 * 0.5, -2 * 1.0, -2 * 1.4]),
        ({"epsilon": 0.3, "epsilon_high": 0.4}, -2.0, [2 * 0.7, 2 * 1.0, 2 * 1.5]),
        ({"delta": 1.3}, -2.0, [2 * 0.8, 2 * 1.0, 2 * 1.3]),  # two-sided
        ({"delta": 1.1}, 2.0, [-2 * 0.5, -2 * 1.0, -2 * 1.1]),
        ({}, 0.0, [0.0, 0.0, 0.0]),
    ],
)
def test_values(options: dict[str, float], advantage: float, expected: list[float]) -> None:
    assert token_losses(GRPOLoss(**options), _RATIOS, advantage) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "advantage", "expected"),
    [
        ({}, 2.0, [-2 * 0.5, -2 * 1.0, 0.0]),
        ({}, -2.0, [0.0, 2 * 1.0, 2 * 1.5]),
        ({"delta": 1.3}, -2.0, [0.0, 2 * 1.0, 0.0]),
        ({"epsilon_high": 0.6}, 2.0, [-2 * 0.5, -2 * 1.0, -2 * 1.5]),
    ],
)
def test_clipped_tokens_get_no_gradient(options: dict[str, float], advantage: float, expected: list[float]) -> None:
    assert token_gradients(GRPOLoss(**options), _RATIOS, advantage) == pytest.approx(expected, abs=1e-12)


def test_sequence_level_shares_the_geometric_mean() -> None:
    loss = GRPOLoss(importance_sampling_level="sequence")
    assert token_losses(loss, [4.0, 1.0, 0.25], 2.0) == pytest.approx([-2.0] * 3)  # mean log-ratio 0
    assert token_losses(loss, [8.0, 1.0, 1.0], 2.0) == pytest.approx([-2 * 1.2] * 3)  # 8^(1/3) = 2, clipped
    assert token_gradients(loss, [4.0, 1.0, 0.25], 2.0) == pytest.approx([-2.0] * 3)


def test_averages_within_then_over_sequences() -> None:
    assert on_policy_loss(GRPOLoss()) == pytest.approx((-2.0 + 1.0) / 2)


@pytest.mark.parametrize(("advantage", "low", "high"), [(2.0, [0, 0, 0], [0, 0, 1]), (-2.0, [1, 0, 0], [0, 0, 0])])
def test_clip_metrics_count_the_side_that_clips(advantage: float, low: list[int], high: list[int]) -> None:
    _, metrics = GRPOLoss()(*single_sequence(_RATIOS, advantage))
    found = {name.removeprefix("clip_ratio/"): metric for name, metric in metrics.items()}
    assert found["low_mean"].value[0].tolist() == found["low_min"].value[0].tolist() == low
    assert found["high_mean"].value[0].tolist() == found["high_max"].value[0].tolist() == high
    assert found["region_mean"].value[0].tolist() == [a + b for a, b in zip(low, high, strict=True)]
    assert [found[name].reduce for name in ("low_mean", "low_min", "high_max")] == ["mean", "min", "max"]
