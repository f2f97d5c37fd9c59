"""From a configuration to a loss object: values, facts, import paths, plugins, and nothing but clear errors."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_custom_losses import Loss, LossConfigError, LossFunctionRegistry, PolicyLoss, PreferenceLoss
from trl_custom_losses.registry import ENTRY_POINT_GROUP, BuildContext

from .example_losses import Mine, plain, restored_registry

build = LossFunctionRegistry.build
register = LossFunctionRegistry.register


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    with restored_registry():
        register("mine")(Mine)
        yield


# Hyperparameters


def test_given_before_the_trainers_before_the_losss_own() -> None:
    context = BuildContext(family="preference", defaults={"beta": 0.7, "kind": None}, defaults_from="CustomDPOConfig")
    loss = build({"type": "mine", "strength": 2}, context=context)
    assert loss.hyperparameters() == {"strength": 2.0, "beta": 0.7, "kind": "a"}
    assert loss.origins == {"strength": "loss_function", "beta": "CustomDPOConfig", "kind": "default"}
    assert repr(loss) == "Mine(strength=2.0, beta=0.7, kind='a')"
    assert build({"type": "mine", "strength": 2.0, "beta": 0.4}, context=context).beta == 0.4
    assert build({"type": "mine", "strength": 2.0}).beta == 0.3


def test_a_trainers_field_counts_within_its_family_only() -> None:
    register("other", family="policy")(plain)
    assert build({"type": "other"}, family="policy", defaults={"scale": 5.0}).scale == 5.0
    assert build({"type": "other"}, defaults={"scale": 5.0}).scale == 1.0


def test_a_needed_value_may_come_from_the_trainer() -> None:
    assert build("mine", family="preference", defaults={"strength": 3}).strength == 3.0
    with pytest.raises(
        LossConfigError, match=r"'mine' needs the hyperparameter 'strength'.*mine\(strength: float, beta"
    ):
        build("mine", family="preference", defaults={"strength": None})


def test_the_config_is_not_changed() -> None:
    config = {"type": "composed", "components": [{"type": "sft", "name": "a", "weight": 2.0}]}
    build(config)
    assert config == {"type": "composed", "components": [{"type": "sft", "name": "a", "weight": 2.0}]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "needs a 'type'"),
        ({"beta": 0.1}, "needs a 'type', found only .'beta'"),
        ({"type": None}, "`loss_function.type` is a name, found None"),
        ({"type": ["sigmoid"]}, "is a name"),
        ({"type": "sigmoid", 1: 2}, "hyperparameter names are text"),
        ({"type": "sigmoid", "bta": 0.1}, r"no hyperparameter 'bta' \(did you mean 'beta'\?\). It takes: sigmoid\("),
        ({"type": "sigmoid", "weight": 0.1}, "A weight belongs to a component"),
        ({"type": "grpo", "beta": 0.1}, "set `beta` in the trainer's config"),
        ({"type": "sigmoid", "beta": 0.0}, "loss 'sigmoid': hyperparameter 'beta': expected a value > 0, found 0.0"),
        ({"type": "sigmoid", "beta": "0.1"}, r"hyperparameter 'beta' \(loss_function\): expected float"),
        ({"type": "sigmoid", "beta": None}, "expected float, found None"),
        ({"type": "sigmoid", "beta": 10**400}, "'beta'"),
        ({"type": "composed", "components": [{"type": "sft", "weight": 10**400}]}, "'weight'"),
        ({"type": "composed", "components": []}, "at least one loss"),
        ({"type": "composed", "components": {"type": "sft"}}, "expected list"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_named(config: Any, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        build(config)


def test_a_constructor_that_refuses_its_values_is_quoted() -> None:
    class Picky(PreferenceLoss):
        def __init__(self, *, beta: float = 0.1) -> None:
            raise ValueError("not today")

    register("picky")(Picky)
    with pytest.raises(LossConfigError, match=r"loss 'picky' rejected its hyperparameters .*not today"):
        build("picky")


# Facts


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"requires": {"hidden"}}, "requires 'hidden', which a policy trainer cannot compute"),
        ({"requires": {"ref_per_token_logp"}}, r"did you mean 'ref_per_token_logps'"),
        ({"requires": {"ref_logps"}}, "requires 'ref_logps'"),  # of the other family
        ({"requires": "logits"}, "`requires` .*found 'logits'"),
        ({"columns": "weight"}, "`columns` .*found 'weight'"),
        ({"requires": None}, "`requires`"),
        ({"columns": ("a", 1)}, "`columns`"),
        ({"reduction": "token_means"}, r"unknown reduction 'token_means' \(did you mean 'token_mean'"),
        ({"reduction": None}, "reduction"),
        ({"family": "reward"}, "`family` must be 'preference' or 'policy', found 'reward'"),
    ],
    ids=str,
)
def test_unknown_facts_are_refused(facts: dict[str, Any], message: str) -> None:
    register("odd")(type("Odd", (PolicyLoss,), facts))
    with pytest.raises(LossConfigError, match=message):
        build("odd")


# Import paths


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Writes a module that can be imported; returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


_USER_MODULE = """
from trl_custom_losses import LossFunctionRegistry, PreferenceLoss

