"""The gradient that is bounded: of the whole optimizer step, of all that reaches the model, of any size."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trl_custom_losses import (
    Denominators,
    Loss,
    LossFunctionRegistry,
    ModelOutputs,
    PolicyBatch,
    PolicyLoss,
    PreferenceBatch,
    PreferenceLoss,
)
from trl_custom_losses.losses.composite import ClippedLoss
from trl_custom_losses.testing import Data, random_data

from .clipped import FAMILIES, PER, build, gradient, gradient_after, run

# The whole optimizer step


def _as_grpo(data: Data, size: int, micro_batches: int, ranks: int) -> Denominators:
    """The loss divides by the accumulation itself; ranks are averaged."""
    counts = data.denominators(ranks=ranks, micro_batches=micro_batches)
    return replace(counts, share=size / data.size, step_fraction=1 / ranks)


def _as_dpo(data: Data, size: int, micro_batches: int, ranks: int) -> Denominators:
    """The Trainer divides by the number of micro-batches afterwards."""
    parts = ranks * micro_batches
    counts = data.denominators(ranks=parts)
    return replace(counts, share=torch.tensor(size / data.size), step_fraction=1 / parts)


@pytest.mark.parametrize("trainer", [_as_grpo, _as_dpo])
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "ranks", [[[[0], [1, 2], [3, 4, 5]]], [[[0], [1, 2]], [[3, 4], [5]]], [[[0]], [[1]], [[2]], [[3, 4, 5]]]]
)
def test_the_bound_holds_for_the_whole_step(ranks: list, family: str, per: str, trainer: Any) -> None:
    data, base = random_data(family, size=6), FAMILIES[family]

    def step(loss: Loss) -> Tensor:
        """The gradient that the optimizer sees, over micro-batches and ranks, as the coordinates of the whole."""
        total = torch.zeros_like(data.rows["logps"])
        for parts in ranks:
            for part in parts:
                shared = trainer(data, len(part), len(parts), len(ranks))
                total += shared.step_fraction * gradient_after(loss, data, data.take(part), shared)
        return total

    whole = gradient(LossFunctionRegistry.build(base), data)
    torch.testing.assert_close(step(LossFunctionRegistry.build(base)), whole)
    torch.testing.assert_close(step(build(base, max_grad_norm=1e6, per=per)), whole)
    clipped = build(base, max_grad_norm=0.01, per=per)
    bounded = step(clipped).norm()
    if per == "sequence":
        torch.testing.assert_close(step(clipped), gradient(clipped, data), rtol=1e-5, atol=1e-9)
    assert bounded <= 0.01 * (1 + 1e-6)
    assert bounded > 0.009 if per == "batch" else bounded > 0.001


def test_the_norm_is_reported_as_that_of_a_step_of_such_micro_batches() -> None:
    """Equal micro-batches report the norm that the whole batch has, so that it can be compared with the bound."""
    data = random_data("preference", size=2)
    twice = data.take([0, 1, 0, 1])
    loss = build("ipo")
    whole = run(loss, twice)[1]["grad_norm"]
    for shared in (_as_grpo(twice, 2, 2, 1), _as_dpo(twice, 2, 2, 1)):
        found = run(loss, data, shared)[1]
        torch.testing.assert_close(found["grad_norm"], whole)
        torch.testing.assert_close(found["base_loss"], run(loss, data)[0])


# What the gradient is taken of


class Reading(PolicyLoss):
    """Reads one of the tensors that reach the model."""

    def __init__(self, *, field: str) -> None:
        super().__init__()
        self.field, self.requires, self.reduction = field, frozenset({field}), "sequence_sum"

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return (getattr(model_outputs, self.field).flatten(1) ** 2).sum(1), {}


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(
    ("field", "rows"), [("pooled_hidden", "hidden"), ("logits", "logits"), ("entropies", "entropies")]
)
def test_whatever_reaches_the_model_is_bounded(field: str, rows: str, per: str) -> None:
    data = random_data("policy")
    leaf = data.rows[rows].detach().requires_grad_()
    loss = ClippedLoss(base_loss=Reading(field=field), max_grad_norm=0.5, per=per)
    value, _ = run(loss, data.with_rows(**{rows: leaf}))
    (found,) = torch.autograd.grad(value, leaf)
    assert found.norm() == pytest.approx(0.5) and value.item() > 1


class SummingPadding(PreferenceLoss):
    """Adds up every position, padding too, where log-probabilities are 0 and no gradient goes any further."""

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return -model_outputs.per_token_logps.sum(1), {}


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("base", ["ipo", "sft", SummingPadding()], ids=["ipo", "sft", "summing padding"])
def test_padding_does_not_count(base: Any, per: str) -> None:
    data = random_data("preference")
    loss = ClippedLoss(base_loss=base, max_grad_norm=0.01, per=per)
    padded = data.padded(7, fill=-3.0)
    torch.testing.assert_close(run(loss, padded)[1]["grad_norm"], run(loss, data)[1]["grad_norm"])
    torch.testing.assert_close(gradient(loss, data), gradient_after(loss, data, padded))


def test_parameters_of_the_base_keep_a_gradient() -> None:
    class Learned(PreferenceLoss):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
            return -self.slope * model_outputs.logps.chunk(2)[0], {}

    data = random_data("preference")
    mean = data.build(Learned())[1].logps.chunk(2)[0].mean()
    norm = gradient(Learned(), data).norm()
    for per, expected in (("batch", -mean * 0.1 / norm), ("sequence", -mean)):
        loss = ClippedLoss(base_loss=Learned(), max_grad_norm=0.1, per=per)
        value, _ = run(loss, data)
        (found,) = torch.autograd.grad(value, loss.losses[0].slope)
        torch.testing.assert_close(found, expected.detach())


# Numbers at the edge


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_gradients_whose_squares_leave_float32(size: float, per: str) -> None:
    class Steep(PreferenceLoss):
        def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
            return model_outputs.logps.chunk(2)[0] * size, {}

    data = random_data("preference", dtype=torch.float32)
    _, metrics = run(ClippedLoss(base_loss=Steep(), per=per), data)
    assert metrics["grad_norm"].isfinite().all() and metrics["grad_norm"].min() > 0
    found = gradient(ClippedLoss(base_loss=Steep(), per=per), data)
    if size < 1:
        assert torch.equal(found, gradient(Steep(), data))
    else:
        assert found.norm() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("per", PER)
def test_no_gradient_stays_no_gradient(per: str) -> None:
    data = random_data("preference", lengths=[0] * 8)
    value, metrics = run(build("ipo", per=per), data)
    assert value.isfinite() and not metrics["grad_norm"].any() and not metrics["clip_fraction"].any()
    assert not torch.autograd.grad(value, data.rows["logps"])[0].any()


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("bad", [nan, inf], ids=str)
def test_what_is_not_finite_shows(bad: float, per: str) -> None:
    data = random_data("preference")
    logps = data.rows["logps"].detach().clone()
    logps[0, 0] = bad
    data = data.with_rows(logps=logps.requires_grad_())
    value, metrics = run(build("ipo", per=per), data)
    assert not value.isfinite() and not metrics["base_loss"].isfinite()
    assert not torch.autograd.grad(value, logps)[0].isfinite().all()


@pytest.mark.parametrize("per", PER)
def test_an_infinite_gradient_of_a_finite_loss_shows(per: str) -> None:
    class Vertical(PreferenceLoss):
        def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
            chosen = model_outputs.logps.chunk(2)[0]
            return (chosen - chosen[:1]).abs().sqrt(), {}  # the first pair's slope is 0 x infinity

    data = random_data("preference")
    assert run(Vertical(), data)[0].isfinite()
    value, metrics = run(ClippedLoss(base_loss=Vertical(), per=per, max_grad_norm=10.0), data)
    found = torch.autograd.grad(value, data.rows["logps"])[0]
    assert not found.isfinite().all() and not metrics["grad_norm"].isfinite().all()
    torch.testing.assert_close(found, gradient(Vertical(), data), equal_nan=True)
