from __future__ import annotations

import pytest
import torch

from trl_custom_losses import LossConfigError
from trl_custom_losses.losses.preference import BFPOLoss

from ..singles import single_pair


def _pair(
    loss: BFPOLoss, unsafe: tuple[float, float], margin: float, lengths: tuple[int, int] = (1, 1)
) -> tuple[float, list[float]]:
    """Loss and summed gradients of both completions' log-probabilities of one pair."""
    batch, outputs = single_pair(margin, 0.0, lengths)
    batch.columns = {
        f"{side}_unsafe": torch.tensor([v]) for side, v in zip(("chosen", "rejected"), unsafe, strict=True)
    }
    raw, _ = loss(batch, outputs)
    assert raw.shape == (1,)
    (gradient,) = torch.autograd.grad(raw.sum(), outputs.per_token_logps)
    return raw.item(), gradient.sum(1).tolist()


# By (chosen unsafe, rejected unsafe); times 1 / beta.
TARGETS = {(0, 0): 0.5, (0, 1): 1.0, (1, 0): -1.0, (1, 1): -0.5}


@pytest.mark.parametrize("unsafe", TARGETS)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_targets(unsafe: tuple[int, int], beta: float) -> None:
    target = TARGETS[unsafe] / beta
    for margin in (-3.0, 0.0, target, 4.0):
        value, gradient = _pair(BFPOLoss(beta=beta), unsafe, margin)
        assert value == pytest.approx((margin - target) ** 2, abs=1e-12)
        assert gradient == pytest.approx([2 * (margin - target), -2 * (margin - target)], abs=1e-12)


@pytest.mark.parametrize(("b1", "alpha"), [(3.0, 0.5), (2.0, 0.5), (5.0, 0.2), (1.5, -1.0)])
def test_is_the_authors_formula_with_the_opposite_labels(b1: float, alpha: float) -> None:
    b3 = 1 / (b1 - 1)
    for unsafe in TARGETS:
        safe_chosen, safe_rejected = 1 - unsafe[0], 1 - unsafe[1]
        factor = b1 * b3 * safe_chosen - b3 * safe_rejected - alpha
        found, _ = _pair(BFPOLoss(beta=0.2, b1=b1, alpha=alpha), unsafe, 1.5)
        assert found == pytest.approx((1.5 - factor / 0.2) ** 2, rel=1e-12)


def test_log_ratios_are_those_of_whole_completions() -> None:
    assert _pair(BFPOLoss(), (0, 0), 3.0, lengths=(4, 2))[0] == pytest.approx((3.0 - 5.0) ** 2)


@pytest.mark.parametrize(("label", "counts_as"), [(0.0, 0), (0.49, 0), (0.5, 1), (0.9, 1), (False, 0), (True, 1)])
def test_labels_are_cut_at_one_half(label: float, counts_as: int) -> None:
    for other in (0, 1):
        assert _pair(BFPOLoss(), (other, label), 2.0) == _pair(BFPOLoss(), (other, counts_as), 2.0)


def test_a_label_out_of_range_is_not_silent() -> None:
    value, _ = _pair(BFPOLoss(), (0.0, 2.0), 1.0)
    assert value != value


@pytest.mark.parametrize("b1", [1.0, 0.5, -2.0])
def test_refuses_b1_that_leaves_no_scale(b1: float) -> None:
    with pytest.raises(LossConfigError, match="'b1': expected a value > 1"):
        BFPOLoss(b1=b1)
