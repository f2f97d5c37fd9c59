"""A bound on what one loss may push."""

from __future__ import annotations

from dataclasses import replace
from math import inf, log, nan, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trl_custom_losses import (
    Denominators,
    Loss,
    LossConfigError,
    LossFunctionRegistry,
    ModelOutputs,
    PolicyBatch,
    PolicyLoss,
    PreferenceBatch,
    PreferenceLoss,
    Rollout,
)
from trl_custom_losses.losses.composite import ClippedLoss
from trl_custom_losses.reductions import reduce_loss

from ..factories import Data, column_pairs, random_data

FAMILIES = {"preference": "ipo", "policy": "grpo"}
PER = ["batch", "sequence"]


def build(base: Any, **options: Any) -> ClippedLoss:
    return LossFunctionRegistry.build({"type": "clipped_loss", "base_loss": base, **options})


def run(loss: Loss, data: Data, denominators: Denominators | None = None) -> tuple[Tensor, dict[str, Any]]:
    """The contribution and the metrics."""
    batch, outputs = data.build(loss, denominators)
    raw, metrics = loss(batch, outputs)
    return reduce_loss(loss, raw, batch), metrics


def gradient(loss: Loss, data: Data, denominators: Denominators | None = None, scale: float = 1.0) -> Tensor:
    """Gradient with respect to the log-probabilities of the loss times what a trainer multiplies it by."""
    return torch.autograd.grad(run(loss, data, denominators)[0] * scale, data.rows["logps"])[0]


def gradient_after(loss: Loss, data: Data, made: Data, denominators: Denominators | None = None) -> Tensor:
    """Gradient with respect to the log-probabilities of `data` of the loss on data made from it."""
    return torch.autograd.grad(run(loss, made, denominators)[0], data.rows["logps"])[0]


def rows_of(data: Data, values: Tensor) -> Tensor:
    """One row for each pair (both of its completions) or sequence."""
    return torch.cat(values.chunk(2), dim=1) if data.family == "preference" else values


# What is clipped


def test_values_of_one_pair() -> None:
    batch, outputs = column_pairs([-1.0, -2.0], [-1.0, -2.0])
    outputs.per_token_logps.requires_grad_()
    for bound, length in ((0.1, 0.1), (0.5, 0.5), (2.0, sqrt(0.5))):
        loss = build({"type": "sigmoid", "beta": 1.0}, max_grad_norm=bound)
        value, metrics = loss(batch, outputs)
        assert value.item() == metrics["base_loss"].item() == pytest.approx(log(2))
        (found,) = torch.autograd.grad(value, outputs.per_token_logps)  # (-1/2, 1/2) before
        assert found.flatten().tolist() == pytest.approx([-length / sqrt(2), length / sqrt(2)])
        assert metrics["grad_norm"].item() == pytest.approx(sqrt(0.5))
        assert metrics["clip_fraction"].item() == (bound < sqrt(0.5))


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_value_is_the_base_losss(family: str, per: str) -> None:
    data = random_data(family)
    for bound in (1e-6, 1e6):
        value, metrics = run(build(FAMILIES[family], max_grad_norm=bound, per=per), data)
        assert torch.equal(value, run(LossFunctionRegistry.build(FAMILIES[family]), data)[0])
        assert torch.equal(metrics["base_loss"], value.detach())


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(("family", "base"), [("preference", "ipo"), ("preference", "sft"), ("policy", "dapo")])
def test_below_the_bound_nothing_changes_by_a_bit(family: str, base: str, per: str) -> None:
    data, plain = random_data(family, dtype=torch.float32), LossFunctionRegistry.build(base)
    loss = build(base, max_grad_norm=1e6, per=per)
    assert torch.equal(run(loss, data)[0], run(plain, data)[0])
    assert torch.equal(gradient(loss, data), gradient(plain, data))
    if per == "batch":  # whatever the loss is multiplied by
        assert torch.equal(gradient(loss, data, scale=1 / 3), gradient(plain, data, scale=1 / 3))
    assert run(loss, data)[1]["clip_fraction"].sum() == 0


