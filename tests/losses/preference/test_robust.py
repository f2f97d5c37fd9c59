from __future__ import annotations

from math import exp, log, log1p

import pytest

from trl_custom_losses import LossConfigError
from trl_custom_losses.losses.preference import RobustLoss

from ..singles import pair_loss


@pytest.mark.parametrize(
    ("smoothing", "margin", "expected"),
    [
        (0.0, 3.0, log1p(exp(-0.3))),
        (0.2, 3.0, (0.8 * log1p(exp(-0.3)) - 0.2 * log1p(exp(0.3))) / 0.6),
        (0.4, -5.0, (0.6 * log1p(exp(0.5)) - 0.4 * log1p(exp(-0.5))) / 0.2),
        (0.3, 0.0, log(2)),
    ],
)
def test_values(smoothing: float, margin: float, expected: float) -> None:
    assert pair_loss(RobustLoss(label_smoothing=smoothing), margin, 0.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("margin", [-4.0, 0.5, 3.0])
def test_is_unbiased_under_flipped_labels(margin: float) -> None:
    loss, flip = RobustLoss(beta=1.0, label_smoothing=0.2), 0.2
    mean = (1 - flip) * pair_loss(loss, margin, 0.0) + flip * pair_loss(loss, 0.0, margin)
    assert mean == pytest.approx(log1p(exp(-margin)), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.5, 0.7, -0.1])
def test_refuses_labels_that_say_nothing(smoothing: float) -> None:
    with pytest.raises(LossConfigError, match="label_smoothing"):
        RobustLoss(label_smoothing=smoothing)
