"""Hyperparameters of a loss: read from its signature, checked by name and type before anything is built."""

from __future__ import annotations

import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import LossConfigError

#: Stands in the origin of a value where a config's untouched default replaced a different default of the loss.
NOT_ITS_OWN = "not the loss's own"

_MISSING = inspect.Parameter.empty


@dataclass(frozen=True)
class Hyperparameter:
    """One keyword-only argument of a loss: its name, annotated type and default."""

    name: str
    annotation: Any
    default: Any = _MISSING

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is _MISSING

    @property
    def type_name(self) -> str:
        """The annotated type as a reader writes it, without modules."""
        return re.sub(r"\b(?:\w+\.)+(?=\w)", "", _type_name(self.annotation))

    @property
    def annotated(self) -> bool:
        """Whether it has a type that values are checked against."""
        return self.annotation not in (Any, _MISSING)

    def __str__(self) -> str:
        text = f"{self.name}: {_type_name(self.annotation)}"
        return text if self.required else f"{text} = {self.default!r}"


def hyperparameters_of(callable_: Callable[..., Any] | type) -> dict[str, Hyperparameter]:
    """The hyperparameters of a loss class (constructor) or function (keyword-only arguments).

    A constructor that takes `**options` passes them to its base class, whose hyperparameters count too.
    """
    found: dict[str, Hyperparameter] = {}
    if inspect.isclass(callable_):
        for cls in callable_.__mro__:
            if "__init__" not in vars(cls):
                continue
            function = vars(cls)["__init__"]
            if not _collect(function, list(inspect.signature(function).parameters.values())[1:], found):
                break
    else:
        parameters = list(signature(callable_).parameters.values())
        parameters = [p for index, p in enumerate(parameters) if index >= 2 or p.kind is p.KEYWORD_ONLY]
        if [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]:
            raise LossConfigError(
                f"the arguments of {callable_.__name__} after batch and outputs are hyperparameters and must be "
                f"keyword-only: f(batch, outputs, *, {', '.join(p.name for p in parameters)})"
            )
        _collect(callable_, parameters, found)
    return found


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """The function's signature; built-in functions have none and are no losses."""
    try:
        return inspect.signature(function)
    except ValueError as error:
        raise LossConfigError(f"{function!r} cannot be a loss: {error}") from error


def _collect(function: Callable[..., Any], parameters: list[inspect.Parameter], found: dict) -> bool:
    """Add `parameters` to `found`; say whether the function passes further keywords on."""
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):  # an annotation that cannot be evaluated is not checked
        hints = {}
    passes_on = False
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            passes_on = True
        elif parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            annotation = hints.get(parameter.name, Any)
            found.setdefault(parameter.name, Hyperparameter(parameter.name, annotation, parameter.default))
    return passes_on


def resolve(
    loss: str,
    declared: Mapping[str, Hyperparameter],
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    defaults_from: str,
    untouched: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values to build a loss with: given, else the trainer config's, else the loss's own default.

    Args:
        loss: Name of the loss, for messages.
        declared: What the loss takes.
        given: What its configuration says.
        defaults: Fields of the trainer's config; a field that is None counts as not set.
        defaults_from: Name of that config, for the origins.
        untouched: Fields of it that nobody set, for the origins.

    Returns:
        Values and, under the same names, where each came from.

    Raises:
        LossConfigError: A name is unknown, a value missing or of the wrong type.
    """
    signature = f"{loss}({', '.join(str(parameter) for parameter in declared.values())})"
    for name in given:
        if name not in declared:
            raise LossConfigError(
                f"loss '{loss}' has no hyperparameter '{name}'{suggestion(name, declared)}. It takes: {signature}"
                + _hint(name)
            )
    values, origins = {}, {}
    for name, parameter in declared.items():
        if name in given:
            value, origin = given[name], "loss_function"
        elif defaults.get(name) is not None:
            value, origin = defaults[name], defaults_from
            if not parameter.required and parameter.default not in (None, value) and name in untouched:
                origin = f"{defaults_from}'s default, {NOT_ITS_OWN} {parameter.default!r}"
        elif not parameter.required:
            value, origin = parameter.default, "default"
        else:
            raise LossConfigError(f"loss '{loss}' needs the hyperparameter '{name}'. It takes: {signature}")
        if origin != "default":
            value = check_type(value, parameter.annotation, f"loss '{loss}', hyperparameter '{name}' ({origin})")
        values[name], origins[name] = value, origin
    return values, origins


def suggestion(name: Any, known: Collection[str]) -> str:
    """`" (did you mean 'x'?)"` with the nearest known names, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(n) for n in near)}?)" if near else ""


