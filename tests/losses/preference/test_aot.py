from __future__ import annotations

from math import exp, log, log1p

import pytest

from trl_custom_losses.losses.preference import AOTLoss

from ..singles import column_pairs, pair_loss

_POLICY = [-1.0, -2.0, -3.0, -5.0, -2.5, -1.0]  # chosen - rejected: 4, 0.5, -2
_REFERENCE = [-2.0, -2.0, -2.0, -1.0, -5.0, -3.0]  # chosen - rejected: -1, 3, 1


def test_compares_sorted_margins() -> None:
    raw, _ = AOTLoss(beta=0.5)(*column_pairs(_POLICY, _REFERENCE))
    differences = [-2 - -1, 0.5 - 1, 4 - 3]
    assert raw.tolist() == pytest.approx([log1p(exp(-0.5 * d)) for d in differences], rel=1e-12)


def test_label_smoothing() -> None:
    raw, _ = AOTLoss(beta=0.5, label_smoothing=0.1)(*column_pairs(_POLICY, _REFERENCE))
    assert raw[0].item() == pytest.approx(0.9 * log1p(exp(0.5)) + 0.1 * log1p(exp(-0.5)), rel=1e-12)


def test_one_pair_is_dpo() -> None:
    assert pair_loss(AOTLoss(beta=0.1), 2.0, -1.0) == pytest.approx(log1p(exp(-0.3)), rel=1e-12)
    assert pair_loss(AOTLoss(), 1.0, 1.0) == pytest.approx(log(2))


def test_a_better_margin_lowers_the_loss() -> None:
    better = [_POLICY[0] + 0.5, *_POLICY[1:]]
    losses = [AOTLoss()(*column_pairs(policy, _REFERENCE))[0].sum().item() for policy in (_POLICY, better)]
    assert losses[1] < losses[0]
