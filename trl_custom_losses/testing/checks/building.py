"""What a configuration may say: hyperparameters and their schedules."""

from __future__ import annotations

import math
from typing import Any

from ...errors import LossConfigError
from ...hyperparameters import Hyperparameter, matches
from ...schedules import accepts_numbers
from ..check import check, fail
from ..subject import Subject

_WRONG_TYPES: tuple[Any, ...] = ("text", None, True, 1.5, [1], {"a": 1}, math.nan, math.inf, 10**400)
_HAS_ITS_VALUES = "the loss was given as an object, which has its values already"
_NUMBERS = (-1.0, 0.0, 0.5, 1.0, 2.0)


@check(
    usual_cause="an argument without a type annotation is not checked; a range is checked with "
    "`hyperparameters.check_range` in the constructor. A plain function has no constructor: let it raise "
    "`ValueError`, or make it a class",
)
def hyperparameters(subject: Subject) -> str | None:
    """A hyperparameter that is unknown, of another type, or that makes the loss NaN or infinite is refused when the
    config is read, with its name in the message.
    """
    if subject.given_object:
        return _HAS_ITS_VALUES
    _require_refused(subject, "no_such_hyperparameter", 1.0, "is unknown")
    for name, parameter in subject.hyperparameters.items():
        if not parameter.annotated and all(_is_accepted(subject, name, value) for value in ("text", {"a": 1})):
            fail(f"'{name}' has no type annotation, so that any value is taken: write `{name}: float`")
        for value in _WRONG_TYPES:
            finite = not isinstance(value, float) or math.isfinite(value)
            if not matches(value, parameter.annotation) or not finite:
                _require_refused(subject, name, value, f"is declared as {parameter}")
        if accepts_numbers(parameter.annotation):
            for number in _NUMBERS:
                _try_number(subject, parameter, number)
    return None


def _require_refused(subject: Subject, name: str, value: Any, why: str) -> None:
    shown = (
        f"{name} = {value!r}" if not isinstance(value, int) or value < 1e20 else f"{name} = an integer of 401 digits"
    )
    try:
        subject.build(**{name: value})
    except LossConfigError as error:
        if name not in str(error):
            fail(f"'{shown}' is refused without naming the hyperparameter: {error}")
    except Exception as error:
        fail(f"'{shown}' ends in {type(error).__name__}, not in a LossConfigError: {error}")
    else:
        fail(f"'{shown}' is accepted, although it {why}")


def _is_accepted(subject: Subject, name: str, value: Any) -> bool:
    try:
        subject.build(**{name: value})
    except LossConfigError:
        return False
    return True


def _try_number(subject: Subject, parameter: Hyperparameter, number: float) -> None:
    """A number is refused, or the loss is finite with it."""
    value = int(number) if not matches(0.5, parameter.annotation) else number
    if value != number:
        return
    try:
        loss = subject.build(**{parameter.name: value})
    except LossConfigError:
        return
    data = subject.data()
    try:
        result = data.loss(loss)
    except ValueError:  # how a function refuses
        return
    except Exception as error:
        fail(f"{parameter.name} = {value} is accepted, and the loss then raises {type(error).__name__}: {error}")
    gradients = [gradient.isfinite().all() for gradient in data.gradients(loss, result).values()]
    if not result.isfinite() or not all(gradients):
        fail(f"{parameter.name} = {value} is accepted, and the loss is {float(result)} (or its gradient is not finite)")


@check(
    usual_cause="something is computed from the hyperparameter in the constructor, or it is kept under another name: "
    "read "
    "`self.<name>` in `forward`",
)
def schedules(subject: Subject) -> str | None:
    """A hyperparameter that follows a schedule acts with the value that it has at the step, or refuses to be
    scheduled.
    """
    data = subject.data()
    plain = subject.build()
    current = plain.hyperparameters()
    for name, parameter in subject.hyperparameters.items():
        value = current.get(name)
        if not accepts_numbers(parameter.annotation) or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        for target in (2 * value, value / 2, value + 1):
            if isinstance(value, int):
                target = int(target)
            if target != value and _follows(subject, name, value, target, data):
                break
    return _HAS_ITS_VALUES if subject.given_object else None


def _follows(subject: Subject, name: str, start: float, end: float, data: Any) -> bool:
    """Compare a schedule's end with a loss built there; False if the range does not allow it."""
    try:
        expected = subject.build(**{name: end})
        moving = subject.build(**{name: {"schedule": "linear", "start": start, "end": end, "total_steps": 4}})
    except LossConfigError:
        return False
    expected.begin_run(8, done=4)
    moving.begin_run(8, done=4)
    found, wanted = data.loss(moving), data.loss(expected)
    if not (found - wanted).abs() <= 1e-9 + 1e-7 * wanted.abs():
        fail(
            f"'{name}' moved by a schedule from {start:g} to {end:g} gives the loss {float(found):.8g}; built with "
            f"{end:g}, it is {float(wanted):.8g}"
        )
    return True
