from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from trl_custom_losses.balancing.gradients import PCGrad

from . import OPPOSED, random_jacobians

_CYCLE = torch.tensor([[1.0, 0.2], [-0.7, 1.0], [-0.2, -1.0]], dtype=torch.float64)


def _orders(size: int, step: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randperm(size, generator=generator).tolist() for _ in range(size)]


def _surgery(jacobian: Tensor, orders: list[list[int]]) -> Tensor:
    """The published algorithm, on the gradients themselves."""
    total = torch.zeros_like(jacobian[0])
    for i, order in enumerate(orders):
        gradient = jacobian[i].clone()
        for j in order:
            if j != i and gradient @ jacobian[j] < 0:
                gradient -= gradient @ jacobian[j] / jacobian[j].square().sum() * jacobian[j]
        total += gradient
    return total


def test_two_objectives_by_hand() -> None:
    for step in range(5):
        assert PCGrad()(OPPOSED @ OPPOSED.T, step).tolist() == pytest.approx([1 + 22 / 18, 1 + 22 / 38])


def test_against_the_gradients() -> None:
    for step, jacobian in enumerate(random_jacobians(100, imbalance=2)):
        direction = jacobian.T @ PCGrad()(jacobian @ jacobian.T, step)
        torch.testing.assert_close(direction, _surgery(jacobian, _orders(len(jacobian), step)), rtol=1e-9, atol=1e-9)


def test_against_torchjd() -> None:
    oracle = pytest.importorskip("torchjd.aggregation").PCGradWeighting()
    with torch.random.fork_rng():
        for step, jacobian in enumerate(random_jacobians(100)):
            torch.manual_seed(step)  # it draws from the global generator
            gramian = jacobian @ jacobian.T
            torch.testing.assert_close(PCGrad()(gramian, step), oracle(gramian), rtol=1e-9, atol=1e-9)


def test_no_conflict_leaves_the_sum_exactly() -> None:
    for step, jacobian in enumerate(random_jacobians(50, imbalance=6)):
        assert PCGrad()(jacobian.abs() @ jacobian.abs().T, step).tolist() == [1.0] * len(jacobian)


def test_the_order_is_a_function_of_the_step() -> None:
    gramian = _CYCLE @ _CYCLE.T
    first = [PCGrad()(gramian, step).tolist() for step in range(30)]
    state = torch.get_rng_state()
    torch.rand(7)
    aggregator = PCGrad()
    assert [aggregator(gramian, step).tolist() for step in reversed(range(30))] == first[::-1]
    torch.set_rng_state(state)
    PCGrad()(gramian, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_all_orders_come_equally_often() -> None:
    gramian = _CYCLE @ _CYCLE.T
    counts = Counter(tuple(round(weight, 6) for weight in PCGrad()(gramian, step).tolist()) for step in range(800))
    assert len(counts) == 8  # each of three gradients is projected in one of two orders
    assert min(counts.values()) > 60 and max(counts.values()) < 140


def test_a_zero_gradient_changes_nothing() -> None:
    jacobian = torch.cat([OPPOSED, torch.zeros(1, 3, dtype=torch.float64)])
    assert PCGrad()(jacobian @ jacobian.T, 0).tolist() == pytest.approx([1 + 22 / 18, 1 + 22 / 38, 1])
    underflown = torch.tensor([[1.0, -1e-23], [-1e-23, 0.0]])
    assert PCGrad()(underflown, 0).tolist() == pytest.approx([1, 1])
