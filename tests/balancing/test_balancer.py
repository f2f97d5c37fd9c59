"""Gradient balancing inside a composition: its configuration, its state, what it reports, and a short training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trl_custom_losses import (
    ComposableLossFunction,
    LossConfigError,
    LossFunctionRegistry,
    ModelOutputs,
    PreferenceBatch,
    PreferenceLoss,
)
from trl_custom_losses.balancing.balancer import make_balancer
from trl_custom_losses.testing import Data, random_data

from .compositions import balanced, conflicting, step_data, take_step

pytestmark = pytest.mark.usefixtures("registered")


# Configuration


@pytest.mark.parametrize(
    ("balancing", "message"),
    [
        ("upgrd", r"no method 'upgrd' \(did you mean 'upgrad'"),
        ("", "no method ''"),
        ({"decay": 0.5}, "no method None.*known: upgrad, mgda, pcgrad, cagrad"),
        ({"type": "upgrad", "decay": 1.0}, "balancing 'upgrad': .*'decay'.* < 1, found 1.0"),
        ({"type": "upgrad", "decay": -0.1}, "balancing 'upgrad': .*'decay'.* >= 0"),
        ({"type": "upgrad", "decay": float("nan")}, "balancing 'upgrad', 'decay': expected a finite number"),
        ({"type": "upgrad", "decay": "0.9"}, "balancing 'upgrad', 'decay': expected float, found '0.9'"),
        ({"type": "upgrad", "decay": {"schedule": "constant", "value": 0.9}}, "'decay': expected float"),
        ({"type": "upgrad", "gramian": "now"}, r"'gramian': expected 'previous' \| 'current', found 'now'"),
        ({"type": "upgrad", "reg_eps": 0.0}, "balancing 'upgrad': .*'reg_eps'.* > 0"),
        ({"type": "upgrad", "c": 0.1}, r"balancing 'upgrad': .*no hyperparameter 'c'.*upgrad\(reg_eps"),
        ({"type": "mgda", "reg_eps": 0.1}, "balancing 'mgda': .*no hyperparameter 'reg_eps'"),
        ({"type": "cagrad", "c": -1}, "balancing 'cagrad': .*'c'.* >= 0"),
        ({"type": "cagrad", "c": None}, "balancing 'cagrad': .*'c'.*expected float, found None"),
        ({"type": "pcgrad", "seed": 1}, "balancing 'pcgrad': .*no hyperparameter 'seed'"),
    ],
    ids=str,
)
def test_mistakes_are_named(balancing: Any, message: str) -> None:
    config = {"type": "composed", "components": [{"type": "sigmoid"}, {"type": "sft"}], "balancing": balancing}
    with pytest.raises(LossConfigError, match=f"loss 'composed': .*{message}"):
        LossFunctionRegistry.build(config)


@pytest.mark.parametrize("balancing", [3, ["upgrad"], True])
def test_balancing_is_a_name_or_a_dict(balancing: Any) -> None:
    config = {"type": "composed", "components": [{"type": "sigmoid"}, {"type": "sft"}], "balancing": balancing}
    with pytest.raises(LossConfigError, match=r"'balancing'.*expected str \| dict"):
        LossFunctionRegistry.build(config)


def test_one_objective_cannot_be_balanced() -> None:
    with pytest.raises(LossConfigError, match="at least two components, found 1"):
        balanced("upgrad", "sigmoid")


def test_options_reach_the_method() -> None:
    balancer = make_balancer({"type": "cagrad", "c": 1, "decay": 0, "gramian": "previous"}, ["a", "b"])
    assert (balancer.aggregator.c, balancer.decay, balancer.source) == (1.0, 0.0, "previous")
    assert repr(balancer) == "GradientBalancer(CAGrad, decay=0.0, gramian='previous')"
    assert make_balancer({"type": "mgda", "gramian": "current"}, ["a", "b"]).source == "current"
    with pytest.raises(LossConfigError, match="'decay' averages over the steps before"):
        make_balancer({"type": "mgda", "gramian": "current", "decay": 0.5}, ["a", "b"])


# State


def test_the_state_continues_bit_for_bit() -> None:
    def make() -> ComposableLossFunction:
        return balanced("pcgrad", *conflicting(0))

    whole, factors, states = make(), [], []
    for step in range(6):
        states.append({name: value.clone() for name, value in whole.state_dict().items()})
        take_step(whole, step, [step_data(step).build(whole)])
        factors.append(dict(whole.factors))
    for start, state in enumerate(states):
        resumed = make()
        resumed.load_state_dict(state)
        for step in range(start, 6):
            take_step(resumed, step, [step_data(step).build(resumed)])
            assert resumed.factors == factors[step]


def test_the_state_stays_on_the_host_in_float64() -> None:
    loss = copy.deepcopy(balanced("upgrad", "sigmoid", "sft")).to("meta").half()
    assert {name: (str(v.device), v.dtype) for name, v in loss.state_dict().items()} == {
        "balancer.average": ("cpu", torch.float64),
        "balancer.steps": ("cpu", torch.int64),
    }


# Cosines


def test_cosines_are_reported_at_the_steps_end() -> None:
    loss = balanced("upgrad", "sigmoid", "sft", "constant")
    batch, outputs = random_data("preference").build(loss)
    first, second = (
        torch.autograd.grad(part, outputs.per_token_logps, retain_graph=True)[0].flatten()
        for part in list(loss.contributions(batch, outputs)[0].values())[:2]
    )
    loss.move_to_step(0)
    loss(batch, outputs)
    metrics = loss.on_step_end(0, {"gramian": loss.take_observed()["gramian"].double()})
    expected = F.cosine_similarity(first, second, dim=0).item()
    assert metrics == {"grad_cosine/sigmoid0/sft1": pytest.approx(expected)} and -1 < expected < 1
    assert all(type(value) is float for value in metrics.values())


def test_cosines_of_the_step_not_of_the_average() -> None:
    balancer = make_balancer("upgrad", ["a", "b"])
    gramians = [torch.tensor([[4.0, x], [x, 9.0]], dtype=torch.float64) for x in (6.0, -6.0, 0.0)]
    found = []
    for gramian in gramians:
        balancer.update(gramian)
        found.append(balancer.cosines(gramian)["grad_cosine/a/b"])
    assert found == pytest.approx([1.0, -1.0, 0.0])


# Training


def _train(balancing: Any, data: Data, losses: Callable[[Any], ComposableLossFunction]) -> list[list[float]]:
    """The objectives before and after a short training of log-probabilities, by hand as a trainer does it."""
    loss = losses(balancing)
    logits = data.rows["logps"].detach().neg().expm1().log().neg().requires_grad_()  # logps = logsigmoid(logits)
    optimizer = torch.optim.SGD([logits], lr=0.05)
    found = []
    for step in range(31):
        loss.move_to_step(step)
        batch, outputs = data.with_rows(logps=F.logsigmoid(logits)).build(loss)
        total, metrics = loss(batch, outputs)
        found.append([metrics[f"{name}_loss"].item() for name in loss.names])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        loss.on_step_end(step, loss.take_observed())
    return [found[0], found[-1]]


@pytest.mark.parametrize("method", ["upgrad", "pcgrad", "mgda"])
def test_balancing_improves_both_of_two_objectives_in_conflict(method: str) -> None:
    """DPO against the likelihood of the rejected responses: their sum gives DPO up."""

    @LossFunctionRegistry.register("likelihood")
    class Likelihood(PreferenceLoss):
        def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
            return -2 * model_outputs.logps.chunk(2)[1], {}

    def losses(balancing: Any) -> ComposableLossFunction:
        components = [{"type": "sigmoid", "beta": 1.0}, {"type": "likelihood"}]
        return LossFunctionRegistry.build({"type": "composed", "components": components, "balancing": balancing})

    data = random_data("preference", size=4, length=4, seed=3)
    data = replace(data, rows=data.rows | {"ref": data.rows["logps"].detach()})
    (dpo, likelihood), (plain_dpo, plain_likelihood) = _train(None, data, losses)
    assert dpo == pytest.approx(math.log(2))
    assert plain_likelihood < likelihood and plain_dpo > 1.05 * dpo
    _, (balanced_dpo, balanced_likelihood) = _train(method, data, losses)
    assert balanced_dpo < 0.85 * dpo and balanced_likelihood < 0.96 * likelihood
