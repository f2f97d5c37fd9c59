"""Weighted sums of losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.example_losses import restored_registry
from trl_custom_losses import (
    ComposedLoss,
    LossConfigError,
    LossFunctionRegistry,
    ModelOutputs,
    PolicyBatch,
    PolicyLoss,
    PreferenceBatch,
    PreferenceLoss,
    Rollout,
)
from trl_custom_losses.composition import merge_metrics
from trl_custom_losses.reductions import FixedLengthMean, reduce_loss
from trl_custom_losses.testing import Data, random_data


class Reporting(PreferenceLoss):
    """Counts its calls and reports metrics of chosen names."""

    columns = ("weight",)

    def __init__(self, *, report: list = (), value: float = 1.0) -> None:
        super().__init__()
        self.report, self.value, self.calls = report, value, 0

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        self.calls += 1
        value = torch.full((), self.value)
        return -self.value * model_outputs.logps.chunk(2)[0], dict.fromkeys(self.report, value)


class Preparing(PolicyLoss):
    """Prepares advantages and a tensor of its own."""

    requires = frozenset({"rewards"})

    def __init__(self, *, value: float = 1.0) -> None:
        super().__init__()
        self.value, self.seen = value, None

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        return {"own": torch.full((4,), self.value), "advantages": torch.full((4,), 10 * self.value)}

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        self.seen = batch
        return -batch.advantages * model_outputs.per_token_logps, {}


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    with restored_registry():
        LossFunctionRegistry.register("reporting")(Reporting)
        LossFunctionRegistry.register("preparing")(Preparing)
        yield


def _composed(*components: dict[str, Any], family: Any = None) -> ComposedLoss:
    loss = LossFunctionRegistry.build({"type": "composed", "components": list(components)}, family=family)
    assert isinstance(loss, ComposedLoss)
    return loss


def _run(loss: ComposedLoss, data: Data) -> tuple[Tensor, dict]:
    batch, outputs = data.build(loss)
    raw, metrics = loss(batch, outputs)
    return reduce_loss(loss, raw, batch), dict(metrics)


# Value and gradient


def test_is_the_weighted_sum_of_values_and_gradients() -> None:
    composed = _composed(
        {"type": "sigmoid", "weight": 0.7, "beta": 0.3}, {"type": "sft", "weight": -0.2}, {"type": "ipo"}
    )
    parts = [LossFunctionRegistry.build(config) for config in ({"type": "sigmoid", "beta": 0.3}, "sft", "ipo")]
    data = random_data("preference")
    value, _ = _run(composed, data)
    torch.testing.assert_close(value, sum(w * data.loss(part) for w, part in zip((0.7, -0.2, 1), parts, strict=True)))
    expected = sum(w * data.gradient(part) for w, part in zip((0.7, -0.2, 1), parts, strict=True))
    torch.testing.assert_close(data.gradient(composed), expected)


def test_each_component_is_reduced_as_it_declares() -> None:
    data = random_data("policy")
    names = ("grpo", "dapo", "luspo")
    composed = _composed(*({"type": name} for name in names))
    value, metrics = _run(composed, data)
    single = [data.loss(LossFunctionRegistry.build(name)).item() for name in names]
    assert len({round(part, 6) for part in single}) == 3
    assert [metrics[f"{name}_loss"].item() for name in names] == pytest.approx(single)
    assert value.item() == pytest.approx(sum(single))


def test_each_component_runs_once_on_the_same_outputs() -> None:
    composed = _composed({"type": "reporting", "name": "a"}, {"type": "reporting", "name": "b"})
    _run(composed, random_data("preference"))
    assert [loss.calls for _, loss in composed.components()] == [1, 1]


def test_weight_zero_gives_no_gradient_but_logs() -> None:
    composed = _composed({"type": "sigmoid"}, {"type": "sft", "weight": 0.0})
    data = random_data("preference")
    assert torch.equal(data.gradient(composed), data.gradient(LossFunctionRegistry.build("sigmoid")))
    assert _run(composed, data)[1]["sft_loss"] > 0


def test_modifiers_reach_the_components() -> None:
    composed = _composed({"type": "sigmoid", "weight": 0.5})
    data = random_data("preference")
    batch, outputs = data.build(composed)
    batch.pair_weights = torch.full((4,), 3.0)
    raw, _ = composed(batch, outputs)
    torch.testing.assert_close(reduce_loss(composed, raw, batch), 3 * data.loss(composed))


# Metrics


def test_logs_raw_losses_weights_and_the_total() -> None:
    composed = _composed({"type": "reporting", "name": "a", "weight": 0.5}, {"type": "sft", "name": "b", "weight": 2})
    data = random_data("preference")
    value, metrics = _run(composed, data)
    assert list(metrics) == ["a_loss", "a_weight", "b_loss", "b_weight", "total_loss"]
    assert metrics["a_weight"] == 0.5 and metrics["b_weight"] == 2.0
    assert metrics["total_loss"].item() == value.item()
    assert value.item() == pytest.approx(0.5 * metrics["a_loss"].item() + 2 * metrics["b_loss"].item())
    assert not any(metric.requires_grad for metric in metrics.values())


def test_logged_losses_average_over_micro_batches_to_the_loss() -> None:
    composed = _composed({"type": "sigmoid"}, {"type": "sft", "weight": 0.5})
    data = random_data("preference")
    shared, whole = data.denominators(micro_batches=2), _run(composed, data)[1]
    parts = []
    for rows in ([0], [1, 2, 3]):
        batch, outputs = data.take(rows).build(composed, shared)
        parts.append(composed(batch, outputs)[1])
    for name in ("sigmoid_loss", "sft_loss", "total_loss"):
        assert ((parts[0][name] + parts[1][name]) / 2).item() == pytest.approx(whole[name].item())


def test_a_name_that_one_component_reports_stays_and_others_are_prefixed() -> None:
    composed = _composed(
        {"type": "reporting", "name": "a", "report": ["shared", "only"], "value": 2.0},
        {"type": "reporting", "name": "b", "report": ["shared"], "value": 3.0},
    )
    _, metrics = _run(composed, random_data("preference"))
    assert (metrics["only"], metrics["a/shared"], metrics["b/shared"]) == (2, 2, 3)
    assert "shared" not in metrics and "a/only" not in metrics


def test_a_components_metric_never_hides_behind_the_compositions() -> None:
    composed = _composed({"type": "reporting", "name": "a", "report": ["total_loss", "a_weight"], "value": 7.0})
    _, metrics = _run(composed, random_data("preference"))
    assert metrics["a_weight"] == 1.0 and metrics["total_loss"] != 7
    assert metrics["a/a_weight"] == metrics["a/total_loss"] == 7


def test_merge_metrics() -> None:
    values = [torch.tensor(float(i)) for i in range(3)]
    merged = merge_metrics({"a": {"x": values[0], "y": values[1]}, "b": {"x": values[2]}, "c": {}})
    assert merged == {"a/x": values[0], "y": values[1], "b/x": values[2]}


# Construction


def test_names_default_to_types() -> None:
    composed = _composed({"type": "sigmoid"}, {"type": "trl_custom_losses.losses.preference:SFTLoss"})
    assert composed.names == ("sigmoid", "SFTLoss") and composed.weights == {"sigmoid": 1.0, "SFTLoss": 1.0}
    assert composed.family == "preference" and composed.name == "composed"
    assert _composed({"type": "sft", "name": "type"}, {"type": "sft", "name": "a b"}).names == ("type", "a b")


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ([], "at least one loss"),
        ([{"type": "sigmoid"}, {"type": "sigmoid"}], "share the name 'sigmoid'"),
        ([{"type": "sigmoid", "name": "sft"}, {"type": "sft"}], "share the name 'sft'"),
        ([{"type": "sigmoid"}, {"type": "grpo"}], "of one family, found policy and preference"),
        (["sigmoid"], "component 1: expected a dict with 'type', found 'sigmoid'"),
        ([{"type": "sft"}, {"name": "a"}], "component 2: expected a dict with 'type'"),
        ([{"type": 3}], "component 1"),
        ([{"type": "sft", "name": "a.b"}], "without dots, found 'a.b'"),
        ([{"type": "sft", "name": ""}], "without dots"),
        ([{"type": "sft", "name": 3}], "without dots"),
        ([{"type": "sft", "name": "total"}], "the metric 'total_loss' is the trainer's"),
        ([{"type": "sft", "weight": True}], "component 'sft', 'weight': expected float, found True"),
        ([{"type": "sft", "weight": "1"}], "'weight': expected float, found '1'"),
        ([{"type": "sft", "weight": None}], "'weight': expected float"),
        ([{"type": "sft", "weight": float("nan")}], "'weight': expected a finite number"),
        ([{"type": "sft", "weight": float("-inf")}], "'weight': expected a finite number"),
        ([{"type": "nothing"}], "there is no loss named 'nothing'"),
        ([{"type": "sigmoid", "bta": 1.0}], "component 1: loss 'sigmoid' has no hyperparameter 'bta'"),
    ],
    ids=str,
)
def test_mistakes_are_named(components: list, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        _composed(*components)


def test_a_trainer_takes_components_of_its_family() -> None:
    with pytest.raises(LossConfigError, match="preference loss and cannot run in a GRPO trainer"):
        _composed({"type": "sigmoid"}, family="policy")


def test_components_fall_back_to_the_trainers_values() -> None:
    loss = LossFunctionRegistry.build(
        {"type": "composed", "components": [{"type": "sigmoid"}, {"type": "ipo", "beta": 0.9}]},
        family="preference",
        defaults={"beta": 0.4},
    )
    assert [leaf.beta for leaf in loss.leaves()] == [0.4, 0.9]


def test_needs_are_united() -> None:
    composed = _composed({"type": "reporting"}, {"type": "sigmoid"}, {"type": "aot"})
    assert composed.requires == {"ref_logps"} and composed.columns == ("weight",)
    assert composed.batch_coupled and not _composed({"type": "sigmoid"}).batch_coupled
    doubled = _composed({"type": "reporting", "name": "a"}, {"type": "reporting", "name": "b"})
    assert doubled.columns == ("weight",)
    assert _composed({"type": "preparing"}, {"type": "grpo"}).requires == {"rewards", "old_per_token_logps"}


def test_the_kl_term_follows_the_first_surrogate() -> None:
    class Auxiliary(PolicyLoss):
        surrogate = False

    LossFunctionRegistry.register("auxiliary")(Auxiliary)
    dr_grpo = {"type": "dr_grpo", "max_completion_length": 9}
    assert _composed({"type": "auxiliary"}, dr_grpo, {"type": "grpo"}).kl_reduction == FixedLengthMean(9)
    assert _composed({"type": "auxiliary"}).kl_reduction == "token_mean"


# Nesting


def test_compositions_nest() -> None:
    inner = {"type": "composed", "name": "inner", "weight": 0.5, "components": [{"type": "sft"}, {"type": "ipo"}]}
    nested = _composed({"type": "sigmoid"}, inner)
    data = random_data("preference")
    value, metrics = _run(nested, data)
    parts = {name: data.loss(LossFunctionRegistry.build(name)).item() for name in ("sigmoid", "sft", "ipo")}
    assert value.item() == pytest.approx(parts["sigmoid"] + 0.5 * (parts["sft"] + parts["ipo"]))
    assert [leaf.name for leaf in nested.leaves()] == ["sigmoid", "sft", "ipo"]
    assert metrics["inner_loss"].item() == pytest.approx(parts["sft"] + parts["ipo"])
    assert metrics["total_loss"].item() == value.item() and metrics["inner_weight"] == 0.5
    assert metrics["sft_loss"].item() == pytest.approx(parts["sft"])


def test_nested_components_of_one_name_are_told_apart() -> None:
    inner = {"type": "composed", "name": "inner", "components": [{"type": "ipo", "name": "main"}]}
    data = random_data("preference")
    _, metrics = _run(_composed({"type": "sft", "name": "main"}, inner), data)
    for name, type_ in (("main_loss", "sft"), ("inner/main_loss", "ipo"), ("inner_loss", "ipo")):
        assert metrics[name].item() == pytest.approx(data.loss(LossFunctionRegistry.build(type_)).item())


# Preparing


def test_components_prepare_for_themselves_alone() -> None:
    inner = {"type": "composed", "name": "inner", "components": [{"type": "preparing", "name": "b", "value": 2.0}]}
    composed = _composed({"type": "preparing", "name": "a"}, inner, {"type": "grpo"})
    prepared = composed.prepare(Rollout.__new__(Rollout))
    assert set(prepared) == {"a.own", "a.advantages", "inner.b.own", "inner.b.advantages"}
    data = random_data("policy")
    batch, outputs = data.build(composed)
    before = batch.advantages.clone()
    batch.prepared = prepared
    _, metrics = composed(batch, outputs)
    first, second = composed.leaves()[:2]
    assert (first.seen["own"][0], second.seen["own"][0]) == (1, 2)
    assert first.seen.advantages.tolist() == [[10.0]] * 4 and second.seen.advantages.tolist() == [[20.0]] * 4
    assert torch.equal(batch.advantages, before)
    assert metrics["grpo_loss"].item() == data.loss(LossFunctionRegistry.build("grpo")).item()


def test_prepares_if_a_component_does() -> None:
    assert _composed({"type": "grpo"}, {"type": "preparing"}).prepares
    assert not _composed({"type": "grpo"}).prepares and not _composed({"type": "sft"}).prepares
    assert _composed({"type": "grpo"}).prepare(Rollout.__new__(Rollout)) == {}


def test_names_are_checked_however_a_composition_is_made() -> None:
    losses = [LossFunctionRegistry.build(name) for name in ("sigmoid", "sft")]
    for names, message in [(("a", "a"), "share the name 'a'"), (("total", "a"), "the metric 'total_loss'")]:
        with pytest.raises(LossConfigError, match=message):
            ComposedLoss(components=[(name, 1.0, loss) for name, loss in zip(names, losses, strict=True)])


def test_components_from_python_are_configs_or_objects() -> None:
    made = ComposedLoss(components=[{"type": "sft", "weight": 0.5}, ("pref", 2.0, LossFunctionRegistry.build("hinge"))])
    assert made.weights == {"sft": 0.5, "pref": 2.0}
    with pytest.raises(LossConfigError, match="at least one loss"):
        ComposedLoss(components=[])
