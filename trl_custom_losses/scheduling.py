"""Schedules put on a loss that is being built, and checked on losses built at their ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import Loss
from .errors import LossConfigError
from .hyperparameters import Hyperparameter
from .schedules import Schedule, accepts_numbers, as_schedule, is_schedule

_COMPARED = (int, float, str, bool, tuple, list, dict, type(None))


def take_schedules(
    loss: str, declared: Mapping[str, Hyperparameter], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Schedule]]:
    """Part what a config gives for a loss into plain values and schedules; for these it keeps the first value.

    Args:
        loss: Name of the loss, for messages.
        declared: What the loss takes.
        given: What its config says.

    Raises:
        LossConfigError: A schedule is malformed.
    """
    schedules = {
        name: as_schedule(value, declared[name].annotation, f"loss '{loss}', hyperparameter '{name}'")
        for name, value in given.items()
        if is_schedule(value) and name in declared and accepts_numbers(declared[name].annotation)
    }
    return {**given, **{name: schedule.value(0) for name, schedule in schedules.items()}}, schedules


def put_schedules(loss: Loss, schedules: Mapping[str, Schedule], build: Callable[[dict[str, Any]], Loss]) -> None:
    """Let hyperparameters of `loss` follow their schedules.

    Args:
        loss: Built with every schedule's first value.
        schedules: By hyperparameter.
        build: Makes the same loss with some hyperparameters changed; it is called with the ends of every schedule, so
            that a value out of range is found now and not in the middle of a run.

    Raises:
        LossConfigError: The loss refuses a value that a schedule reaches, or keeps something computed from the
            hyperparameter, which would stay as it is while the hyperparameter moves.
    """
    for name, schedule in schedules.items():
        if not hasattr(loss.owner_of(name), name):
            raise LossConfigError(
                f"'{name}' cannot be scheduled: the loss must keep it as the attribute `{name}` and read it there"
            )
        first = _alike(build, {name: schedule.value(0)})
        for extreme in schedule.extremes():
            try:
                other = _alike(build, {name: extreme})
            except LossConfigError as error:
                raise LossConfigError(f"'{name}' is scheduled, {schedule}, and reaches {extreme:g}: {error}") from error
            setattr(other.owner_of(name), name, getattr(first.owner_of(name), name))
            stale = _differences(first.owner_of(name), other.owner_of(name))
            if stale:
                raise LossConfigError(
                    f"'{name}' cannot be scheduled: `{stale[0]}` is computed from it in the constructor and would not "
                    "follow; make that a property"
                )
    loss.schedules = dict(schedules)


def _alike(build: Callable[[dict[str, Any]], Loss], changed: dict[str, Any]) -> Loss:
    """Build a loss from one state of the random numbers, so that two differ in what was changed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build(changed)


def _differences(first: Any, second: Any, prefix: str = "") -> list[str]:
    """Names of attributes that differ between two objects made alike."""
    found = []
    for name, ours in vars(first).items():
        theirs = vars(second).get(name)
        if isinstance(first, nn.Module) and name in ("_buffers", "_parameters", "_modules"):
            for key, value in ours.items():
                path, other = f"{prefix}{key}", theirs.get(key)
                if isinstance(value, nn.Module) and isinstance(other, nn.Module):
                    found += _differences(value, other, f"{path}.")
                elif value is not other and not (isinstance(value, Tensor) and _equal(value, other)):
                    found.append(path)
        elif (isinstance(ours, _COMPARED) or is_dataclass(ours)) and ours != theirs:
            found.append(f"{prefix}{name}")
    return found


def _equal(first: Tensor, second: Any) -> bool:
    return isinstance(second, Tensor) and torch.equal(first, second)
