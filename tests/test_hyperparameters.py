"""Reading hyperparameters off a loss, and checking values for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Optional, Union

import pytest

from trl_custom_losses import LossConfigError, PreferenceLoss
from trl_custom_losses.hyperparameters import (
    Hyperparameter,
    check_range,
    hyperparameters_of,
    resolve,
    suggestion,
)
from trl_custom_losses.losses.preference import RobustLoss, SFTLoss


class Base(PreferenceLoss):
    def __init__(self, *, beta: float = 0.1, kind: Literal["a", "b"] = "a") -> None:
        super().__init__()


class Child(Base):
    def __init__(self, *, gamma: float, beta: float = 0.5, **options: Any) -> None:
        super().__init__(beta=beta, **options)


class Closed(Base):
    def __init__(self, *, gamma: float = 1.0) -> None:
        super().__init__()


class Inheriting(Child):
    """Has no constructor of its own."""


# Reading


def test_options_lead_to_the_base_class() -> None:
    found = hyperparameters_of(Child)
    assert list(found) == ["gamma", "beta", "kind"]
    assert found["gamma"].required and not found["beta"].required
    assert found["beta"].default == 0.5  # the subclass's own
    assert list(hyperparameters_of(Inheriting)) == ["gamma", "beta", "kind"]
    assert list(hyperparameters_of(Closed)) == ["gamma"]


def test_of_the_packages_losses() -> None:
    robust = hyperparameters_of(RobustLoss)
    assert list(robust) == ["label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "beta"]
    assert robust["beta"].annotation is float
    assert hyperparameters_of(SFTLoss) == {}


def test_of_a_function_are_its_arguments_after_batch_and_outputs() -> None:
    def function(batch, outputs, gamma=1, *, beta: float = 0.1, name, **rest):
        """A loss."""

    found = hyperparameters_of(function)
    assert list(found) == ["gamma", "beta", "name"]
    assert found["name"].required and found["name"].annotation is Any
    assert hyperparameters_of(lambda batch, outputs: None) == {}


def test_a_function_must_be_callable_with_them_by_name() -> None:
    def function(batch, outputs, beta):
        """Needs a third positional argument."""

    with pytest.raises(LossConfigError, match="beta"):
        hyperparameters_of(function)
    with pytest.raises(LossConfigError, match="cannot be a loss"):
        hyperparameters_of(max)


def test_positional_constructor_arguments_count() -> None:
    class Plain:
        def __init__(self, beta: float, *more: int, gamma: float = 1.0) -> None: ...

    assert list(hyperparameters_of(Plain)) == ["beta", "gamma"]


def test_annotations_that_cannot_be_evaluated_are_not_checked() -> None:
    def function(batch: Unknown, outputs, *, beta: AlsoUnknown = 1): ...  # noqa: F821

    assert hyperparameters_of(function)["beta"].annotation is Any


def test_shown_as_in_a_signature() -> None:
    shown = [str(parameter) for parameter in hyperparameters_of(Child).values()]
    assert shown == ["gamma: float", "beta: float = 0.5", "kind: 'a' | 'b' = 'a'"]


# Resolving


def _resolve(annotation: Any, value: Any) -> Any:
    declared = {"x": Hyperparameter("x", annotation)}
    return resolve("mine", declared, {"x": value}, {}, "trainer config")[0]["x"]


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (float, 0.5),
        (int, 3),
        (bool, True),
        (str, "a"),
        (Any, object),
        (Literal["a", "b"], "b"),
        (Literal[1, 2], 2),
        (Optional[float], None),  # noqa: UP045
        (float | None, None),
        (float | None, 0.5),
        (Union[int, str], "a"),  # noqa: UP007
        (list, [1, "a"]),
        (list[float], [1, 0.5]),
        (tuple[int, ...], (1, 2)),
        (list[dict], [{"a": 1}]),
        (dict[str, Any], {"a": 1}),
        (Mapping[str, float], {"a": 1.0}),
    ],
    ids=str,
)
def test_fitting_values_pass(annotation: Any, value: Any) -> None:
    assert _resolve(annotation, value) == value


@pytest.mark.parametrize("annotation", [float, float | None, Optional[float]])  # noqa: UP045
def test_an_int_becomes_a_float_where_one_is_wanted(annotation: Any) -> None:
    assert type(_resolve(annotation, 2)) is float
    assert type(_resolve(int, 2)) is type(_resolve(int | float, 2)) is int


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        (float, True, r"expected float, found True \(bool\)"),
        (float | None, False, "found False"),
        (int, True, r"expected int, found True \(bool\)"),
        (int, 1.0, r"expected int, found 1.0 \(float\)"),
        (bool, 1, "expected bool"),
        (float, None, "expected float, found None"),
        (float, "1e-3", "YAML reads 1e-3 as text: write a number with a point"),
        (float, "small", r"found 'small' \(str\)$"),
        (float, [0.1], "expected float"),
        (float, float("nan"), "expected a finite number, found nan"),
        (float | None, float("inf"), "expected a finite number, found inf"),
        (float, 10**400, "expected a number"),
        (str, 3, "expected str"),
        (Literal["a", "b"], "c", r"expected 'a' \| 'b', found 'c'"),
        (Literal[1, 2], True, r"expected 1 \| 2"),
        (Literal[0, 1], 1.0, "found 1.0"),
        (list[float], ["a"], "expected list"),
        (list[float], 0.5, "expected list"),
        (tuple[int, ...], (1, "a"), "expected tuple"),
        (dict[str, Any], [("a", 1)], "expected dict"),
    ],
    ids=str,
)
def test_other_values_do_not(annotation: Any, value: Any, message: str) -> None:
    with pytest.raises(LossConfigError, match=message) as caught:
        _resolve(annotation, value)
    assert str(caught.value).startswith("loss 'mine', hyperparameter 'x' (loss_function): ")


def test_order_and_origins() -> None:
    declared = hyperparameters_of(Child)
    values, origins = resolve("mine", declared, {"gamma": 1}, {"beta": 2, "kind": None, "unused": 3}, "CustomDPOConfig")
    assert values == {"gamma": 1.0, "beta": 2.0, "kind": "a"}
    assert origins == {"gamma": "loss_function", "beta": "CustomDPOConfig", "kind": "default"}
    values, origins = resolve("mine", declared, {"gamma": 1.0, "beta": 9.0}, {"beta": 2.0}, "CustomDPOConfig")
    assert values["beta"] == 9.0 and origins["beta"] == "loss_function"


def test_a_trainers_value_is_checked_and_named() -> None:
    with pytest.raises(LossConfigError, match=r"hyperparameter 'beta' \(CustomDPOConfig\): expected float"):
        resolve("mine", hyperparameters_of(Child), {"gamma": 1.0}, {"beta": "a"}, "CustomDPOConfig")


def test_unknown_and_missing_names_show_the_signature() -> None:
    declared = hyperparameters_of(Child)
    signature = r"mine\(gamma: float, beta: float = 0.5, kind: 'a' \| 'b' = 'a'\)"
    with pytest.raises(LossConfigError, match=rf"no hyperparameter 'gama' \(did you mean 'gamma'\?\).*{signature}"):
        resolve("mine", declared, {"gama": 1.0}, {}, "")
    with pytest.raises(LossConfigError, match=rf"'mine' needs the hyperparameter 'gamma'. It takes: {signature}"):
        resolve("mine", declared, {}, {}, "")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("beta", "set `beta` in the trainer's config"),
        ("use_weighting", "set `use_weighting` in the trainer's config"),
        ("ld_alpha", "set `ld_alpha` in the trainer's config"),
        ("weight", "A weight belongs to a component of a composition"),
    ],
)
def test_options_of_the_trainer_are_pointed_out(name: str, hint: str) -> None:
    with pytest.raises(LossConfigError, match=hint):
        resolve("mine", {}, {name: 1.0}, {}, "")


# Helpers


def test_suggestions() -> None:
    assert suggestion("sigmod", ["sigmoid", "hinge"]) == " (did you mean 'sigmoid'?)"
    assert suggestion("xyz", ["sigmoid", "hinge"]) == ""


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        ({"above": 0}, [1e-9, 5.0], [0.0, -1.0]),
        ({"at_least": 0}, [0.0, 5.0], [-1e-9]),
        ({"below": 1}, [0.999, -5.0], [1.0, 2.0]),
        ({"at_most": 1}, [1.0, -5.0], [1.001]),
        ({"at_least": 0, "below": 0.5}, [0.0, 0.49], [-0.1, 0.5]),
    ],
    ids=str,
)
def test_ranges(bounds: dict[str, float], inside: list[float], outside: list[float]) -> None:
    assert [check_range("x", value, **bounds) for value in inside] == inside
    for value in [*outside, float("nan")]:
        with pytest.raises(LossConfigError, match=r"hyperparameter 'x': expected a value [<>]"):
            check_range("x", value, **bounds)


def test_a_range_error_shows_both_bounds() -> None:
    with pytest.raises(LossConfigError, match=r"expected a value >= 0 and < 0.5, found 0.7"):
        check_range("x", 0.7, at_least=0, below=0.5)
