from __future__ import annotations

from math import exp, log, log1p

import pytest

from trl_custom_losses.losses.preference import AOTUnpairedLoss

from ..singles import column_pairs, pair_loss

_POLICY = [-1.0, -2.0, -3.0, -5.0, -2.5, -1.0]
_REFERENCE = [-2.0, -2.0, -2.0, -1.0, -5.0, -3.0]
# Log-ratios of chosen: 1, 0, -1; of rejected: -4, 2.5, 2.


def test_compares_sorted_log_ratios() -> None:
    raw, _ = AOTUnpairedLoss(beta=0.5)(*column_pairs(_POLICY, _REFERENCE))
    differences = [-1 - -4, 0 - 2, 1 - 2.5]
    assert raw.tolist() == pytest.approx([log1p(exp(-0.5 * d)) for d in differences], rel=1e-12)


def test_label_smoothing() -> None:
    raw, _ = AOTUnpairedLoss(beta=0.5, label_smoothing=0.1)(*column_pairs(_POLICY, _REFERENCE))
    assert raw[0].item() == pytest.approx(0.9 * log1p(exp(-1.5)) + 0.1 * log1p(exp(1.5)), rel=1e-12)


def test_one_pair_is_dpo() -> None:
    assert pair_loss(AOTUnpairedLoss(beta=0.1), 2.0, -1.0) == pytest.approx(log1p(exp(-0.3)), rel=1e-12)
    assert pair_loss(AOTUnpairedLoss(), 1.0, 1.0) == pytest.approx(log(2))


def test_pairing_does_not_matter() -> None:
    swapped = [0, 1, 2, 5, 3, 4]
    policy, reference = ([column[i] for i in swapped] for column in (_POLICY, _REFERENCE))
    first, _ = AOTUnpairedLoss()(*column_pairs(_POLICY, _REFERENCE))
    second, _ = AOTUnpairedLoss()(*column_pairs(policy, reference))
    assert first.tolist() == second.tolist()
