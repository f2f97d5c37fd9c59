"""Sums whose weights move: rules from a config, what they are fed with, and what they do to the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.example_losses import restored_registry
from trl_custom_losses import (
    Denominators,
    LossConfigError,
    LossFunctionRegistry,
    Metric,
    ModelOutputs,
    PolicyLoss,
    PreferenceLoss,
)
from trl_custom_losses.balancing.gradients import MGDA
from trl_custom_losses.balancing.rules import RULES
from trl_custom_losses.losses.composite import DynamicMultiObjectiveLoss
from trl_custom_losses.losses.preference import SFTLoss, SigmoidLoss

from ..factories import Data, random_data

OBJECTIVES = {"main": {"type": "sigmoid", "beta": 0.3}, "other": "sft"}
#: What a rule needs, and makes it move from the first steps on.
OPTIONS: dict[str, dict[str, Any]] = {
    "trend": {"adaptation_rate": 0.1},
    "dwa": {"window": 1, "temperature": 0.5},
    "softadapt": {"window": 1, "beta": 2.0},
    "relobralo": {"alpha": 0.5, "rho": 0.5},
    "constraint": {"targets": {"other": 0.5}, "eta": 0.2},
    "uncertainty": {"learning_rate": 0.1},
}
HOST_RULES = [name for name in RULES if name != "uncertainty"]


class Reporting(PreferenceLoss):
    """Reports metrics of several kinds."""

    def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        logps = model_outputs.logps.detach()
        return -model_outputs.logps, {
            "per_row": logps,
            "per_pair": logps.chunk(2)[0],
            "column": logps.unsqueeze(1),
            "per_token": model_outputs.per_token_logps.detach(),
            "one": logps.mean(),
            "number": 2.5,
            "count": torch.tensor(3),
            "masked": Metric(logps, mask=(logps < -4).to(logps)),
            "smallest": Metric(logps, reduce="min"),
            "perplexity": Metric(-logps, reduce="exp"),
        }


class Renaming(Reporting):
    def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        raw, metrics = super().forward(batch, model_outputs)
        return raw, {"per_row": 10 * metrics["per_row"], "only_here": metrics["one"]}


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    with restored_registry():
        LossFunctionRegistry.register("reporting")(Reporting)
        LossFunctionRegistry.register("renaming")(Renaming)
        yield


def _dynamic(rule: Any = "trend", *, family: Any = "preference", **settings: Any) -> DynamicMultiObjectiveLoss:
    config = {"type": "dynamic_multi_objective", "objectives": OBJECTIVES, "rule": rule, **settings}
    loss = LossFunctionRegistry.build(config, family=family)
    assert isinstance(loss, DynamicMultiObjectiveLoss)
    return loss


def _moving(rule: str, **settings: Any) -> DynamicMultiObjectiveLoss:
    return _dynamic(rule, **{"initial_weights": {"main": 1.0, "other": 0.5}, **OPTIONS[rule], **settings})


def _observe(loss: DynamicMultiObjectiveLoss, data: Data, denominators: Denominators | None = None) -> Tensor:
    return loss(*data.build(loss, denominators))[0]


def _end_step(loss: DynamicMultiObjectiveLoss, step: int) -> None:
    loss.on_step_end(step, {name: value.double() for name, value in loss.take_observed().items()})


def _take_steps(loss: DynamicMultiObjectiveLoss, steps: range) -> list[dict[str, float]]:
    """The weights after each of several steps on one batch each."""
    found = []
    for step in steps:
        loss.move_to_step(step)
        loss.on_step_begin(step)
        _observe(loss, random_data("preference", seed=step))
        _end_step(loss, step)
        found.append(loss.current_weights())
    return found


def _signal(loss: DynamicMultiObjectiveLoss, data: Data, name: str = "main") -> float:
    """What the rule is fed with for an objective."""
    seen: list[list[float]] = []
    loss.rule.update = lambda signals, step: seen.append(list(signals))
    _observe(loss, data)
    _end_step(loss, 0)
    return seen[0][loss.names.index(name)]


# Rules


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_and_its_options_come_from_the_config(rule: str, nested: bool) -> None:
    options = OPTIONS[rule]
    loss = _dynamic({"type": rule, **options}) if nested else _dynamic(rule, **options)
    assert type(loss.rule) is RULES[rule] and loss.rule.names == ("main", "other")
    for name, value in options.items():
        assert getattr(loss.rule, name) == value and type(getattr(loss.rule, name)) is type(value)
    assert loss.family == "preference" and [leaf.name for leaf in loss.leaves()] == ["sigmoid", "sft"]
    assert loss.current_weights() == {"main": 1.0, "other": 1.0}


def test_options_of_both_kinds_add_up() -> None:
    loss = _dynamic({"type": "dwa", "window": 3}, temperature=1)
    assert (loss.rule.window, loss.rule.temperature) == (3, 1.0)


def test_trend_at_a_rate_of_one_percent_is_the_default() -> None:
    loss = LossFunctionRegistry.build({"type": "dynamic_multi_objective", "objectives": OBJECTIVES})
    assert loss.rule_name == "trend" and loss.rule.adaptation_rate == 0.01


def test_initial_weights_by_name() -> None:
    loss = _dynamic("dwa", initial_weights={"other": 2})
    assert loss.current_weights() == {"main": 1.0, "other": 2.0}
    data = random_data("preference")
    value, metrics = loss(*data.build(loss))
    parts = data.loss(SigmoidLoss(beta=0.3)), data.loss(SFTLoss())
    torch.testing.assert_close(value, parts[0] + 2 * parts[1])
    assert list(metrics) == ["main_loss", "main_weight", "other_loss", "other_weight", "total_loss"]
    assert metrics["other_weight"] == 2 and metrics["other_loss"].item() == pytest.approx(parts[1].item())


@pytest.mark.parametrize("rule", HOST_RULES)
def test_the_rule_is_fed_with_the_losses_of_each_step(rule: str) -> None:
    loss = _moving(rule)
    expected = RULES[rule](names=loss.names, initial_weights=[1.0, 0.5], **OPTIONS[rule])
    found = _take_steps(loss, range(14))
    for step, weights in enumerate(found):
        data = random_data("preference", seed=step)
        expected.update([data.loss(SigmoidLoss(beta=0.3)).item(), data.loss(SFTLoss()).item()], step)
        assert list(weights.values()) == pytest.approx(expected.weights, rel=1e-9)
    assert found[-1] != {"main": 1.0, "other": 0.5}
    # The loss of the next step is weighed with them, and so logged.
    data = random_data("preference", seed=99)
    value, metrics = loss(*data.build(loss))
    assert value.item() == pytest.approx(
        sum(found[-1][name] * metrics[f"{name}_loss"].item() for name in ("main", "other"))
    )
    assert metrics["main_weight"].item() == pytest.approx(found[-1]["main"])


@pytest.mark.parametrize("rule", HOST_RULES)
@pytest.mark.parametrize("style", ["dpo", "grpo"])
def test_weights_do_not_depend_on_how_a_batch_is_split(rule: str, style: str) -> None:
    """Over micro-batches and ranks, whose sums the driver adds up; also those of a signal."""
    signal = {"other": "length"} if rule == "relobralo" else None
    whole, split = (_moving(rule, signal=signal) for _ in range(2))
    ranks = [[[0], [1, 2]], [[3, 4], [5]]]
    for step in range(12):
        data = random_data("preference", size=6, seed=step)
        denominators = data.denominators()
        _observe(whole, data, denominators)
        _end_step(whole, step)
        divisor = 2 * (2 if style == "dpo" else 1)
        shared = Denominators(
            sequences=denominators.sequences / divisor,
            tokens=denominators.tokens / divisor,
            chosen_tokens=denominators.chosen_tokens / divisor,
            micro_batches=1.0 if style == "dpo" else 2.0,
            step_fraction=1 / divisor,
        )
        sums: dict[str, Tensor] = {}
        for parts in ranks:
            for part in parts:
                _observe(split, data.take(part), shared)
            for name, value in split.take_observed().items():
                sums[name] = sums.get(name, 0) + value.double()
        split.on_step_end(step, sums)
        assert list(split.current_weights().values()) == pytest.approx(list(whole.current_weights().values()))
    assert whole.current_weights() != {"main": 1.0, "other": 0.5}


@pytest.mark.parametrize("rule", HOST_RULES)
def test_evaluation_moves_nothing(rule: str) -> None:
    loss = _moving(rule)
    _take_steps(loss, range(3))
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    loss.eval()
    for step in range(3, 6):
        _observe(loss, random_data("preference", seed=step))
        assert loss.take_observed() == {}
        loss.on_step_end(step, {})
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


@pytest.mark.parametrize("rule", HOST_RULES)
def test_the_state_continues_bit_for_bit(rule: str) -> None:
    whole, resumed = _moving(rule), _moving(rule)
    _take_steps(whole, range(11))
    resumed.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    assert resumed.current_weights() == whole.current_weights()
    assert _take_steps(resumed, range(11, 16)) == _take_steps(whole, range(11, 16))
    assert {(str(v.device), v.dtype) for v in resumed.state_dict().values()} == {("cpu", torch.float64)}


def test_a_constraint_pushes_towards_its_target() -> None:
    weights = _take_steps(_moving("constraint", targets={"main": 0.0, "other": 100.0}), range(3))
    assert all(found["main"] > 1.0 for found in weights) and weights[-1]["other"] == 0.0
    assert [found["main"] for found in weights] == sorted(found["main"] for found in weights)


def test_targets_are_checked_by_name() -> None:
    with pytest.raises(LossConfigError, match=r"'targets': no objective is named 'othr' \(did you mean 'other'"):
        _dynamic("constraint", targets={"othr": 1.0})


# Uncertainty


def test_uncertainty_learns_its_weights() -> None:
    loss = _dynamic("uncertainty", initial_weights={"main": 2.0, "other": 0.5}, loss_floor=0.01)
    data = random_data("preference")
    value, metrics = loss(*data.build(loss))
    parts = [data.loss(SigmoidLoss(beta=0.3)), data.loss(SFTLoss())]
    s = [-math.log(2.0), -math.log(0.5)]
    assert value.item() == pytest.approx(2 * parts[0].item() + 0.5 * parts[1].item() + sum(s))
    assert (metrics["main_weight"].item(), metrics["other_weight"].item()) == pytest.approx((2.0, 0.5))
    assert metrics["total_loss"].item() == value.item()
    assert not any(metric.requires_grad for metric in metrics.values())
    value.backward()
    # d/ds (exp(-s) L + s)
    expected = [1 - weight * part.item() for weight, part in zip((2.0, 0.5), parts, strict=True)]
    assert loss.rule.log_variances.grad.tolist() == pytest.approx(expected, rel=1e-5)
    gradients = [torch.autograd.grad(part, data.rows["logps"])[0] for part in parts]
    torch.testing.assert_close(data.rows["logps"].grad, 2 * gradients[0] + 0.5 * gradients[1], rtol=1e-6, atol=1e-9)
    assert loss.take_observed() == {} and loss.learns


def test_uncertainty_gets_the_same_gradient_from_micro_batches() -> None:
    data = random_data("preference")
    gradients = []
    for parts in ([[0, 1, 2, 3]], [[0], [1, 2, 3]]):
        loss = _dynamic("uncertainty", initial_weights={"main": 2.0, "other": 0.5})
        shared = data.denominators(micro_batches=len(parts))
        sum(_observe(loss, data.take(part), shared) for part in parts).backward()
        gradients.append(loss.rule.log_variances.grad)
    torch.testing.assert_close(*gradients)


def test_uncertainty_follows_what_is_trained() -> None:
    loss = _dynamic("uncertainty")
    with torch.no_grad():
        loss.rule.log_variances.copy_(torch.tensor([-math.log(3.0), 0.0]))
    assert list(loss.current_weights().values()) == pytest.approx([3.0, 1.0])
    _, metrics = loss(*random_data("preference").build(loss))
    assert metrics["main_weight"].item() == pytest.approx(3.0)
    assert [name for name, _ in loss.named_parameters()] == ["rule.log_variances"]


# Signals


def _k3(data: Data) -> Tensor:
    difference = (data.rows["ref"] - data.rows["logps"]).detach()
    return ((difference.exp() - difference - 1) * data.rows["mask"]).sum() / data.rows["mask"].sum()


def _expected(signal: str, data: Data) -> Tensor:
    rows, mask = data.rows, data.rows["mask"]
    if signal == "kl":
        return _k3(data)
    if signal == "entropy":
        return (rows["entropies"] * mask).sum() / mask.sum()
    if signal == "length":
        return mask.sum(1).double().mean()
    if signal == "margin":
        ratios = ((rows["logps"] - rows["ref"]) * mask).sum(1)
        return (ratios[: data.size] - ratios[data.size :]).mean().detach()
    scored = ~data.items["rewards"].isnan().all(1)
    return data.items["rewards"][scored].nansum(1).mean()


@pytest.mark.parametrize(
    ("family", "signal", "requires"),
    [
        ("preference", "kl", "ref_per_token_logps"),
        ("preference", "entropy", "entropies"),
        ("preference", "length", None),
        ("preference", "margin", "ref_logps"),
        ("policy", "kl", "ref_per_token_logps"),
        ("policy", "entropy", "entropies"),
        ("policy", "length", None),
        ("policy", "reward", "rewards"),
    ],
)
def test_signals_that_are_measured(family: str, signal: str, requires: str | None) -> None:
    objectives = {"main": "sft", "other": "sft"} if family == "preference" else {"main": "grpo", "other": "dapo"}
    data = random_data(family, lengths=[1, 4, 2, 5, 3, 1, 4, 2][: 8 if family == "preference" else 4])
    data.items["rewards"][1] = math.nan
    data.items["rewards"][2, 0] = math.nan
    for given in (signal, {"main": signal}):
        loss = _dynamic(family=family, objectives=objectives, signal=given)
        own = frozenset().union(*(part.requires for part in loss.leaves()))
        assert loss.requires == own | ({requires} if requires else set())
        assert _signal(loss, data) == pytest.approx(_expected(signal, data).item(), rel=1e-5)
    # The other objective follows its loss.
    assert _signal(loss, data, "other") == pytest.approx(data.loss(loss.losses[1]).item())


@pytest.mark.parametrize("signal", ["kl", "length", "margin", "per_pair", "per_token", "one"])
def test_a_signal_is_the_mean_over_a_step_that_is_split(signal: str) -> None:
    data = random_data("preference", size=5)
    objectives = {"main": "reporting", "other": "sft"}
    whole = _signal(_dynamic(objectives=objectives, signal={"main": signal}), data)
    loss = _dynamic(objectives=objectives, signal={"main": signal})
    seen: list[list[float]] = []
    loss.rule.update = lambda signals, step: seen.append(list(signals))
    parts = [[0], [1, 2, 3, 4]]
    for part in parts:
        _observe(loss, data.take(part), data.denominators(micro_batches=2))
    _end_step(loss, 0)
    if signal == "one":  # a scalar is one value a micro-batch
        whole = sum(_signal(_dynamic(objectives=objectives, signal="one"), data.take(part)) for part in parts) / 2
    assert seen[0][0] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("signal", ["per_row", "per_pair", "column", "per_token", "one", "number", "count", "masked"])
def test_a_metric_of_an_objective_is_a_signal(signal: str) -> None:
    data = random_data("preference", lengths=[1, 4, 2, 5, 3, 1, 4, 2])
    logps = (data.rows["logps"] * data.rows["mask"]).sum(1).detach()
    expected = {
        "per_pair": logps[:4].mean(),
        "per_token": logps.sum() / data.rows["mask"].sum(),
        "number": 2.5,
        "count": 3,
        "masked": logps[logps < -4].mean(),
    }.get(signal, logps.mean())
    loss = _dynamic(objectives={"main": "reporting", "other": "sft"}, signal=signal)
    assert _signal(loss, data) == pytest.approx(float(expected), rel=1e-6)
    # An objective that does not report it follows the other's.
    assert _signal(loss, data, "other") == pytest.approx(float(expected), rel=1e-6)


def test_an_objectives_own_metric_comes_first() -> None:
    objectives = {"main": "reporting", "other": "renaming"}
    data = random_data("preference")
    loss = _dynamic(objectives=objectives, signal={"main": "per_row", "other": "per_row"})
    assert _signal(loss, data, "other") == pytest.approx(10 * _signal(loss, data), rel=1e-6)
    loss = _dynamic(objectives=objectives, signal={"main": "only_here"})
    assert math.isfinite(_signal(loss, data))


@pytest.mark.parametrize(
    ("signal", "message"),
    [
        ("smallest", "the signal 'smallest' is a min and has no mean"),
        ("perplexity", "the signal 'perplexity' is a exp"),
        ("KL", r"the signal 'KL' is neither measured nor reported.*'kl', 'length'.*'per_row'"),
    ],
)
def test_signals_that_are_none_are_named_at_the_first_step(signal: str, message: str) -> None:
    loss = _dynamic(objectives={"main": "reporting", "other": "sft"}, signal=signal)
    with pytest.raises(ValueError, match=message):
        loss(*random_data("preference").build(loss))


@pytest.mark.parametrize("signal", ["length", "margin", "per_row", "per_pair", "column", "kl"])
def test_rows_without_a_pair_do_not_count(signal: str) -> None:
    """As among pairs of a rollout."""
    objectives = {"main": "reporting", "other": "sigmoid"}
    data = random_data("preference", lengths=[1, 4, 2, 5, 3, 1, 4, 2])
    full = _signal(_dynamic(objectives=objectives, signal=signal), data.take([0, 2]))
    hole = data.with_rows(mask=data.rows["mask"] * torch.tensor([1, 0, 1, 0] * 2).unsqueeze(1))
    loss = _dynamic(objectives=objectives, signal=signal)
    seen: list[list[float]] = []
    loss.rule.update = lambda signals, step: seen.append(list(signals))
    batch, outputs = hole.build(loss)
    batch.pair_mask = torch.tensor([1, 0, 1, 0])
    loss(batch, outputs)
    _end_step(loss, 0)
    assert seen[0][0] == pytest.approx(full, rel=1e-6)


def test_a_signal_of_nothing_leaves_the_weights() -> None:
    objectives = {"main": "grpo", "other": "dapo"}
    settings = {"targets": {"main": 0.0, "other": 0.0}, "signal": {"main": "reward"}}
    loss = _dynamic("constraint", family="policy", objectives=objectives, **settings)
    data = random_data("policy")
    _observe(loss, replace(data, items=data.items | {"rewards": torch.full((4, 2), math.nan)}))
    _end_step(loss, 0)
    weights = loss.current_weights()
    assert weights["main"] == 1.0 and weights["other"] != 1.0


def test_a_constraint_on_the_kl_follows_the_kl() -> None:
    settings = {"targets": {"other": 0.01}, "signal": {"other": "kl"}, "eta": 0.5, "k_p": 0.0}
    loss = _dynamic("constraint", **settings)
    data = random_data("preference")
    _observe(loss, data)
    _end_step(loss, 0)
    kl = _k3(data).item()
    assert kl > 0.01
    assert loss.current_weights() == {"main": 1.0, "other": pytest.approx(1 + 0.5 * (kl - 0.01), rel=1e-5)}


# Schedules


def test_an_option_of_the_rule_may_be_scheduled() -> None:
    schedule = {"schedule": "linear", "start": 0.0, "end": 0.5, "total_steps": 20}
    loss = _dynamic("trend", adaptation_rate=schedule)
    found = _take_steps(loss, range(14))
    weight, expected = 1.0, []
    for step in range(14):
        losses = [random_data("preference", seed=s).loss(SFTLoss()).item() for s in range(step + 1)]
        if len(losses) > 10:
            before = losses[:-10]
            falling = sum(losses[-10:]) / 10 < sum(before) / len(before)
            weight *= 1 + (1 if falling else -1) * 0.025 * step
        expected.append(weight)
    assert [weights["other"] for weights in found] == pytest.approx(expected) and expected[-1] != 1
    assert loss.moving() == {"adaptation_rate": pytest.approx(0.325)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adaptation_rate": {"schedule": "linear", "start": 0.1, "end": 2.0}}, "'adaptation_rate' .*reaches 2: "),
        ({"rule": "dwa", "adaptation_rate": {"schedule": "constant", "value": 0.1}}, "'dwa' has no option"),
        ({"rule": "dwa", "window": {"schedule": "linear", "start": 2, "end": 4}}, "option 'window': expected int"),
        ({"rule": "uncertainty", "learning_rate": {"schedule": "constant", "value": 0.1}}, "cannot be scheduled"),
        ({"rule": {"type": "trend", "adaptation_rate": {"schedule": "constant", "value": 0.1}}}, "expected float"),
        ({"initial_weights": {"main": {"schedule": "constant", "value": 1.0}}}, "the rule moves the weights"),
    ],
    ids=str,
)
def test_schedules_that_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        _dynamic(**settings)


# Together with others


def test_balancing_multiplies_the_rules_weights() -> None:
    loss = _moving("trend", balancing={"type": "mgda", "decay": 0.0}, objectives={"main": "reporting", "other": "sft"})
    gramian = torch.zeros(2, 2)
    for step in range(13):
        loss.on_step_begin(step)
        weights = loss.current_weights()
        batch, outputs = random_data("preference", seed=step).build(loss)
        parts = loss.contributions(batch, outputs)[0]
        loss.take_observed()
        value, metrics = loss(batch, outputs)
        product = {name: weights[name] * loss.factors[name] for name in loss.names}
        assert value.item() == pytest.approx(sum(product[name] * parts[name].item() for name in product))
        assert metrics["main_weight"].item() == pytest.approx(product["main"])
        if step:
            scale = torch.tensor(list(weights.values()), dtype=torch.float64)
            assert list(loss.factors.values()) == MGDA()(scale[:, None] * gramian * scale, step).tolist()
        observed = {name: tensor.double() for name, tensor in loss.take_observed().items()}
        gramian = observed["gramian"]
        assert list(loss.on_step_end(step, observed)) == ["grad_cosine/main/other"]
    assert weights != {"main": 1.0, "other": 0.5} and loss.factors["main"] != 1


def test_nests() -> None:
    inner = {"type": "dynamic_multi_objective", "name": "inner", "weight": 2.0, "objectives": OBJECTIVES}
    outer = LossFunctionRegistry.build({"type": "composed", "components": [inner, {"type": "ipo"}]})
    data = random_data("preference")
    outer(*data.build(outer))
    dynamic = outer.losses[0]
    assert set(dynamic.take_observed()) == {"losses"} and set(outer.state_dict()) == {
        f"losses.0.{name}" for name in dynamic.state_dict()
    }


def test_objectives_fall_back_to_the_trainers_values_but_rules_do_not() -> None:
    """GRPO's `temperature` is that of sampling, `learning_rate` is the model's."""
    fields = {"temperature": 0.7, "beta": 0.9, "learning_rate": 1e-6, "epsilon": 0.33, "seed": 5}
    config = {"type": "dynamic_multi_objective", "objectives": {"main": "grpo", "other": "dapo"}}
    for rule in RULES:
        options = {"targets": {"main": 0.1}} if rule == "constraint" else {}
        loss = LossFunctionRegistry.build({**config, "rule": rule, **options}, family="policy", defaults=fields)
        assert [leaf.epsilon for leaf in loss.leaves()] == [0.33, 0.33]
        default = RULES[rule](names=["main", "other"], initial_weights=[1, 1], **options)
        for name in fields:
            assert getattr(loss.rule, name, None) == getattr(default, name, None)


def test_describes_itself() -> None:
    loss = _dynamic("constraint", targets={"other": 0.5}, signal={"other": "kl"}, initial_weights={"other": 0.2})
    assert loss.extra_repr() == (
        "initial_weights={'main': 1.0, 'other': 0.2}, rule='constraint', targets={'other': 0.5}, eta=0.1, k_i=1.0, "
        "k_p=10.0, nu=0.9, signal={'other': 'kl'}"
    )
    schedule = {"schedule": "linear", "start": 0.1, "end": 0.0}
    loss = _dynamic("trend", adaptation_rate=schedule, balancing="mgda")
    assert "rule='trend', adaptation_rate=linear(start=0.1, end=0.0), floor=0.01, balancing=MGDA" in repr(loss)


# Construction


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "trnd"}, r"'rule': there is no rule 'trnd' \(did you mean 'trend'.*uncertainty"),
        ({"rule": {"adaptation_rate": 0.1}}, "there is no rule None"),
        ({"rule": {"type": "trend", "rate": 0.1}}, r"rule 'trend' has no option 'rate'.*adaptation_rate: float = 0.01"),
        ({"rule": "trend", "temperature": 1.0}, "the rule 'trend' has no option 'temperature'"),
        ({"rule": {"type": "trend", "names": ["a"]}}, "the rule 'trend' has no option 'names'"),
        ({"rule": {"type": "trend", "initial_weights": [1.0]}}, "the rule 'trend' has no option 'initial_weights'"),
        ({"adaptation_rat": 0.1}, r"no hyperparameter 'adaptation_rat' \(did you mean 'adaptation_rate'"),
        ({"adaptation_rate": "0.1"}, "rule 'trend', option 'adaptation_rate': expected float, found '0.1'"),
        ({"adaptation_rate": 1.5}, "'adaptation_rate': expected a value >= 0 and < 1, found 1.5"),
        (
            {"rule": {"type": "trend", "adaptation_rate": 0.1}, "adaptation_rate": 0.2},
            "'adaptation_rate' is given twice",
        ),
        ({"rule": "constraint"}, "the rule 'constraint' needs 'targets'"),
        ({"rule": "constraint", "targets": 0.5}, "rule 'constraint', option 'targets': expected .*, found 0.5"),
        ({"rule": "constraint", "targets": {"other": "x"}}, "'targets': expected a finite number for 'other'"),
        ({"rule": "softadapt", "variant": "odd"}, "'variant'"),
        ({"rule": 3}, r"'rule'.*expected str \| dict"),
        ({"objectives": {}}, "at least one loss"),
        ({"objectives": ["sigmoid", "sft"]}, "'objectives'.*found"),
        ({"objectives": {"a": 3}}, "objective 'a': expected a loss's name or a dict with 'type', found 3"),
        ({"objectives": {"a": {"beta": 1}}}, "objective 'a': expected a loss's name"),
        ({"objectives": {"a": "nothing"}}, "there is no loss named 'nothing'"),
        ({"objectives": {"a": "sigmoid", "b": "grpo"}, "family": None}, "of one family"),
        ({"objectives": {"a": "grpo"}}, "cannot run in a DPO trainer"),
        ({"objectives": {"a.b": "sft"}}, "text without dots"),
        ({"initial_weights": {"mai": 1.0}}, "a weight for 'mai', but the components are main, other"),
        ({"initial_weights": {"main": "1"}}, "'weight': expected float"),
        ({"initial_weights": {"main": -1.0}}, "weight of 'main'"),
        ({"initial_weights": [1.0, 1.0]}, "'initial_weights'.*expected"),
        ({"signal": {"mai": "kl"}}, r"'signal': there is no objective 'mai' \(did you mean 'main'"),
        ({"signal": 3}, r"'signal'.*expected str \| dict"),
        ({"signal": {"main": 3}}, "'signal'.*3"),
        ({"signal": "reward"}, "the signal 'reward' exists for policy losses alone"),
        ({"signal": {"main": "margin"}, "family": "policy", "objectives": {"main": "grpo"}}, "'margin' exists for"),
        ({"rule": "uncertainty", "balancing": "upgrad"}, "'uncertainty' learns them; choose one"),
        ({"rule": "uncertainty", "signal": "kl"}, "'signal'.*'uncertainty'"),
        ({"rule": "uncertainty", "initial_weights": {"main": 0.0}}, "weight of 'main'"),
        ({"balancing": "upgrd"}, "no method 'upgrd'"),
    ],
    ids=str,
)
def test_mistakes_are_named(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        _dynamic(**{"rule": "trend", **settings})


def test_losses_may_be_given_as_objects() -> None:
    loss = DynamicMultiObjectiveLoss(
        objectives={"main": SigmoidLoss(beta=0.3), "other": SFTLoss()}, rule="dwa", temperature=1.0
    )
    assert (loss.rule.temperature, loss.rule.window) == (1.0, 10)
    assert isinstance(loss.losses[0], SigmoidLoss)


class Zero(PolicyLoss):
    def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return 0 * model_outputs.per_token_logps, {}


@pytest.mark.parametrize("rule", HOST_RULES)
def test_losses_about_zero_keep_weights_finite(rule: str) -> None:
    """The loss of an on-policy surrogate is 0 up to rounding."""
    objectives = {"main": "grpo", "zero": {"type": f"{__name__}:Zero"}}
    options = OPTIONS[rule] | ({"targets": {"zero": 0.0}} if rule == "constraint" else {})
    loss = _dynamic(rule, family="policy", objectives=objectives, **options)
    weights: Sequence[float] = []
    for step in range(14):
        _observe(loss, random_data("policy", seed=step))
        _end_step(loss, step)
        weights = list(loss.current_weights().values())
        assert all(math.isfinite(weight) and weight >= 0 for weight in weights)
