"""Registering losses, looking them up, and handing over objects."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trl_custom_losses import (
    LossConfigError,
    LossFunctionRegistry,
    PolicyLoss,
    PreferenceLoss,
    UnknownLossError,
)
from trl_custom_losses.losses.preference import SigmoidLoss
from trl_custom_losses.testing import random_data

from .example_losses import Mine, Protocol, annotated, plain, restored_registry

build = LossFunctionRegistry.build
register = LossFunctionRegistry.register


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    with restored_registry():
        yield


def needs_a_positional_argument(batch, outputs, beta):
    """A function that nothing could call with its third argument."""


# Registering


def test_a_class() -> None:
    assert register("mine")(Mine) is Mine
    assert LossFunctionRegistry.get("mine") is Mine
    loss = build({"type": "mine", "strength": 2.0})
    assert isinstance(loss, Mine) and loss.name == "mine" and loss.strength == 2.0
    assert "mine" in LossFunctionRegistry.names("preference")
    assert "mine" not in LossFunctionRegistry.names("policy")


def test_a_function_with_an_annotated_batch() -> None:
    assert register("annotated")(annotated) is annotated
    loss = build({"type": "annotated", "beta": 0.5})
    assert loss.family == "preference" and isinstance(loss, PreferenceLoss)
    data = random_data("preference")
    batch, outputs = data.build(loss)
    raw, metrics = loss(batch, outputs)
    assert torch.equal(raw, -0.5 * outputs.logps.chunk(2)[0]) and metrics["beta"] == 0.5
    loss.beta = 0.25  # read at call time
    assert torch.equal(loss(batch, outputs)[0], raw / 2)
    assert torch.equal(copy.deepcopy(loss)(batch, outputs)[0], raw / 2)


def test_a_function_with_facts() -> None:
    facts = {"family": "policy", "requires": {"entropies"}, "columns": ("x",), "reduction": "sequence_sum"}
    register("plain", **facts, surrogate=False)(plain)
    loss = build("plain")
    assert {name: getattr(loss, name) for name in facts} == facts
    assert not loss.surrogate and isinstance(loss, PolicyLoss)


def test_a_second_name_has_its_own_facts() -> None:
    register("first", family="policy")(plain)
    register("second", family="policy", reduction="sequence_sum")(plain)
    assert build("first").reduction == "token_mean"
    assert build("second").reduction == "sequence_sum"


def test_an_object_of_any_class() -> None:
    register("protocol")(Protocol)
    loss = build({"type": "protocol", "weight": 3.0})
    assert (loss.family, loss.requires, loss.reduction) == ("policy", {"entropies"}, "sequence_sum")
    data = random_data("policy")
    batch, outputs = data.build(loss)
    assert torch.equal(loss(batch, outputs)[0], 3.0 * outputs.per_token_logps)
    assert loss.surrogate and not loss.prepares


def test_an_objects_prepare_is_used() -> None:
    class Preparing(Protocol):
        def prepare(self, rollout: Any) -> dict:
            return {"x": self.weight}

    register("preparing")(Preparing)
    assert build("preparing").prepares and build("preparing").prepare(None) == {"x": 2.0}
    assert build(Preparing(weight=5.0)).prepare(None) == {"x": 5.0}


@pytest.mark.parametrize("name", ["", "1st", "has space", "a:b", "a.b", None, 3])
def test_malformed_names(name: Any) -> None:
    with pytest.raises(LossConfigError, match="such as 'my_loss'"):
        register(name)(Mine)


def test_duplicates_are_refused_with_both_places() -> None:
    register("mine")(Mine)
    with pytest.raises(LossConfigError, match=r"'mine' is already registered \(tests\.example_losses\.Mine\)"):
        register("mine")(annotated)
    with pytest.raises(LossConfigError, match=r"already registered .*losses\.preference\.sigmoid\.SigmoidLoss"):
        register("sigmoid")(Mine)
    assert LossFunctionRegistry.get("sigmoid") is SigmoidLoss


@pytest.mark.parametrize(
    ("loss", "facts", "message"),
    [
        (plain, {}, "say which family"),
        (plain, {"family": "policy", "reductoin": "x"}, "unknown facts"),
        (Mine, {"reduction": "sequence_sum"}, "as class attributes of Mine"),
        (needs_a_positional_argument, {"family": "policy"}, "beta"),
        (3, {}, "must be a class or a function"),
        (int, {}, "must be a class or a function"),
        (None, {}, "must be a class or a function"),
    ],
)
def test_what_is_no_loss_is_refused(loss: Any, facts: dict, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        register("refused", **facts)(loss)
    assert "refused" not in LossFunctionRegistry.names()


# Names


def test_names_of_a_family() -> None:
    preference, policy = LossFunctionRegistry.names("preference"), LossFunctionRegistry.names("policy")
    assert preference == sorted(preference) and {"sigmoid", "sft"} <= set(preference)
    assert "grpo" in policy and {"composed", "dynamic_multi_objective"} <= set(preference) & set(policy)
    assert set(LossFunctionRegistry.names()) == set(preference) | set(policy)
    with pytest.raises(LossConfigError, match="'preference' or 'policy'"):
        LossFunctionRegistry.names("rewards")


def test_an_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(UnknownLossError) as caught:
        build("sigmiod", family="preference")
    message = str(caught.value)
    assert "there is no loss named 'sigmiod' (did you mean 'sigmoid'" in message
    assert "apo_zero" in message and "dapo" not in message.split("Registered:")[1]
    assert isinstance(caught.value, KeyError) and isinstance(caught.value, ValueError)
    with pytest.raises(KeyError):
        LossFunctionRegistry.get("nothing like it")


def test_a_loss_of_the_other_family_is_refused() -> None:
    with pytest.raises(LossConfigError, match="'sigmoid' is a preference loss and cannot run in a GRPO trainer"):
        build("sigmoid", family="policy")
    with pytest.raises(LossConfigError, match="'grpo' is a policy loss and cannot run in a DPO trainer"):
        build({"type": "grpo"}, family="preference")
    with pytest.raises(LossConfigError, match="policy loss"):
        build(Protocol(), family="preference")


# Objects in place of configurations


def test_a_loss_object_is_taken_as_it_is() -> None:
    loss = SigmoidLoss(beta=0.7)
    assert build(loss, family="preference", defaults={"beta": 0.1}) is loss and loss.beta == 0.7
    assert loss.name == "SigmoidLoss"


def test_a_function_takes_the_trainers_family_and_values() -> None:
    loss = build(plain, family="policy", defaults={"scale": 4.0})
    assert (loss.family, loss.name, loss.scale) == ("policy", "plain", 4.0)
    with pytest.raises(LossConfigError, match="say which family"):
        build(plain)


def test_a_registered_function_keeps_its_facts() -> None:
    register("plain", family="policy", reduction="sequence_sum")(plain)
    assert build(plain, family="policy").reduction == "sequence_sum"


def test_an_object_with_call() -> None:
    held = Protocol(weight=5.0)
    loss = build(held, family="policy")
    assert loss.name == "Protocol" and loss.object is held and loss.reduction == "sequence_sum"


def test_an_objects_parameters_and_state_are_found() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, batch: Any, outputs: Any) -> tuple[Tensor, dict]:
            return self.scale * outputs.logps, {}

    loss = build(Module(), family="policy")
    assert list(loss.state_dict()) == ["object.scale"] and len(list(loss.parameters())) == 1


@pytest.mark.parametrize("config", [None, 3, 1.5, ["sigmoid"], SigmoidLoss, Protocol])
def test_other_things_are_refused(config: Any) -> None:
    with pytest.raises(LossConfigError):
        build(config, family="preference")