_TRAINER_OPTIONS = {
    "beta": "In GRPO `beta` is the coefficient of the KL term, which the trainer adds around every policy loss",
    "use_weighting": "WPO weighting is applied by the trainer around every loss",
    "ld_alpha": "LD-DPO weights are applied by the trainer to `logps` and `ref_logps`, the sums that losses read",
    "weight": "A weight belongs to a component of a composition",
}


def _hint(name: str) -> str:
    if name not in _TRAINER_OPTIONS:
        return ""
    where = "" if name == "weight" else f": set `{name}` in the trainer's config"
    return f". {_TRAINER_OPTIONS[name]}{where}."


def _type_name(annotation: Any) -> str:
    if annotation in (Any, _MISSING):
        return "Any"
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(repr, typing.get_args(annotation)))
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)


def check_type(value: Any, annotation: Any, where: str) -> Any:
    """`value`, an int widened to float where a float is expected; raises if it is not of the annotated type.

    Raises:
        LossConfigError: It is of another type or not finite; the message begins with `where`.
    """
    if not matches(value, annotation):
        hint = ""
        if isinstance(value, str) and _is_number(value):
            hint = f". YAML reads {value} as text: write a number with a point, such as 1.0e-3"
        elif isinstance(value, Mapping) and "schedule" in value:
            hint = ". It cannot follow a schedule here; a loss's own hyperparameters and weights of components can"
        raise LossConfigError(
            f"{where}: expected {_type_name(annotation)}, found {value!r} ({type(value).__name__}){hint}"
        )
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        raise LossConfigError(f"{where}: expected a number within 64 bits, found one of {len(str(abs(value)))} digits")
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise LossConfigError(f"{where}: expected a finite number, found {value!r}")
    accepts_int = annotation is int or int in typing.get_args(annotation)
    accepts_float = annotation is float or float in typing.get_args(annotation)
    if isinstance(value, int) and not isinstance(value, bool) and accepts_float and not accepts_int:
        return float(value)
    return value


def matches(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotated type; an int is a float, a bool is neither."""
    if annotation in (Any, _MISSING):
        return True
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if annotation in (None, type(None)):
        return value is None
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        element = [argument for argument in arguments if argument is not Ellipsis]
        return len(element) != 1 or all(matches(item, element[0]) for item in value)
    if isinstance(origin, type):
        return isinstance(value, origin)
    return isinstance(value, annotation) if isinstance(annotation, type) else True


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_choice(name: str, value: str, choices: Any) -> Any:
    """Return `value` if it is one of the choices (a `Literal`), else raise a `LossConfigError` that names them."""
    if value not in typing.get_args(choices):
        raise LossConfigError(f"hyperparameter '{name}': expected {_type_name(choices)}, found {value!r}")
    return value


def check_range(
    name: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """Return `value` if it lies in the range, else raise a `LossConfigError` that names the hyperparameter."""
    conditions = [
        (above, "> ", lambda bound: value > bound),
        (at_least, ">= ", lambda bound: value >= bound),
        (below, "< ", lambda bound: value < bound),
        (at_most, "<= ", lambda bound: value <= bound),
    ]
    if not all(bound is None or holds(bound) for bound, _, holds in conditions):
        wanted = " and ".join(f"{sign}{bound:g}" for bound, sign, _ in conditions if bound is not None)
        raise LossConfigError(f"hyperparameter '{name}': expected a value {wanted}, found {value!r}")
    return value
