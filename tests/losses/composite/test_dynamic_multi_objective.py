"""Sums whose weights move: their construction, schedules, and together with other means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_custom_losses import LossConfigError, LossFunctionRegistry, ModelOutputs, PolicyLoss
from trl_custom_losses.balancing.gradients import MGDA
from trl_custom_losses.balancing.rules import RULES
from trl_custom_losses.losses.composite import DynamicMultiObjectiveLoss
from trl_custom_losses.losses.preference import SFTLoss, SigmoidLoss
from trl_custom_losses.testing import random_data

from .dynamic import HOST_RULES, OBJECTIVES, OPTIONS, build, end_step, moving, observe, take_steps

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
        build(**{"rule": "trend", **settings})


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
    loss = build(rule, family="policy", objectives=objectives, **options)
    weights: Sequence[float] = []
    for step in range(14):
        observe(loss, random_data("policy", seed=step))
        end_step(loss, step)
        weights = list(loss.current_weights().values())
        assert all(math.isfinite(weight) and weight >= 0 for weight in weights)


# Schedules


def test_an_option_of_the_rule_may_be_scheduled() -> None:
    schedule = {"schedule": "linear", "start": 0.0, "end": 0.5, "total_steps": 20}
    loss = build("trend", adaptation_rate=schedule)
    found = take_steps(loss, range(14))
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
        build(**settings)


# Together with others


@pytest.mark.usefixtures("reporting")
def test_balancing_multiplies_the_rules_weights() -> None:
    loss = moving("trend", balancing={"type": "mgda", "decay": 0.0}, objectives={"main": "reporting", "other": "sft"})
    gramian = torch.zeros(2, 2)
    for step in range(13):
        loss.move_to_step(step)
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
    loss = build("constraint", targets={"other": 0.5}, signal={"other": "kl"}, initial_weights={"other": 0.2})
    assert loss.extra_repr() == (
        "initial_weights={'main': 1.0, 'other': 0.2}, rule='constraint', targets={'other': 0.5}, eta=0.1, k_i=1.0, "
        "k_p=10.0, nu=0.9, signal={'other': 'kl'}"
    )
    schedule = {"schedule": "linear", "start": 0.1, "end": 0.0}
    loss = build("trend", adaptation_rate=schedule, balancing="mgda")
    assert "rule='trend', adaptation_rate=linear(start=0.1, end=0.0), floor=0.01, balancing=MGDA" in repr(loss)
