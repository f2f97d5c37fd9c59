from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_custom_losses import LossConfigError, ModelOutputs, PreferenceBatch, Ranks
from trl_custom_losses.losses.auxiliary import ConsistencyLoss
from trl_custom_losses.losses.auxiliary.consistency import symmetric_kl
from trl_custom_losses.reductions import reduce_loss
from trl_custom_losses.testing import Data, random_data

_STATES = [[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]]  # cosines: 1 between the first two, 0.6 to the third


def _pairs(
    margins: Sequence[float], states: Sequence[Sequence[float]], dtype: torch.dtype = torch.float64
) -> tuple[PreferenceBatch, ModelOutputs]:
    """Pairs of one-token completions of given log-ratio differences and chosen states."""
    count = len(margins)
    mask = torch.ones(2 * count, 1, dtype=torch.long)
    logps = torch.tensor([*margins, *[0.0] * count], dtype=dtype).unsqueeze(1).requires_grad_()
    rejected = [9.0, *[-7.0] * (len(states[0]) - 1)]  # does not count
    hidden = torch.tensor([*states, *[rejected] * count], dtype=dtype)
    batch = PreferenceBatch(input_ids=mask, attention_mask=mask, mask=mask)
    reference = torch.zeros_like(logps)
    return batch, ModelOutputs(per_token_logps=logps, ref_per_token_logps=reference, mask=mask, sequence_hidden=hidden)


def _value_and_gradient(loss: ConsistencyLoss, batch: PreferenceBatch, outputs: ModelOutputs) -> tuple[float, list]:
    value = reduce_loss(loss, loss(batch, outputs)[0], batch)
    (gradient,) = torch.autograd.grad(value, outputs.per_token_logps)
    return value.item(), gradient.squeeze(1).tolist()


# Neighbours


def test_is_the_weighted_mean_of_squared_differences() -> None:
    batch, outputs = _pairs([4.0, 1.0, -1.0], _STATES)
    # m = 0.4, 0.1, -0.1; w_12 = 1 - 0.5, w_13 = w_23 = 0.6 - 0.5; each pair stands twice above and below.
    value, gradient = _value_and_gradient(ConsistencyLoss(beta=0.1, threshold=0.5), batch, outputs)
    total = 0.5 + 0.1 + 0.1
    assert value == pytest.approx((0.5 * 0.3**2 + 0.1 * 0.5**2 + 0.1 * 0.2**2) / total)
    first = 0.1 * 2 * (0.5 * 0.3 + 0.1 * 0.5) / total
    third = 0.1 * 2 * (0.1 * -0.5 + 0.1 * -0.2) / total
    second = 0.1 * 2 * (0.5 * -0.3 + 0.1 * 0.2) / total
    assert gradient == pytest.approx([first, second, third, -first, -second, -third])


def test_logs_the_number_of_neighbours() -> None:
    _, metrics = ConsistencyLoss(threshold=0.7)(*_pairs([1.0, 2.0, 3.0], _STATES))
    assert metrics["consistency_neighbours"].tolist() == [1, 1, 0]


def test_equal_margins_are_consistent() -> None:
    value, gradient = _value_and_gradient(ConsistencyLoss(threshold=-1.0), *_pairs([2.0, 2.0, 2.0], _STATES))
    assert value == 0 and gradient == [0] * 6


