from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trl_custom_losses import Rollout
from trl_custom_losses.losses.auxiliary import QualityLoss
from trl_custom_losses.testing import Data, random_data
from trl_custom_losses.testing.ranks import prepared_on_ranks

_STATES = {"east": [2.0, 0.0], "north": [0.0, 5.0], "west": [-1.0, 0.0], "": [0.0, 0.0]}


def _data(states: list[list[float]], lengths: list[int] | None = None) -> Data:
    data = random_data("policy", size=len(states), length=2, lengths=lengths or [2] * len(states))
    return data.with_rows(hidden=torch.tensor(states, dtype=torch.float64).requires_grad_())


def _prepared(rollout: Rollout, targets: list) -> dict[str, Tensor]:
    states = {text: torch.tensor(state, dtype=torch.float64) for text, state in _STATES.items()}
    rollout = rollout.replace(
        columns={"target": targets}, encode=lambda texts: torch.stack([states[text] for text in texts])
    )
    return QualityLoss().prepare(rollout)


def _losses(data: Data, targets: list[str]) -> Tensor:
    loss = QualityLoss()
    batch, outputs = data.build(loss)
    raw, metrics = loss(batch.replace(prepared=_prepared(data.rollout(), targets)), outputs)
    assert metrics == {}
    return raw


def test_values() -> None:
    found = _losses(_data([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [4.0, 3.0]]), ["east", "north", "west", "east"])
    assert found.tolist() == pytest.approx([0.0, math.sqrt(2), 2.0, math.dist([0.8, 0.6], [1, 0])], abs=1.1e-3)
    assert (found >= 0).all() and (found < 2).all()


@pytest.mark.parametrize("left_out", ["empty target", "empty completion"])
def test_what_is_empty_is_left_out(left_out: str) -> None:
    targets, lengths = (["north", ""], [2, 2]) if left_out == "empty target" else (["north", "north"], [2, 0])
    data = _data([[3.0, 0.0], [3.0, 1.0]], lengths)
    found = _losses(data, targets)
    (gradient,) = torch.autograd.grad(found.sum(), data.rows["hidden"])
    assert found[0] > 1 and gradient[0].any()
    assert found[1] == 0 and not gradient[1].any()


def test_a_step_moves_towards_the_target() -> None:
    states = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data, targets = _data(states.tolist()), ["east", "north", "west"] * 2
    (gradient,) = torch.autograd.grad(_losses(data, targets).mean(), data.rows["hidden"])
    moved = states - 0.1 * gradient
    goals = torch.tensor([_STATES[text] for text in targets], dtype=torch.float64)
    before, after = (torch.nn.functional.cosine_similarity(each, goals) for each in (states, moved))
    assert (after > before).all()
    assert (_losses(data.with_rows(hidden=moved), targets) < _losses(data, targets)).all()


def test_at_the_target_the_gradient_is_finite() -> None:
    data = _data([[4.0, 0.0], [1.0, 1e-9]])
    (gradient,) = torch.autograd.grad(_losses(data, ["east", "east"]).sum(), data.rows["hidden"])
    assert gradient.isfinite().all() and gradient.abs().max() < 1e-3


@pytest.mark.parametrize("column", [torch.tensor([1.0, 2.0]), ["east", 3], ["east", [{"role": "assistant"}]]])
def test_targets_that_are_no_text_are_reported(column: list) -> None:
    with pytest.raises(ValueError, match=r"'target' holds the reference answers as text, found (Tensor|int|list)"):
        _prepared(_data([[1.0, 0.0], [0.0, 1.0]]).rollout(), column)


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_encodes_its_own_targets(ranks: int) -> None:
    data, loss = random_data("policy", size=6, lengths=[3, 0, 5, 2, 1, 1]), QualityLoss()
    expected = data.prepared(loss)
    assert expected["has_target"].tolist() == [True, False, True, True, True, True]
    for name, value in prepared_on_ranks(loss, data, ranks).items():
        assert torch.equal(value, expected[name]), name


def test_it_names_its_column() -> None:
    assert QualityLoss().columns == ("target",)
