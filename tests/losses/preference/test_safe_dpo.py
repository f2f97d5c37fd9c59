from __future__ import annotations

from math import exp, log1p

import pytest
import torch
from torch import Tensor

from trl_custom_losses import LossConfigError
from trl_custom_losses.losses.preference import SafeDPOLoss, SigmoidLoss
from trl_custom_losses.reductions import reduce_loss
from trl_custom_losses.testing import random_data

from ..singles import single_pair


def _loss(z: float) -> float:
    """-log sigmoid(z)"""
    return log1p(exp(-z))


def _pair(loss: SafeDPOLoss, chosen_unsafe: float, rejected_unsafe: float, margin: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient with respect to the log-probabilities (chosen, rejected) of one pair."""
    batch, outputs = single_pair(margin, 0.0)
    batch.columns = {
        "chosen_unsafe": torch.tensor([chosen_unsafe]),
        "rejected_unsafe": torch.tensor([rejected_unsafe]),
    }
    raw, _ = loss(batch, outputs)
    assert raw.shape == (1,)
    (gradient,) = torch.autograd.grad(raw.sum(), outputs.per_token_logps)
    return raw, gradient.squeeze(1)


@pytest.mark.parametrize("margin", [-7.0, 0.0, 4.0])
@pytest.mark.parametrize("delta", [0.0, 2.0, 10.0])
def test_all_four_cases(margin: float, delta: float) -> None:
    loss, z = SafeDPOLoss(beta=0.2, delta=delta), 0.2 * margin
    expected = {(0, 0): _loss(z), (0, 1): _loss(z - delta), (1, 0): _loss(-z - delta), (1, 1): 0.0}
    for labels, value in expected.items():
        assert _pair(loss, *labels, margin)[0].item() == pytest.approx(value, rel=1e-12)


def test_the_margin_is_not_scaled_by_beta() -> None:
    found = [_pair(SafeDPOLoss(beta=beta, delta=3.0), 0, 1, 0.0)[0].item() for beta in (0.1, 5.0)]
    assert found == pytest.approx([_loss(-3.0)] * 2)


def test_the_safe_completion_rises() -> None:
    for labels, sign in (((0, 0), 1), ((0, 1), 1), ((1, 0), -1)):
        _, gradient = _pair(SafeDPOLoss(), *labels, 0.5)
        assert gradient[0] * sign < 0 < gradient[1] * sign


def test_two_unsafe_completions_teach_nothing() -> None:
    value, gradient = _pair(SafeDPOLoss(), 1, 1, -3.0)
    assert value.item() == 0 and not gradient.any()


def test_a_swapped_pair_is_the_pair_swapped() -> None:
    loss = SafeDPOLoss(delta=1.5)
    swapped, gradient = _pair(loss, 1, 0, 4.0)
    straight, mirrored = _pair(loss, 0, 1, -4.0)
    assert swapped.item() == straight.item()
    assert gradient.tolist() == mirrored.flip(0).tolist()


@pytest.mark.parametrize(("label", "counts_as"), [(0.0, 0), (0.49, 0), (0.5, 1), (0.9, 1), (False, 0), (True, 1)])
def test_labels_are_cut_at_one_half(label: float, counts_as: int) -> None:
    for other in (0, 1):
        assert (
            _pair(SafeDPOLoss(), label, other, 2.0)[0].item() == _pair(SafeDPOLoss(), counts_as, other, 2.0)[0].item()
        )


@pytest.mark.parametrize("labels", [(2.0, 0.0), (0.0, -1.0), (1.0, 7.0), (float("nan"), 1.0)])
def test_a_label_out_of_range_is_not_silent(labels: tuple[float, float]) -> None:
    assert _pair(SafeDPOLoss(), *labels, 2.0)[0].isnan()


def test_without_unsafe_completions_it_is_dpo() -> None:
    data = random_data("preference")
    data.items.update(chosen_unsafe=torch.zeros(4), rejected_unsafe=torch.zeros(4))
    torch.testing.assert_close(data.loss(SafeDPOLoss()), data.loss(SigmoidLoss()))
    torch.testing.assert_close(data.gradient(SafeDPOLoss()), data.gradient(SigmoidLoss()))


def test_the_mean_is_over_all_pairs_dropped_ones_too() -> None:
    data = random_data("preference")
    data.items.update(chosen_unsafe=torch.tensor([1, 0, 1, 0]), rejected_unsafe=torch.tensor([1, 0, 0, 1]))
    batch, outputs = data.build(SafeDPOLoss())
    raw, metrics = SafeDPOLoss()(batch, outputs)
    torch.testing.assert_close(reduce_loss(SafeDPOLoss(), raw, batch), raw[1:].sum() / 4)
    assert metrics["swapped_fraction"].tolist() == [0, 0, 1, 0]
    assert metrics["dropped_fraction"].tolist() == [1, 0, 0, 0]


def test_refuses_a_negative_margin() -> None:
    with pytest.raises(LossConfigError, match="'delta': expected a value >= 0"):
        SafeDPOLoss(delta=-1.0)
