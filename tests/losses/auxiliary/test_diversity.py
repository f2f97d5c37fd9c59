from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trl_custom_losses.losses.auxiliary import DiversityLoss
from trl_custom_losses.testing import Data, random_data
from trl_custom_losses.testing.ranks import prepared_on_ranks


def _data(states: list[list[float]], prompts: list[int] | None = None, lengths: list[int] | None = None) -> Data:
    """Completions of given states, at rollout and now."""
    data = random_data("policy", size=len(states), length=2, lengths=lengths or [2] * len(states))
    hidden = torch.tensor(states, dtype=torch.float64)
    data = replace(data, items=data.items | {"group_ids": torch.tensor(prompts or [0] * len(states))})
    return data.with_rows(hidden=hidden.requires_grad_(), old_hidden=hidden.detach())


def _losses(data: Data) -> Tensor:
    loss = DiversityLoss()
    raw, metrics = loss(*data.build(loss))
    assert metrics == {}
    return raw


def test_values() -> None:
    # Directions at 0, 90 and 120 degrees.
    found = _losses(_data([[2.0, 0.0], [0.0, 3.0], [-0.5, math.sqrt(0.75)]]))
    chord = 2 * math.sin(math.radians(15))
    assert found.tolist() == pytest.approx([-math.sqrt(2), -chord, -chord], abs=1.1e-3)


def test_completions_of_other_prompts_are_no_neighbours() -> None:
    states = [[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.0, 1.01]]
    assert _losses(_data(states)).abs().max() < 0.02
    assert _losses(_data(states, [0, 1, 0, 1])).abs().min() > 1.4


def test_without_another_completion_it_is_0() -> None:
    """Of the prompt, or of those with scored tokens; and the gradient is 0, but there."""
    for prompts, lengths in (([0, 1, 1], [2, 2, 2]), ([0, 0, 1], [2, 0, 2])):
        data = _data([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], prompts, lengths)
        found = _losses(data)
        (gradient,) = torch.autograd.grad(found.sum(), data.rows["hidden"])
        alone = [0] if lengths[1] else [0, 1, 2]
        assert not found[alone].any() and not gradient[alone].any()
        assert (found != 0).sum() == 3 - len(alone)


def test_it_is_bounded() -> None:
    data = _data([[1e6, 0.0], [-1e6, 1.0], [-1e-6, 0.0]])
    assert (_losses(data) > -2).all() and (_losses(data) <= 0).all()


def test_a_step_moves_the_nearest_apart() -> None:
    """Along the gradient, all distances to the nearest grow, whatever the lengths of states."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    data = _data(states.tolist(), [0, 0, 0, 1, 1, 1])
    (gradient,) = torch.autograd.grad(_losses(data).mean(), data.rows["hidden"])
    moved = states - 0.1 * gradient
    assert (_losses(data.with_rows(hidden=moved)) < _losses(data)).all()
    prepared = data.prepared(DiversityLoss())

    def nearest(of: Tensor) -> Tensor:
        return torch.nn.functional.cosine_similarity(of, prepared["nearest"])

    assert (nearest(moved) < nearest(states)).all()
    # A longer state gains nothing.
    assert torch.einsum("nh,nh->n", gradient, states).abs().max() < 1e-12


def test_equal_completions_give_a_finite_gradient() -> None:
    data = _data([[1.0, 2.0], [1.0, 2.0], [2.0, 4.0]])
    found = _losses(data)
    (gradient,) = torch.autograd.grad(found.sum(), data.rows["hidden"])
    assert found.abs().max() < 1e-6 and gradient.isfinite().all() and gradient.abs().max() < 1e-3


def test_the_neighbour_is_fixed_at_rollout() -> None:
    """The gradient is that of the completion's own state; it does not reach the neighbour's."""
    data = _data([[1.0, 0.0], [0.6, 0.8]])
    (gradient,) = torch.autograd.grad(_losses(data)[0], data.rows["hidden"])
    assert gradient[0].any() and not gradient[1].any()
    later = data.with_rows(hidden=torch.tensor([[0.0, 1.0], [5.0, 5.0]], dtype=torch.float64))
    expected = -math.dist([0.0, 1.0], [0.6, 0.8]), -math.dist([math.sqrt(0.5)] * 2, [1.0, 0.0])
    assert _losses(later).tolist() == pytest.approx(expected, abs=1.1e-3)


def test_of_equally_near_ones_the_first_is_taken() -> None:
    prepared = _data([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]).prepared(DiversityLoss())
    assert prepared["nearest"].tolist() == [[1, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_ranks_find_the_neighbours_of_one_process(ranks: int) -> None:
    data, loss = random_data("policy", size=6, lengths=[3, 0, 5, 2, 1, 1]), DiversityLoss()
    expected = data.prepared(loss)
    for name, value in prepared_on_ranks(loss, data, ranks).items():
        assert torch.equal(value, expected[name]), name
