"""Signals that rules follow in place of the losses: measured, and metrics of the objectives."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trl_custom_losses.losses.composite import DynamicMultiObjectiveLoss
from trl_custom_losses.testing import Data, random_data

from .dynamic import build, end_step, observe

pytestmark = pytest.mark.usefixtures("reporting")


def _signal(loss: DynamicMultiObjectiveLoss, data: Data, name: str = "main") -> float:
    """What the rule is fed with for an objective."""
    seen: list[list[float]] = []
    loss.rule.update = lambda signals, step: seen.append(list(signals))
    observe(loss, data)
    end_step(loss, 0)
    return seen[0][loss.names.index(name)]


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
        loss = build(family=family, objectives=objectives, signal=given)
        own = frozenset().union(*(part.requires for part in loss.leaves()))
        assert loss.requires == own | ({requires} if requires else set())
        assert _signal(loss, data) == pytest.approx(_expected(signal, data).item(), rel=1e-5)
    # The other objective follows its loss.
    assert _signal(loss, data, "other") == pytest.approx(data.loss(loss.losses[1]).item())


@pytest.mark.parametrize("signal", ["kl", "length", "margin", "per_pair", "per_token", "one"])
def test_a_signal_is_the_mean_over_a_step_that_is_split(signal: str) -> None:
    data = random_data("preference", size=5)
    objectives = {"main": "reporting", "other": "sft"}
    whole = _signal(build(objectives=objectives, signal={"main": signal}), data)
    loss = build(objectives=objectives, signal={"main": signal})
    seen: list[list[float]] = []
    loss.rule.update = lambda signals, step: seen.append(list(signals))
    parts = [[0], [1, 2, 3, 4]]
    for part in parts:
        observe(loss, data.take(part), data.denominators(micro_batches=2))
    end_step(loss, 0)
    if signal == "one":  # a scalar is one value a micro-batch
        whole = sum(_signal(build(objectives=objectives, signal="one"), data.take(part)) for part in parts) / 2
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
    loss = build(objectives={"main": "reporting", "other": "sft"}, signal=signal)
    assert _signal(loss, data) == pytest.approx(float(expected), rel=1e-6)
    # An objective that does not report it follows the other's.
    assert _signal(loss, data, "other") == pytest.approx(float(expected), rel=1e-6)


def test_an_objectives_own_metric_comes_first() -> None:
    objectives = {"main": "reporting", "other": "renaming"}
    data = random_data("preference")
    loss = build(objectives=objectives, signal={"main": "per_row", "other": "per_row"})
    assert _signal(loss, data, "other") == pytest.approx(10 * _signal(loss, data), rel=1e-6)
    loss = build(objectives=objectives, signal={"main": "only_here"})
    assert math.isfinite(_signal(loss, data))


@pytest.mark.parametrize(
    ("signal", "message"),
    [
        ("smallest", "the signal 'smallest' is a min and has no mean"),
        ("perplexity", "the signal 'perplexity' is a exp"),
        ("KL", r"the signal 'KL' is neither measured nor a reported metric.*'kl', 'length'.*'per_row'"),
    ],
)
def test_signals_that_are_none_are_named_at_the_first_step(signal: str, message: str) -> None:
    loss = build(objectives={"main": "reporting", "other": "sft"}, signal=signal)
    with pytest.raises(ValueError, match=message):
        loss(*random_data("preference").build(loss))


@pytest.mark.parametrize("signal", ["length", "margin", "per_row", "per_pair", "column", "kl"])
def test_rows_without_a_pair_do_not_count(signal: str) -> None:
    """As among pairs of a rollout."""
    objectives = {"main": "reporting", "other": "sigmoid"}
    data = random_data("preference", lengths=[1, 4, 2, 5, 3, 1, 4, 2])
    full = _signal(build(objectives=objectives, signal=signal), data.take([0, 2]))
    hole = data.with_rows(mask=data.rows["mask"] * torch.tensor([1, 0, 1, 0] * 2).unsqueeze(1))
    loss = build(objectives=objectives, signal=signal)
    seen: list[list[float]] = []
    loss.rule.update = lambda signals, step: seen.append(list(signals))
    batch, outputs = hole.build(loss)
    batch.pair_mask = torch.tensor([1, 0, 1, 0])
    loss(batch, outputs)
    end_step(loss, 0)
    assert seen[0][0] == pytest.approx(full, rel=1e-6)


def test_a_signal_of_nothing_leaves_the_weights() -> None:
    objectives = {"main": "grpo", "other": "dapo"}
    settings = {"targets": {"main": 0.0, "other": 0.0}, "signal": {"main": "reward"}}
    loss = build("constraint", family="policy", objectives=objectives, **settings)
    data = random_data("policy")
    observe(loss, replace(data, items=data.items | {"rewards": torch.full((4, 2), math.nan)}))
    end_step(loss, 0)
    weights = loss.current_weights()
    assert weights["main"] == 1.0 and weights["other"] != 1.0


def test_a_constraint_on_the_kl_follows_the_kl() -> None:
    settings = {"targets": {"other": 0.01}, "signal": {"other": "kl"}, "eta": 0.5, "k_p": 0.0}
    loss = build("constraint", **settings)
    data = random_data("preference")
    observe(loss, data)
    end_step(loss, 0)
    kl = _k3(data).item()
    assert kl > 0.01
    assert loss.current_weights() == {"main": 1.0, "other": pytest.approx(1 + 0.5 * (kl - 0.01), rel=1e-5)}