class Outer:
    class Inner(PreferenceLoss):
        def __init__(self, *, strength: float = 1.0):
            super().__init__()
            self.strength = strength

def function(batch, outputs, *, strength=1.0):
    return outputs.logps, {}

@LossFunctionRegistry.register("by_path", family="policy", reduction="sequence_sum")
def registered(batch, outputs):
    return outputs.logps, {}

number = 3
"""


def test_import_paths(module: Callable[[str, str], str]) -> None:
    name = module("user_losses", _USER_MODULE)
    loss = build({"type": f"{name}:Outer.Inner", "strength": 2.0})
    assert loss.strength == 2.0 and loss.name == "user_losses:Outer.Inner"
    assert build(f"{name}:function", family="policy").family == "policy"
    assert build(f"{name}:registered", family="policy").reduction == "sequence_sum"
    assert build("by_path").reduction == "sequence_sum"
    with pytest.raises(LossConfigError, match="say which family"):
        build(f"{name}:function")
    with pytest.raises(LossConfigError, match=r"no 'functoin' \(did you mean 'function'"):
        build(f"{name}:functoin")
    with pytest.raises(LossConfigError, match="must be a class or a function"):
        build(f"{name}:number")


@pytest.mark.parametrize("path", [":", "a:", ":b", "a b:c", "a:b:c", "1:2", "a:b-c"])
def test_malformed_import_paths(path: str) -> None:
    with pytest.raises(LossConfigError, match=r"looks like 'package.module:Loss'"):
        build(path)


def test_modules_that_cannot_be_imported(module: Callable[[str, str], str]) -> None:
    with pytest.raises(LossConfigError, match=r"could not import 'no_such_module'.*ModuleNotFoundError"):
        build("no_such_module:Loss")
    with pytest.raises(LossConfigError, match="ZeroDivisionError"):
        build(f"{module('breaks', '1 / 0')}:Loss")


@pytest.mark.parametrize("path", ["builtins:max", "trl_custom_losses.base:FunctionLoss"])
def test_things_that_are_no_losses(path: str) -> None:
    with pytest.raises(LossConfigError):
        build(path, family="policy")


# Plugins


def _announce(monkeypatch: pytest.MonkeyPatch, **plugins: Callable[[], Any]) -> None:
    points = [SimpleNamespace(name=name, value=f"plugin:{name}", load=load) for name, load in plugins.items()]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda *, group: points if group == ENTRY_POINT_GROUP else []
    )
    LossFunctionRegistry._loaded = False


class Plugged(PreferenceLoss):
    """A loss of another package."""


def _fail() -> None:
    raise ImportError("its own dependency is missing")


def test_plugins_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def registers_itself() -> type:
        return register("second")(Plugged)

    _announce(monkeypatch, first=lambda: Plugged, second=registers_itself)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {"first", "second"} <= set(LossFunctionRegistry.names("preference"))
    assert LossFunctionRegistry.get("first") is LossFunctionRegistry.get("second") is Plugged


@pytest.mark.parametrize("load", [_fail, lambda: 3, lambda: plain], ids=["import", "no loss", "no family"])
def test_a_broken_plugin_only_warns(monkeypatch: pytest.MonkeyPatch, load: Callable[[], Any]) -> None:
    _announce(monkeypatch, broken=load, first=lambda: Plugged)
    with pytest.warns(UserWarning, match=r"the loss 'broken' \(plugin:broken\) could not be loaded"):
        assert build("first", family="preference").name == "first"
    assert "broken" not in LossFunctionRegistry.names()


def test_a_plugin_does_not_take_a_name_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    _announce(monkeypatch, sigmoid=lambda: Plugged)
    with pytest.warns(UserWarning, match="'sigmoid'"):
        assert LossFunctionRegistry.get("mine") is Mine
        LossFunctionRegistry.names()


# Anything else

_NAMES = ["sigmoid", "sft", "exo_pair", "grpo", "dr_grpo", "composed", "mine", "Sigmoid", "", ":", "json:dumps", "os:x"]
_KEYS = ["type", "name", "weight", "components", "beta", "label_smoothing", "epsilon", "delta", "f_divergence_type"]
_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(_NAMES)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=4),
    max_leaves=6,
)
_components = st.fixed_dictionaries({"type": st.sampled_from(_NAMES)}, optional=dict.fromkeys(_KEYS[1:], _values))
_configs = st.fixed_dictionaries(
    {"type": st.sampled_from(_NAMES)},
    optional=dict.fromkeys(_KEYS[1:], _values) | {"components": st.lists(_components | _values, max_size=3)},
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(config=_configs | _values, family=st.sampled_from([None, "preference", "policy"]))
def test_malformed_configs_raise_config_errors_only(config: Any, family: Any) -> None:
    try:
        loss = build(config, family=family)
    except LossConfigError as error:
        assert str(error)
    else:
        assert isinstance(loss, Loss) and family in (None, loss.family)