def test_a_step_moves_margins_of_similar_pairs_together_and_no_others() -> None:
    _, gradient = _value_and_gradient(ConsistencyLoss(threshold=0.7), *_pairs([4.0, 1.0, -50.0], _STATES))
    assert gradient[0] > 0 > gradient[1] and gradient[2] == 0
    assert gradient[:2] == pytest.approx([-value for value in gradient[3:5]])
    assert 4.0 - gradient[0] - (1.0 - gradient[1]) < 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_of_1_has_no_neighbours(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for state in torch.randn(20, 64, generator=generator).tolist():  # whose cosine with itself is rounded
        pairs = _pairs([4.0, 1.0], [state, state], dtype)
        value, gradient = _value_and_gradient(ConsistencyLoss(threshold=1.0), *pairs)
        assert value == 0 and gradient == [0] * 4


@pytest.mark.parametrize(
    ("margins", "states"),
    [([3.0], [[1.0, 0.0]]), ([3.0, 1.0], [[1.0, 0.0], [-1.0, 0.0]]), ([3.0, 1.0], [[0.0, 0.0], [0.0, 0.0]])],
    ids=["one pair", "opposite", "no states"],
)
def test_without_neighbours_it_is_zero(margins: list, states: list) -> None:
    value, gradient = _value_and_gradient(ConsistencyLoss(threshold=0.5), *_pairs(margins, states))
    assert value == 0 and gradient == [0] * len(gradient)


def test_states_get_no_gradient() -> None:
    data = random_data("preference")
    data.loss(ConsistencyLoss(threshold=-0.5)).backward()
    assert data.rows["hidden"].grad is None
    assert data.rows["logps"].grad.any()


def test_beta_scales_the_margins() -> None:
    data = random_data("preference")
    torch.testing.assert_close(
        data.loss(ConsistencyLoss(threshold=-0.5, beta=0.3)), 9 * data.loss(ConsistencyLoss(threshold=-0.5, beta=0.1))
    )


# Ranks


def _on_ranks(loss: ConsistencyLoss, data: Data, parts: list[list[int]]) -> Tensor:
    """Mean of what ranks with those pairs compute; a rank gathers what the others would send."""
    denominators = data.denominators(ranks=len(parts))
    sent: list[Tensor] = []

    def run(index: int, gather: Any) -> Tensor:
        batch, outputs = data.take(parts[index]).build(loss, denominators)
        batch.ranks = Ranks(index=index, count=len(parts), gather=gather)
        return reduce_loss(loss, loss(batch, outputs)[0], batch)

    def send(tensor: Tensor) -> Tensor:
        assert not tensor.requires_grad
        sent.append(tensor)
        return tensor.repeat(len(parts), 1)

    for index in range(len(parts)):
        run(index, send)
    assert len(sent) == len(parts), "one collective a forward pass"
    return torch.stack([run(index, lambda tensor: torch.cat(sent)) for index in range(len(parts))]).mean()


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[3, 1], [0, 2]]], ids=str)
def test_ranks_find_their_partners_on_the_others(parts: list[list[int]]) -> None:
    data, loss = random_data("preference"), ConsistencyLoss(threshold=-0.3)
    value = _on_ranks(loss, data, parts)
    torch.testing.assert_close(value, data.loss(loss))
    (gradient,) = torch.autograd.grad(value, data.rows["logps"])
    torch.testing.assert_close(gradient, data.gradient(loss))
    assert gradient.abs().max() > 1e-3


def test_micro_batches_are_averaged_by_their_pairs() -> None:
    data, loss = random_data("preference", size=5), ConsistencyLoss(threshold=-0.5)
    parts = [data.take([0, 1]), data.take([2, 3, 4])]
    total = sum(part.loss(loss, data.denominators(micro_batches=2)) for part in parts)
    torch.testing.assert_close(total, (2 * parts[0].loss(loss) + 3 * parts[1].loss(loss)) / 5)


# R-Drop


def test_symmetric_kl_of_two_coins() -> None:
    first = torch.tensor([[[0.75, 0.25]]], dtype=torch.float64).log()
    second = torch.tensor([[[0.5, 0.5]]], dtype=torch.float64).log()
    forward = 0.75 * log(1.5) + 0.25 * log(0.5)
    backward = 0.5 * log(1 / 1.5) + 0.5 * log(2)
    mask = torch.ones(1, 1)
    assert symmetric_kl(first + 3.0, second - 1.0, mask).item() == pytest.approx((forward + backward) / 2)
    assert symmetric_kl(second, first, mask).item() == pytest.approx((forward + backward) / 2)
    assert symmetric_kl(first, first, mask).item() == 0


