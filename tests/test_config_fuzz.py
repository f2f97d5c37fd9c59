"""Thousands of malformed `loss_function` blocks: each is refused with `LossConfigError`, which names the field.

`FUZZ_EXAMPLES=20000 pytest tests/test_config_fuzz.py` tries more of them.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.broken_compositions import broken_compositions
from tests.broken_configs import Broken, at, broken_losses, losses_in, nested, self_containing
from tests.losses.configs import configs
from trl_custom_losses import (
    CustomDPOConfig,
    CustomDPOTrainer,
    CustomGRPOConfig,
    CustomGRPOTrainer,
    Loss,
    LossConfigError,
    LossFunctionRegistry,
)
from trl_custom_losses.adapters import check_readable
from trl_custom_losses.trainers.config import parse_loss_function

_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "1000"))
_CONFIGS = {"preference": CustomDPOConfig, "policy": CustomGRPOConfig}
_TRAINERS = {"preference": CustomDPOTrainer, "policy": CustomGRPOTrainer}
_FAMILIES = pytest.mark.parametrize("family", sorted(_CONFIGS))


def examples(number: int) -> settings:
    """Settings of a test that tries so many examples, the same ones each time."""
    return settings(
        max_examples=number, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


def from_registry(config: Any, family: str) -> Any:
    return LossFunctionRegistry.build(config, family=family)


def from_trainer_config(config: Any, family: str) -> Any:
    return _CONFIGS[family](
        output_dir="unused", use_cpu=True, bf16=False, report_to="none", loss_function=config
    ).loss_function


def from_trainer(config: Any, family: str) -> Any:
    policy = {"reward_funcs": tiny.count_reward} if family == "policy" else {}
    return _TRAINERS[family](
        model="a-model-that-does-not-exist",
        args=_CONFIGS[family](output_dir="unused", use_cpu=True, bf16=False, report_to="none"),
        train_dataset=tiny.preference_data(2) if family == "preference" else tiny.prompt_data(2),
        loss_function=config,
        **policy,
    )


def as_json(config: Any) -> str | None:
    """The configuration as on a command line, if it can be written there."""
    try:
        text = json.dumps(config)
    except (TypeError, ValueError, RecursionError):
        return None
    return text if isinstance(config, dict) and repr(json.loads(text)) == repr(config) else None


def names_the_field(message: str, broken: Broken) -> bool:
    """Whether an error of a broken configuration says what is broken."""
    return any(text in message for text in broken.fields)


def assert_refused(build: Callable[[Any, str], Any], broken: Broken, family: str) -> None:
    with pytest.raises(LossConfigError) as caught:
        build(broken.config, family)
    message = str(caught.value)
    assert names_the_field(message, broken), (broken.how, broken.fields, message)
    assert "rejected its hyperparameters" not in message, "a loss of this package raised something else"


@_FAMILIES
def test_what_is_broken_was_valid(family: str) -> None:
    for name, config in configs(family).items():
        before = copy.deepcopy(config)
        assert isinstance(from_registry(config, family), Loss), name
        assert from_trainer_config(config, family) == from_trainer_config(json.dumps(config), family) == before
        assert config == before, "a configuration is not changed by building it"


@_FAMILIES
@examples(_EXAMPLES)
@given(data=st.data())
def test_a_broken_loss_is_refused(family: str, data: st.DataObject) -> None:
    assert_refused(from_registry, data.draw(broken_losses(family)), family)


@_FAMILIES
@examples(_EXAMPLES)
@given(data=st.data())
def test_a_broken_composition_is_refused(family: str, data: st.DataObject) -> None:
    assert_refused(from_registry, data.draw(broken_compositions(family)), family)


@_FAMILIES
@examples(_EXAMPLES // 3)
@given(data=st.data())
def test_trainer_configs_refuse_the_same_also_as_text(family: str, data: st.DataObject) -> None:
    broken = data.draw(broken_losses(family) | broken_compositions(family))
    assert_refused(from_trainer_config, broken, family)
    text = as_json(broken.config)
    if text is not None:
        assert_refused(from_trainer_config, Broken(text, broken.how, broken.fields), family)


@_FAMILIES
@examples(_EXAMPLES // 4)
@given(data=st.data())
def test_a_message_that_names_nothing_would_not_do(family: str, data: st.DataObject) -> None:
    """What is asked of messages above is not met by chance, such as by the name of the loss."""
    broken = data.draw(broken_losses(family) | broken_compositions(family))
    for path in [(), *losses_in(broken.config)]:
        name = at(broken.config, path).get("type")
        name = name if isinstance(name, str) else "?"
        message = f"loss {name!r}: a hyperparameter of another type was expected, found something else"
        assert not names_the_field(message, broken), (broken.how, broken.fields, message)


@_FAMILIES
@examples(60)
@given(data=st.data())
def test_trainers_refuse_it_before_they_look_for_a_model(family: str, data: st.DataObject) -> None:
    """There is no such model, and another error would say so."""
    broken = data.draw(broken_losses(family) | broken_compositions(family))
    assert_refused(from_trainer, broken, family)


@pytest.mark.parametrize("family, loss", [("preference", "sigmoid"), ("policy", "grpo")])
def test_what_is_not_broken_gets_as_far_as_the_model(family: str, loss: str) -> None:
    with pytest.raises(OSError, match="cached files"):
        from_trainer(loss, family)


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=3)
_KEYS = st.sampled_from(["type", "name", "weight", "schedule", "value", "start", "end", "beta"]) | st.text(max_size=4)
_GARBAGE = st.recursive(
    _LEAVES | st.sampled_from(["sigmoid", "grpo", "composed", "linear", "upgrad", 10**400, 0.5]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(_KEYS | st.integers(), inner, max_size=4) | st.tuples(inner)
    ),
    max_leaves=12,
)


@st.composite
def garbage_for_known_names(draw: Callable, family: str) -> dict[str, Any]:
    """A loss that exists, with anything for some of its hyperparameters."""
    name = draw(st.sampled_from(LossFunctionRegistry.names(family)))
    known = [*LossFunctionRegistry.get(name).declared_hyperparameters(), "name", "weight"]
    return {"type": name, **draw(st.dictionaries(st.sampled_from(known), _GARBAGE, max_size=3))}


@_FAMILIES
@examples(_EXAMPLES // 2)
@given(data=st.data())
def test_anything_is_refused_or_makes_a_loss(family: str, data: st.DataObject) -> None:
    config = data.draw(_GARBAGE | garbage_for_known_names(family))
    try:
        assert isinstance(from_registry(config, family), Loss)
    except LossConfigError as error:
        assert "rejected its hyperparameters" not in str(error)


@pytest.mark.parametrize("broken", [{"type": "nothing"}, {"type": "sft", "x": 1}, {"type": "ipo", "beta": -1.0}])
@pytest.mark.parametrize(
    "around, where",
    [
        (lambda broken: {"type": "composed", "components": [{"type": "hinge"}, broken]}, "component 2: "),
        (lambda broken: {"type": "clipped_loss", "base_loss": broken}, "'base_loss': "),
        (lambda broken: {"type": "dynamic_multi_objective", "objectives": {"a": broken}}, "objective 'a': "),
        (
            lambda broken: {"type": "multi_objective_dpo", "auxiliary_losses": {"a": broken}},
            "'auxiliary_losses', 'a': ",
        ),
        (lambda broken: {"type": "multi_objective_dpo", "auxiliary_losses": [], "base": broken}, "'base': "),
        (lambda broken: {"type": "composed_dpo_grpo", "dpo": broken}, "'dpo': "),
        (lambda broken: {"type": "composed_dpo_grpo", "grpo": broken}, "'grpo': "),
        (lambda broken: {"type": "multi_objective_grpo", "base": broken}, "'base': "),
        (lambda broken: {"type": "rollout_pairs", "base": broken}, "'base', a preference loss: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_within_says_where(around: Callable, where: str, broken: dict[str, Any]) -> None:
    config = around(broken)
    family = LossFunctionRegistry.get(config["type"]).family or "preference"
    with pytest.raises(LossConfigError, match=f"^loss '{config['type']}': .*{where}"):
        from_registry(config, family)


@pytest.mark.parametrize("base", ["nothing", "sft", {"type": "ipo", "x": 1}, {"type": "ipo", "beta": 1.0}])
def test_a_mistake_in_a_wrapped_loss_says_where(base: Any) -> None:
    assert_refused(
        from_registry,
        Broken({"type": "adaptive_dpo", "base": base}, "base", ("adaptive_dpo': 'base': ",)),
        "preference",
    )


# Shapes that take a program down


@pytest.mark.parametrize("build", [from_registry, from_trainer_config])
@pytest.mark.parametrize("broken", self_containing(), ids=lambda broken: broken.how)
def test_what_contains_itself_is_refused(build: Callable, broken: Broken) -> None:
    assert_refused(build, broken, "preference")


@pytest.mark.parametrize("build", [from_registry, from_trainer_config])
@pytest.mark.parametrize("kind, field", [("clipped", "base_loss"), ("composed", "components")])
def test_depth_is_bounded(build: Callable, kind: str, field: str) -> None:
    assert from_registry(nested(15, kind), "preference").leaves()[0].name == "sigmoid"
    for depth in (100, 5000):
        assert_refused(build, Broken(nested(depth, kind), "deep", (field,)), "preference")


def test_size_is_bounded() -> None:
    """A few lines of YAML whose anchors stand for two to the power of forty values."""
    value: Any = [0.1]
    for _ in range(40):
        value = [value, value]
    assert_refused(from_registry, Broken({"type": "sigmoid", "beta": value}, "wide", ("'beta'",)), "preference")
    flat = {"type": "composed", "components": [{"type": "sigmoid"}] * 20_000}
    assert_refused(from_registry, Broken(flat, "long", ("components[",)), "preference")


def test_a_list_may_have_a_value_for_every_entry_of_a_vocabulary() -> None:
    check_readable({"type": "mine:Loss", "prices": [0.1] * 256_000})
    with pytest.raises(LossConfigError, match=r"'prices' \(`loss_function.prices`\): .* at most 1000000 values"):
        check_readable({"type": "mine:Loss", "prices": [0.1] * 1_000_000})


def test_a_text_of_many_keys_is_read_at_once() -> None:
    text = json.dumps({"type": "sigmoid", **{f"key {number}": 1 for number in range(60_000)}})
    start = time.perf_counter()
    assert len(parse_loss_function(text)) == 60_001
    assert time.perf_counter() - start < 10, "comparing each with each takes a minute"


# Text


def test_every_beginning_of_a_text_is_refused() -> None:
    text = json.dumps(configs("preference")["composed"])
    assert from_trainer_config(text, "preference")["type"] == "composed"
    for end in range(1, len(text)):
        assert_refused(from_trainer_config, Broken(text[:end], "cut", ("loss_function",)), "preference")


@pytest.mark.parametrize(
    "text, field",
    [
        ('{"type": "sigmoid", "beta": 1, "beta": 2}', "'beta'"),
        ('{"type": "sigmoid", "type": "sft"}', "'type'"),
        ('{"type": "composed", "components": [{"type": "sft", "weight": 1, "weight": 2}]}', "'weight'"),
        ('{"type": "sigmoid", "beta": NaN}', "'beta'"),
        ('{"type": "sigmoid", "beta": -Infinity}', "'beta'"),
        ('{"type": "sigmoid", "beta": 1e999}', "'beta'"),
        ('{"type": "sigmoid", "beta": ' + "9" * 30 + "}", "'beta'"),
        ('{"type": "sigmoid", "beta": ' + "9" * 5000 + "}", "loss_function"),
        ('{"type": "sigmoid", "beta": ' + "[" * 50_000 + "}", "loss_function"),
        ('{"type": "sigmoid", "beta": ' + "[" * 500 + "]" * 500 + "}", "'beta'"),
        ("{'type': 'sigmoid'}", "loss_function"),
        ("{}", "'type'"),
        ("[]", "'[]'"),
        ("", "''"),
        ("null", "'null'"),
        (' {"type": "sigmoid"} x', "loss_function"),
    ],
    ids=lambda text: text[:40],
)
def test_malformed_texts_are_refused(text: str, field: str) -> None:
    assert_refused(from_trainer_config, Broken(text, "text", (field,)), "preference")


@pytest.mark.parametrize("thing", [3, 0.5, True, [], (), b"sigmoid", object(), Path("sigmoid"), dict, Loss])
def test_things_that_describe_no_loss_are_refused(thing: Any) -> None:
    with pytest.raises(LossConfigError):
        from_registry(thing, "preference")


@pytest.mark.parametrize("name", ["base:Loss", "base:LossFunction", "base:PreferenceLoss", "base:PolicyLoss"])
def test_base_classes_are_no_losses(name: str) -> None:
    broken = Broken(f"trl_custom_losses.{name}", "base class", ("is a base class, not a loss",))
    assert_refused(from_registry, broken, "policy" if "Policy" in name else "preference")
