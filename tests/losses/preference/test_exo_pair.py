from __future__ import annotations

from math import exp, log

import pytest

from trl_custom_losses import LossConfigError, LossFunctionRegistry
from trl_custom_losses.losses.preference import EXOPairLoss

from ..singles import pair_gradient, pair_loss


@pytest.mark.parametrize(("beta", "margin"), [(0.1, 3.0), (0.5, -2.0), (0.1, 0.0)])
def test_is_the_kl_from_the_policy_to_the_labels(beta: float, margin: float) -> None:
    q, e = 1 / (1 + exp(-beta * margin)), 0.1
    expected = q * log(q / (1 - e)) + (1 - q) * log((1 - q) / e)
    assert pair_loss(EXOPairLoss(beta=beta, label_smoothing=e), margin, 0.0) == pytest.approx(expected, rel=1e-12)


def test_is_zero_where_the_policy_agrees_with_the_labels() -> None:
    loss, agreement = EXOPairLoss(beta=1.0, label_smoothing=0.2), log(0.8 / 0.2)
    assert pair_loss(loss, agreement, 0.0) == pytest.approx(0, abs=1e-12)
    assert pair_gradient(loss, agreement, 0.0) == pytest.approx((0, 0), abs=1e-12)
    assert pair_gradient(loss, agreement - 1, 0.0)[0] < 0 < pair_gradient(loss, agreement + 1, 0.0)[0]


@pytest.mark.parametrize("smoothing", [0.0, 1.0, -0.1])
def test_refuses_labels_without_a_loss(smoothing: float) -> None:
    with pytest.raises(LossConfigError, match="label_smoothing"):
        LossFunctionRegistry.build({"type": "exo_pair", "label_smoothing": smoothing})


def test_needs_label_smoothing() -> None:
    with pytest.raises(LossConfigError, match="needs the hyperparameter 'label_smoothing'"):
        LossFunctionRegistry.build("exo_pair")