def _rdrop(data: Data) -> Tensor:
    return data.loss(ConsistencyLoss(mode="rdrop"))


def test_rdrop_is_the_mean_over_the_tokens_of_the_chosen_completions() -> None:
    data = random_data("preference", size=2, length=3, lengths=[1, 3, 2, 2])
    first, second = (data.rows[name][:2].log_softmax(-1) for name in ("logits", "second_logits"))
    each = ((first.exp() * (first - second)).sum(-1) + (second.exp() * (second - first)).sum(-1)) / 2
    torch.testing.assert_close(_rdrop(data), (each[0, 0] + each[1].sum()) / 4)


def test_rdrop_moves_both_passes_and_chosen_tokens_alone() -> None:
    data = random_data("preference")
    _rdrop(data).backward()
    scored = data.rows["mask"].bool().unsqueeze(-1) & (torch.arange(8) < 4).view(-1, 1, 1)
    for name in ("logits", "second_logits"):
        gradient = data.rows[name].grad
        assert (gradient.abs().sum(-1, keepdim=True) > 0).eq(scored).all()
    second = data.rows["second_logits"].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: _rdrop(data.with_rows(second_logits=logits)), second)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_rdrop_ignores_logits_of_masked_positions(garbage: float) -> None:
    data = random_data("preference", lengths=[2, 3, 1, 4, 5, 1, 2, 3])
    hidden = (data.rows["mask"] == 0).unsqueeze(-1)
    dirty = {
        name: data.rows[name].detach().masked_fill(hidden, garbage).requires_grad_()
        for name in ("logits", "second_logits")
    }
    value = _rdrop(data.with_rows(**dirty))
    assert value.item() == _rdrop(data).item()
    value.backward()
    for tensor in dirty.values():
        assert tensor.grad.isfinite().all() and not tensor.grad[hidden.expand_as(tensor)].any()


def test_equal_passes_are_consistent() -> None:
    data = random_data("preference")
    same = data.with_rows(second_logits=data.rows["logits"].detach().clone())
    assert _rdrop(same).item() == 0


# Configuration


def test_facts_are_those_of_the_mode() -> None:
    neighbours, rdrop = ConsistencyLoss(), ConsistencyLoss(mode="rdrop")
    assert neighbours.requires == {"ref_logps", "sequence_hidden"} and rdrop.requires == {"logits", "second_logits"}
    assert (neighbours.batch_coupled, neighbours.minimum_batch, neighbours.reduction) == (True, 2, "sequence_mean")
    assert (rdrop.batch_coupled, rdrop.minimum_batch, rdrop.reduction) == (False, 1, "token_mean")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "neighbors"}, r"'mode': expected 'neighbours' \| 'rdrop'"),
        ({"threshold": 1.5}, "'threshold': expected a value >= -1 and <= 1"),
        ({"threshold": -1.5}, "'threshold'"),
        ({"beta": 0.0}, "'beta': expected a value > 0"),
    ],
)
def test_refuses(options: dict, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        ConsistencyLoss(**options)


def test_threshold_may_move() -> None:
    loss = ConsistencyLoss(threshold=1.0)
    batch, outputs = _pairs([4.0, 1.0, -1.0], _STATES)
    assert not loss(batch, outputs)[0].any()
    loss.threshold = 0.5
    expected = ConsistencyLoss(threshold=0.5)(batch, outputs)[0]
    assert torch.equal(loss(batch, outputs)[0], expected) and expected.any()


def test_a_threshold_that_nothing_reads_is_refused() -> None:
    with pytest.raises(LossConfigError, match="'threshold' has no effect in the mode 'rdrop'"):
        ConsistencyLoss(mode="rdrop", threshold=0.7)