@pytest.mark.parametrize("scale", [0.25, 1.0, 65536.0])
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_holds_whatever_the_loss_is_multiplied_by(family: str, per: str, scale: float) -> None:
    data, bound = random_data(family, dtype=torch.float32), 0.01
    loss = build(FAMILIES[family], max_grad_norm=bound, per=per)
    unscaled = gradient(loss, data, scale=scale) / scale
    assert torch.equal(unscaled, gradient(loss, data))
    lengths = rows_of(data, unscaled).norm(dim=1)
    if per == "batch":
        assert lengths.norm() == pytest.approx(bound, rel=1e-6)
    else:
        assert lengths.max() == pytest.approx(bound / sqrt(4), rel=1e-6) and lengths.norm() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_per_batch_the_direction_stays(family: str) -> None:
    data = random_data(family)
    before = gradient(LossFunctionRegistry.build(FAMILIES[family]), data)
    after = gradient(build(FAMILIES[family], max_grad_norm=0.01), data)
    torch.testing.assert_close(after, before * 0.01 / before.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_per_sequence_outliers_alone_are_held_back(family: str) -> None:
    data = random_data(family)
    before = rows_of(data, gradient(LossFunctionRegistry.build(FAMILIES[family]), data))
    lengths = before.norm(dim=1)
    bound = lengths.sort().values[1:3].mean()  # two are longer, two are not
    loss = build(FAMILIES[family], max_grad_norm=bound.item() * 2, per="sequence")
    after = rows_of(data, gradient(loss, data))
    for row in range(4):
        longer = lengths[row] > bound
        torch.testing.assert_close(after[row], before[row] * (bound / lengths[row] if longer else 1))
    metrics = run(loss, data)[1]
    assert metrics["clip_fraction"].tolist() == (lengths > bound).tolist()
    torch.testing.assert_close(metrics["grad_norm"], lengths * 2)  # what is compared with max_grad_norm


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


# In a composition


def test_in_a_composition_it_clips_its_own_component() -> None:
    data = random_data("preference")
    clipped = {"type": "clipped_loss", "base_loss": "ipo", "max_grad_norm": 0.01, "name": "pref", "weight": 3.0}
    loss = LossFunctionRegistry.build(
        {"type": "composed", "components": [clipped, {"type": "sft", "weight": 0.5}]}, family="preference"
    )
    ipo, sft = (gradient(LossFunctionRegistry.build(name), data) for name in ("ipo", "sft"))
    torch.testing.assert_close(gradient(loss, data), 3 * ipo * 0.01 / ipo.norm() + 0.5 * sft)
    _, metrics = run(loss, data)
    assert {"pref_loss", "sft_loss", "total_loss", "base_loss", "grad_norm", "clip_fraction"} <= metrics.keys()
    assert metrics["pref_loss"] == metrics["base_loss"] == run(LossFunctionRegistry.build("ipo"), data)[0]


def test_a_composition_can_be_clipped() -> None:
    data = random_data("policy")
    components = [{"type": "grpo", "weight": 2.0}, {"type": "dapo", "weight": 1.0}]
    base = {"type": "composed", "components": components}
    before = gradient(LossFunctionRegistry.build(base, family="policy"), data)
    loss = LossFunctionRegistry.build(
        {"type": "clipped_loss", "base_loss": base, "max_grad_norm": 0.02}, family="policy"
    )
    torch.testing.assert_close(gradient(loss, data), before * 0.02 / before.norm())
    _, metrics = run(loss, data)
    assert {"grpo_loss", "dapo_loss", "grpo_weight"} <= metrics.keys()
    assert metrics["base_loss"] == metrics["total_loss"]
    assert [leaf.name for leaf in loss.leaves()] == ["grpo", "dapo"] and loss.kl_reduction == "sequence_mean"


def test_bounds_can_be_nested() -> None:
    data = random_data("preference")
    outer = build({"type": "clipped_loss", "base_loss": "ipo", "max_grad_norm": 0.02}, max_grad_norm=0.01)
    assert gradient(outer, data).norm() == pytest.approx(0.01)
    _, metrics = run(outer, data)
    assert metrics["grad_norm"] == pytest.approx(0.02)
    assert metrics["base/grad_norm"] == pytest.approx(gradient(LossFunctionRegistry.build("ipo"), data).norm())


@pytest.mark.parametrize("per", PER)
def test_gradient_balancing_sees_the_clipped_gradient(per: str) -> None:
    data = random_data("preference")
    clipped = {"type": "clipped_loss", "base_loss": "ipo", "max_grad_norm": 0.01, "per": per, "name": "pref"}
    loss = LossFunctionRegistry.build(
        {"type": "composed", "components": [clipped, {"type": "sft"}], "balancing": "upgrad"}, family="preference"
    )
    run(loss, data)
    length = gradient(build("ipo", max_grad_norm=0.01, per=per), data).norm()
    assert loss.take_observed()["gramian"][0, 0] == pytest.approx(length**2)


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


# The run


def test_the_bound_can_be_scheduled() -> None:
    loss = build("ipo", max_grad_norm={"schedule": "linear", "start": 0.04, "end": 0.01, "total_steps": 3})
    data = random_data("preference")
    for step, bound in enumerate([0.04, 0.03, 0.02, 0.01, 0.01]):
        loss.move_to_step(step)
        assert gradient(loss, data).norm() == pytest.approx(bound)


@pytest.mark.parametrize("per", PER)
def test_without_gradient_there_is_the_value_alone(per: str) -> None:
    data = random_data("preference")
    with torch.no_grad():
        value, metrics = run(build("ipo", per=per, max_grad_norm=1e-3), data)
    assert metrics.keys() == {"base_loss"} and value == run(LossFunctionRegistry.build("ipo"), data)[0]
    batch, outputs = data.build(build("ipo"))
    with torch.no_grad():
        assert build("ipo", per=per)(batch, outputs)[1].keys() == {"base_loss"}


def test_prepares_what_the_base_prepares() -> None:
    class Preparing(PolicyLoss):
        def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
            return {"advantages": 2 * rollout.advantages, "own": rollout.advantages}

        def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
            assert torch.equal(batch.advantages, 2 * batch["own"].unsqueeze(1))
            return -batch.advantages * model_outputs.per_token_logps, {"mine": batch.advantages.mean()}

    data, loss = random_data("policy"), ClippedLoss(base_loss=Preparing())
    assert loss.prepares and data.prepared(loss).keys() == {"base.advantages", "base.own"}
    assert "mine" in run(loss, data)[1]


def test_needs_what_the_base_needs() -> None:
    loss = build("aot")
    assert loss.batch_coupled and loss.requires == {"ref_logps"} and loss.family == "preference"
    policy = build({"type": "dr_grpo", "max_completion_length": 8})
    assert policy.family == "policy" and not policy.surrogate and policy.leaves()[0].surrogate
    assert policy.kl_reduction == policy.losses[0].reduction


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


# Refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "needs the hyperparameter 'base_loss'"),
        ({"base_loss": "sigmiod"}, "did you mean 'sigmoid'"),
        ({"base_loss": {"beta": 0.1}}, "'base_loss': expected a loss's name or a dict with 'type'"),
        ({"base_loss": ["sigmoid"]}, "base_loss"),
        ({"base_loss": "grpo"}, "is a policy loss and cannot run in a DPO trainer"),
        ({"base_loss": {"type": "sigmoid", "beta": -1.0}}, "beta"),
        ({"base_loss": "sigmoid", "max_grad_norm": 0.0}, "max_grad_norm"),
        ({"base_loss": "sigmoid", "per": "token"}, "'batch' | 'sequence'"),
        ({"base_loss": "sigmoid", "max_grad_norm": {"schedule": "linear", "start": 1.0, "end": 0.0}}, "reaches 0"),
    ],
)
def test_refuses(config: dict, message: str) -> None:
    with pytest.raises(LossConfigError, match=message.replace("|", r"\|")):
        LossFunctionRegistry.build({"type": "clipped_loss", **config}, family="preference")
