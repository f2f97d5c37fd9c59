"""From unreduced losses to scalars."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trl_custom_losses import Denominators, PolicyBatch, PolicyLoss, PreferenceBatch
from trl_custom_losses.reductions import REDUCTIONS, FixedLengthMean, reduce_loss, reduce_values

# Three sequences of 1, 3 and no tokens; what is masked would show.
_MASK = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]])
_VALUES = [[2.0, 100.0, 100.0], [3.0, 4.0, 8.0], [100.0, 100.0, 100.0]]


def _policy(**fields: Any) -> PolicyBatch:
    return PolicyBatch(prompt_ids=_MASK, completion_ids=_MASK, mask=_MASK, advantages=torch.ones(3), **fields)


def _values() -> Tensor:
    return torch.tensor(_VALUES, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sequence_mean", (2 + (3 + 4 + 8) / 3 + 0) / 3),
        ("token_mean", (2 + 3 + 4 + 8) / 4),
        ("local_token_mean", (2 + 3 + 4 + 8) / 4),
        ("sequence_sum", (2 + 3 + 4 + 8) / 3),
        (FixedLengthMean(10), (2 + 3 + 4 + 8) / (3 * 10)),
    ],
)
def test_per_token(reduction: Any, expected: float) -> None:
    assert reduce_values(_values(), _policy(), reduction).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sequence_mean", (2 + 5) / 12),
        ("token_mean", (2 + 15) / 40),
        ("local_token_mean", (2 + 15) / 4 / 5),
        ("sequence_sum", (2 + 15) / 12),
        (FixedLengthMean(10), (2 + 15) / (12 * 10)),
    ],
)
def test_global_denominators(reduction: Any, expected: float) -> None:
    batch = _policy(denominators=Denominators(sequences=12, tokens=torch.tensor(40), micro_batches=5))
    assert reduce_values(_values(), batch, reduction).item() == pytest.approx(expected)


@pytest.mark.parametrize("reduction", [*REDUCTIONS, FixedLengthMean(10)], ids=str)
def test_one_value_a_sequence_is_averaged_under_every_name(reduction: Any) -> None:
    values = torch.tensor([1.0, 2.0, 6.0])
    assert reduce_values(values, _policy(), reduction).item() == 3.0
    batch = _policy(denominators=Denominators(sequences=9, tokens=100))
    assert reduce_values(values, batch, reduction).item() == 1.0


@pytest.mark.parametrize("reduction", [*REDUCTIONS, FixedLengthMean(10)], ids=str)
def test_one_column_stands_for_every_token(reduction: Any) -> None:
    column = torch.tensor([[2.0], [5.0], [9.0]])
    spread = reduce_values(column.expand(3, 3), _policy(), reduction)
    assert reduce_values(column, _policy(), reduction).item() == spread.item()


@pytest.mark.parametrize("reduction", [*REDUCTIONS, FixedLengthMean(10)], ids=str)
def test_masked_values_count_nothing_and_get_no_gradient(reduction: Any) -> None:
    values = torch.tensor(_VALUES, dtype=torch.float64).masked_fill(_MASK == 0, torch.nan).requires_grad_()
    total = reduce_values(values, _policy(), reduction)
    total.backward()
    assert total.item() == reduce_values(_values(), _policy(), reduction).item()
    assert (values.grad[_MASK == 0] == 0).all() and (values.grad[_MASK == 1] > 0).all()


@pytest.mark.parametrize("reduction", [*REDUCTIONS, FixedLengthMean(10)], ids=str)
@pytest.mark.parametrize("tokens", [0, 0.0, torch.tensor(0)], ids=repr)
def test_no_token_at_all_is_zero_with_a_graph(reduction: Any, tokens: Any) -> None:
    mask = torch.zeros_like(_MASK)
    batch = PolicyBatch(
        prompt_ids=mask,
        completion_ids=mask,
        mask=mask,
        advantages=torch.ones(3),
        denominators=Denominators(sequences=3, tokens=tokens),
    )
    values = _values()
    total = reduce_values(values, batch, reduction)
    total.backward()
    assert total.item() == 0 and not values.grad.any()


def test_preference_rows_choose_the_denominators() -> None:
    mask = torch.tensor([[1, 0], [1, 1], [1, 1], [1, 1]])
    ids = torch.zeros(4, 3, dtype=torch.long)
    batch = PreferenceBatch(input_ids=ids, attention_mask=ids, mask=mask)
    assert reduce_values(torch.tensor([1.0, 3.0]), batch, "token_mean").item() == 2
    assert reduce_values(torch.tensor([1.0, 3.0, 5.0, 7.0]), batch, "token_mean").item() == 4
    chosen = torch.tensor([[1.0, 100], [3, 5]])
    assert reduce_values(chosen, batch, "token_mean").item() == 9 / 3
    assert reduce_values(chosen, batch, "sequence_mean").item() == (1 + 4) / 2
    both = torch.cat((chosen, chosen + 1))
    assert reduce_values(both, batch, "token_mean").item() == pytest.approx((9 + 2 + 101 + 4 + 6) / 7)
    assert reduce_values(both, batch, "sequence_mean").item() == pytest.approx((1 + 4 + 103 / 2 + 5) / 4)


@pytest.mark.parametrize("shape", [(3, 2), (3, 4), (2, 3), (3, 3, 1)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="found"):
        reduce_values(torch.ones(shape), _policy(), "token_mean")


class _Loss(PolicyLoss):
    reduction = "sequence_sum"


def test_a_loss_is_reduced_as_it_declares() -> None:
    assert reduce_loss(_Loss(), _values(), _policy()).item() == pytest.approx(17 / 3)


def test_modifiers_come_before_the_reduction() -> None:
    batch = _policy(entropy_mask=torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 1]]))
    assert reduce_loss(_Loss(), _values(), batch).item() == pytest.approx((2 + 3 + 8) / 3)


def test_a_scalar_is_a_micro_batch_mean() -> None:
    batch = _policy(denominators=Denominators(sequences=12, tokens=40, micro_batches=4))
    assert reduce_loss(_Loss(), torch.tensor(2.0), batch).item() == 0.5


def test_a_composition_is_taken_as_it_is() -> None:
    loss = _Loss()
    loss.composite = True
    batch = _policy(denominators=Denominators(sequences=12, tokens=40, micro_batches=4))
    assert reduce_loss(loss, torch.tensor(2.0), batch).item() == 2.0


@pytest.mark.parametrize("raw", [1.0, None, [torch.ones(3)]])
def test_only_tensors_are_losses(raw: Any) -> None:
    with pytest.raises(TypeError, match="must return a tensor"):
        reduce_loss(_Loss(), raw, _policy())
