from __future__ import annotations

from math import log

import pytest

from trl_custom_losses.losses.policy import CISPOLoss

from ..singles import on_policy_data, single_sequence, token_gradients, token_losses

_RATIOS = [0.5, 1.0, 3.0]
_LOGPS = [-1.5 + log(ratio) for ratio in _RATIOS]


@pytest.mark.parametrize(
    ("options", "advantage", "weights"),
    [
        ({"epsilon_high": 2.0}, 2.0, [0.5, 1.0, 2.0]),  # the cap is epsilon_high itself, not 1 + epsilon_high
        ({"epsilon_high": 2.0}, -2.0, [0.5, 1.0, 2.0]),
        ({"epsilon_high": 4.0}, 2.0, [0.5, 1.0, 3.0]),
        ({"epsilon": 0.2}, 2.0, [0.2, 0.2, 0.2]),
        ({"epsilon": 0.9, "epsilon_high": 2.0}, 2.0, [0.5, 1.0, 2.0]),  # no lower bound
    ],
)
def test_values_and_gradients(options: dict[str, float], advantage: float, weights: list[float]) -> None:
    loss = CISPOLoss(**options)
    values = [-w * advantage * logp for w, logp in zip(weights, _LOGPS, strict=True)]
    assert token_losses(loss, _RATIOS, advantage, old=-1.5) == pytest.approx(values)
    # The weight is detached: capped tokens keep their gradient, and w does not add one.
    assert token_gradients(loss, _RATIOS, advantage) == pytest.approx([-w * advantage for w in weights])


def test_sequence_level_shares_the_geometric_mean() -> None:
    loss = CISPOLoss(epsilon_high=5.0, importance_sampling_level="sequence")
    assert token_gradients(loss, [8.0, 1.0, 1.0], 1.0) == pytest.approx([-2.0] * 3)


def test_averages_over_all_tokens() -> None:
    gradient = on_policy_data().gradient(CISPOLoss(epsilon_high=2.0))
    assert gradient.flatten().tolist() == pytest.approx([-2 / 4, 0, 0, 0, 1 / 4, 1 / 4, 1 / 4, 0])


@pytest.mark.parametrize(("advantage", "clipped"), [(2.0, [0, 0, 1]), (-2.0, [0, 0, 0])])
def test_metric_counts_capped_tokens_of_positive_advantage(advantage: float, clipped: list[int]) -> None:
    _, metrics = CISPOLoss(epsilon_high=2.0)(*single_sequence(_RATIOS, advantage))
    assert metrics["cispo_clip_ratio"].value[0].tolist() == clipped
