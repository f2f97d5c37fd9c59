from __future__ import annotations

from math import exp, log

import pytest
import torch

from trl_custom_losses import LossConfigError
from trl_custom_losses.losses.policy import VESPOLoss
from trl_custom_losses.reductions import reduce_loss

from ..singles import on_policy_data, single_sequence, token_gradients, token_losses


def _phi(weight: float, k: float, rate: float) -> float:
    return exp(rate) * weight**k * exp(-rate * weight)


@pytest.mark.parametrize(
    ("ratios", "advantage", "phi"),
    [
        ([1.0, 1.0], 2.0, 1.0),
        ([1.0, 1.0], -2.0, 1.0),
        ([0.5, 4.0], 2.0, _phi(2.0, 2.0, 3.0)),  # the product of the ratios, not their mean
        ([0.5, 4.0], -2.0, _phi(2.0, 3.0, 2.0)),
        ([0.5, 0.5], 2.0, _phi(0.25, 2.0, 3.0)),
    ],
)
def test_values_and_gradients(ratios: list[float], advantage: float, phi: float) -> None:
    values = [-phi * advantage * (-1.5 + log(ratio)) for ratio in ratios]
    assert token_losses(VESPOLoss(), ratios, advantage, old=-1.5) == pytest.approx(values, rel=1e-9)
    assert token_gradients(VESPOLoss(), ratios, advantage) == pytest.approx([-phi * advantage] * 2, rel=1e-9)


def test_advantage_zero_counts_as_positive_but_gives_nothing() -> None:
    assert token_losses(VESPOLoss(), [2.0], 0.0) == pytest.approx([0.0])


def test_phi_peaks_at_k_over_lambda() -> None:
    phis = [-token_gradients(VESPOLoss(vespo_k_pos=2.0, vespo_lambda_pos=4.0), [w], 1.0)[0] for w in (0.4, 0.5, 0.6)]
    assert phis[0] < phis[1] > phis[2]


def test_vllm_ratios_enter_the_weight_and_only_there() -> None:
    correction = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
    batch, outputs = single_sequence([1.0, 1.5], 1.0, importance_sampling_ratio=2 * correction)
    phi = _phi(1.5 * 4.0, 2.0, 3.0)
    loss = VESPOLoss()
    value = reduce_loss(loss, loss(batch, outputs)[0], batch)
    assert value.item() == pytest.approx(-phi * (-1.5 - 1.5 + log(1.5)) / 2, rel=1e-9)


def test_extreme_weights_vanish() -> None:
    assert token_gradients(VESPOLoss(), [1e30], 1.0) == [0.0]
    assert token_gradients(VESPOLoss(), [1e-30], 1.0) == pytest.approx([0.0], abs=1e-12)


def test_averages_over_all_tokens() -> None:
    gradient = on_policy_data().gradient(VESPOLoss())
    assert gradient.flatten().tolist() == pytest.approx([-2 / 4, 0, 0, 0, 1 / 4, 1 / 4, 1 / 4, 0])


def test_metric_is_phi_per_sequence() -> None:
    _, metrics = VESPOLoss()(*single_sequence([0.5, 4.0], 1.0))
    assert metrics["vespo/phi_seq_mean"].value.tolist() == [[pytest.approx(_phi(2.0, 2.0, 3.0))]]


@pytest.mark.parametrize("name", ["vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"])
def test_ranges(name: str) -> None:
    with pytest.raises(LossConfigError, match=name):
        VESPOLoss(**{name: -1.0})


@pytest.mark.parametrize("name", ["vespo_lambda_pos", "vespo_lambda_neg"])
def test_lambda_is_not_zero(name: str) -> None:
    with pytest.raises(LossConfigError, match=name):
        VESPOLoss(**{name: 0.0})
