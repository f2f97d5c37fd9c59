"""Rules that move the weights of a sum: from a config, fed with its losses, and what they do to it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trl_custom_losses import Denominators, LossConfigError, LossFunctionRegistry
from trl_custom_losses.balancing.rules import RULES
from trl_custom_losses.losses.preference import SFTLoss, SigmoidLoss
from trl_custom_losses.testing import random_data

from .dynamic import HOST_RULES, OBJECTIVES, OPTIONS, build, end_step, moving, observe, take_steps

# Rules


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_and_its_options_come_from_the_config(rule: str, nested: bool) -> None:
    options = OPTIONS[rule]
    loss = build({"type": rule, **options}) if nested else build(rule, **options)
    assert type(loss.rule) is RULES[rule] and loss.rule.names == ("main", "other")
    for name, value in options.items():
        assert getattr(loss.rule, name) == value and type(getattr(loss.rule, name)) is type(value)
    assert loss.family == "preference" and [leaf.name for leaf in loss.leaves()] == ["sigmoid", "sft"]
    assert loss.current_weights() == {"main": 1.0, "other": 1.0}


def test_options_of_both_kinds_add_up() -> None:
    loss = build({"type": "dwa", "window": 3}, temperature=1)
    assert (loss.rule.window, loss.rule.temperature) == (3, 1.0)


def test_trend_at_a_rate_of_one_percent_is_the_default() -> None:
    loss = LossFunctionRegistry.build({"type": "dynamic_multi_objective", "objectives": OBJECTIVES})
    assert loss.rule_name == "trend" and loss.rule.adaptation_rate == 0.01


def test_initial_weights_by_name() -> None:
    loss = build("dwa", initial_weights={"other": 2})
    assert loss.current_weights() == {"main": 1.0, "other": 2.0}
    data = random_data("preference")
    value, metrics = loss(*data.build(loss))
    parts = data.loss(SigmoidLoss(beta=0.3)), data.loss(SFTLoss())
    torch.testing.assert_close(value, parts[0] + 2 * parts[1])
    assert list(metrics) == ["main_loss", "main_weight", "other_loss", "other_weight", "total_loss"]
    assert metrics["other_weight"] == 2 and metrics["other_loss"].item() == pytest.approx(parts[1].item())


@pytest.mark.parametrize("rule", HOST_RULES)
def test_the_rule_is_fed_with_the_losses_of_each_step(rule: str) -> None:
    loss = moving(rule)
    expected = RULES[rule](names=loss.names, initial_weights=[1.0, 0.5], **OPTIONS[rule])
    found = take_steps(loss, range(14))
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
    whole, split = (moving(rule, signal=signal) for _ in range(2))
    ranks = [[[0], [1, 2]], [[3, 4], [5]]]
    for step in range(12):
        data = random_data("preference", size=6, seed=step)
        denominators = data.denominators()
        observe(whole, data, denominators)
        end_step(whole, step)
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
                observe(split, data.take(part), shared)
            for name, value in split.take_observed().items():
                sums[name] = sums.get(name, 0) + value.double()
        split.on_step_end(step, sums)
        assert list(split.current_weights().values()) == pytest.approx(list(whole.current_weights().values()))
    assert whole.current_weights() != {"main": 1.0, "other": 0.5}


@pytest.mark.parametrize("rule", HOST_RULES)
def test_evaluation_moves_nothing(rule: str) -> None:
    loss = moving(rule)
    take_steps(loss, range(3))
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    loss.eval()
    for step in range(3, 6):
        observe(loss, random_data("preference", seed=step))
        assert loss.take_observed() == {}
        loss.on_step_end(step, {})
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


@pytest.mark.parametrize("rule", HOST_RULES)
def test_the_state_continues_bit_for_bit(rule: str) -> None:
    whole, resumed = moving(rule), moving(rule)
    take_steps(whole, range(11))
    resumed.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    assert resumed.current_weights() == whole.current_weights()
    assert take_steps(resumed, range(11, 16)) == take_steps(whole, range(11, 16))
    assert {(str(v.device), v.dtype) for v in resumed.state_dict().values()} == {("cpu", torch.float64)}


def test_a_constraint_pushes_towards_its_target() -> None:
    weights = take_steps(moving("constraint", targets={"main": 0.0, "other": 100.0}), range(3))
    assert all(found["main"] > 1.0 for found in weights) and weights[-1]["other"] == 0.0
    assert [found["main"] for found in weights] == sorted(found["main"] for found in weights)


def test_targets_are_checked_by_name() -> None:
    with pytest.raises(LossConfigError, match=r"'targets': no objective is named 'othr' \(did you mean 'other'"):
        build("constraint", targets={"othr": 1.0})


# Uncertainty


def test_uncertainty_learns_its_weights() -> None:
    loss = build("uncertainty", initial_weights={"main": 2.0, "other": 0.5}, loss_floor=0.01)
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
        loss = build("uncertainty", initial_weights={"main": 2.0, "other": 0.5})
        shared = data.denominators(micro_batches=len(parts))
        sum(observe(loss, data.take(part), shared) for part in parts).backward()
        gradients.append(loss.rule.log_variances.grad)
    torch.testing.assert_close(*gradients)


def test_uncertainty_follows_what_is_trained() -> None:
    loss = build("uncertainty")
    with torch.no_grad():
        loss.rule.log_variances.copy_(torch.tensor([-math.log(3.0), 0.0]))
    assert list(loss.current_weights().values()) == pytest.approx([3.0, 1.0])
    _, metrics = loss(*random_data("preference").build(loss))
    assert metrics["main_weight"].item() == pytest.approx(3.0)
    assert [name for name, _ in loss.named_parameters()] == ["rule.log_variances"]
