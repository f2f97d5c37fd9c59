"""Hyperparameters and weights as functions of the optimizer step.

A schedule is written where a number would stand: `{schedule: linear, start: 1.0, end: 0.1, total_steps: 500}`. The step
counts optimizer steps that are done, so the first one sees step 0. A left-out `total_steps` means the run's length. A
schedule holds no state: its value is a function of the step, which is why a resumed run continues it exactly.

| schedule | value at step t, with p = min(t / total_steps, 1) |
|---|---|
| `constant {value}` | value |
| `linear {start, end, total_steps}` | start + p (end - start) |
| `cosine {start, end, total_steps}` | end + (start - end) (1 + cos(pi p)) / 2 |
| `warmup_cosine {start, peak, end, warmup_steps, total_steps}` | linear from start to peak over the warm-up, then \
cosine from peak to end until total_steps |
| `exponential {start, decay}` | start decay^t |
| `piecewise {boundaries, values}` | values[i] for boundaries[i - 1] <= t < boundaries[i] |
"""

from __future__ import annotations

import dataclasses
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .errors import LossConfigError
from .hyperparameters import check_type, suggestion

#: The key that tells a schedule from other dicts.
KEY = "schedule"


@dataclass(kw_only=True)
class Schedule(ABC):
    """A number that depends on the optimizer step."""

    name: ClassVar[str]

    @abstractmethod
    def value(self, step: int) -> float:
        """The number at `step` optimizer steps done."""

    @abstractmethod
    def extremes(self) -> list[float]:
        """Values between which all others lie."""

    def begin(self, total_steps: int) -> None:  # noqa: B027 - most schedules need not know
        """Learn the run's length in optimizer steps, before the first of them."""

    def __str__(self) -> str:
        given = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.init)
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in given if value is not None)})"

    __repr__ = __str__


@dataclass(kw_only=True, repr=False)
class _Timed(Schedule):
    """A schedule that ends after `total_steps`, or with the run."""

    total_steps: int | None = None
    _run_steps: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.total_steps is not None and self.total_steps < 1:
            raise LossConfigError(f"'total_steps': expected at least 1, found {self.total_steps}")

    def begin(self, total_steps: int) -> None:
        self._run_steps = total_steps

    def _progress(self, step: int, first: int = 0) -> float:
        """How much of the steps from `first` to the end is done, 0..1."""
        total = self._run_steps if self.total_steps is None else self.total_steps
        if step <= first:
            return 0.0
        if total is None:  # asked outside of a run, whose length is not known
            raise LossConfigError(f"the schedule {self} has no 'total_steps' and no run has begun")
        return min((step - first) / (total - first), 1.0) if total > first else 1.0


@dataclass(kw_only=True, repr=False)
class Constant(Schedule):
    """The same value throughout."""

    name = "constant"
    constant: float = field(metadata={"key": "value"})

    def value(self, step: int) -> float:
        return self.constant

    def extremes(self) -> list[float]:
        return [self.constant]


@dataclass(kw_only=True, repr=False)
class Linear(_Timed):
    """On a straight line from `start` to `end`, then `end`."""

    name = "linear"
    start: float
    end: float

    def value(self, step: int) -> float:
        progress = self._progress(step)
        return self.end if progress == 1.0 else self.start + progress * (self.end - self.start)

    def extremes(self) -> list[float]:
        return [self.start, self.end]


@dataclass(kw_only=True, repr=False)
class Cosine(_Timed):
    """Along half a cosine from `start` to `end`, then `end`."""

    name = "cosine"
    start: float
    end: float

    def value(self, step: int) -> float:
        return half_cosine(self.start, self.end, self._progress(step))

    def extremes(self) -> list[float]:
        return [self.start, self.end]


@dataclass(kw_only=True, repr=False)
class WarmupCosine(_Timed):
    """Straight from `start` to `peak` over the warm-up, then along half a cosine to `end`."""

    name = "warmup_cosine"
    start: float
    peak: float
    end: float
    warmup_steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps < 0:
            raise LossConfigError(f"'warmup_steps': expected at least 0, found {self.warmup_steps}")
        if self.total_steps is not None and self.total_steps < self.warmup_steps:
            raise LossConfigError(
                f"'total_steps' counts the warm-up and must be at least 'warmup_steps' ({self.warmup_steps}), found "
                f"{self.total_steps}"
            )

    def value(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.start + step / self.warmup_steps * (self.peak - self.start)
        return half_cosine(self.peak, self.end, self._progress(step, first=self.warmup_steps))

    def extremes(self) -> list[float]:
        return [self.start, self.peak, self.end]


@dataclass(kw_only=True, repr=False)
class Exponential(Schedule):
    """`start` times `decay` at every step."""

    name = "exponential"
    start: float
    decay: float

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise LossConfigError(f"'decay': expected a value > 0 and <= 1, found {self.decay}")

    def value(self, step: int) -> float:
        return self.start * self.decay**step

    def extremes(self) -> list[float]:
        # The limit is 0, but no run gets there, and a hyperparameter that must be positive can decay.
        return [self.start, self.start * max(self.decay**100_000, 1e-12)]


@dataclass(kw_only=True, repr=False)
class Piecewise(Schedule):
    """`values[i]` up to the step `boundaries[i]`, the last value from the last boundary on."""

    name = "piecewise"
    boundaries: list[int]
    values: list[float]

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in zip(self.boundaries, self.boundaries[1:], strict=False))
        if not self.boundaries or self.boundaries[0] < 1 or not rising:
            raise LossConfigError(f"'boundaries': expected rising steps from 1 on, found {self.boundaries}")
        if len(self.values) != len(self.boundaries) + 1:
            raise LossConfigError(
                f"'values': expected one more than boundaries ({len(self.boundaries) + 1}), found {len(self.values)}"
            )
        self.values = [float(value) for value in self.values]

    def value(self, step: int) -> float:
        return self.values[sum(step >= boundary for boundary in self.boundaries)]

    def extremes(self) -> list[float]:
        return list(dict.fromkeys(self.values))


class Rounded(Schedule):
    """Another schedule, rounded to whole numbers, for a hyperparameter that takes no others."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def value(self, step: int) -> int:
        return round(self.schedule.value(step))

    def extremes(self) -> list[float]:
        return [round(extreme) for extreme in self.schedule.extremes()]

    def begin(self, total_steps: int) -> None:
        self.schedule.begin(total_steps)

    def __str__(self) -> str:
        return f"round({self.schedule})"

    __repr__ = __str__


SCHEDULES: dict[str, type[Schedule]] = {
    schedule.name: schedule for schedule in (Constant, Linear, Cosine, WarmupCosine, Exponential, Piecewise)
}


def half_cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at 1, flat at both ends."""
    if progress >= 1.0:  # cos(pi) is exactly -1, but let the end be the end
        return end
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def is_schedule(value: Any) -> bool:
    """Whether a configured value is a schedule, made or still to be made."""
    return isinstance(value, Schedule) or (isinstance(value, Mapping) and KEY in value)


def as_schedule(value: Any, annotation: Any, where: str) -> Schedule:
    """Make the schedule that a config describes and check the values it takes.

    Args:
        value: A dict with the key "schedule", or a schedule.
        annotation: Type of the hyperparameter that is scheduled.
        where: What is scheduled, for messages.

    Raises:
        LossConfigError: The schedule is unknown, malformed, or reaches values of the wrong type.
    """
    schedule = value if isinstance(value, Schedule) else _parse(value, where)
    if not accepts_numbers(annotation):
        raise LossConfigError(f"{where}: only numbers can be scheduled, not a value of the type {annotation}")
    for extreme in schedule.extremes():
        check_type(extreme, float, f"{where}: {schedule}")
    return Rounded(schedule) if _whole_numbers(annotation) else schedule


def _parse(config: Mapping[str, Any], where: str) -> Schedule:
    settings = dict(config)
    name = settings.pop(KEY)
    if not isinstance(name, str) or name not in SCHEDULES:
        raise LossConfigError(
            f"{where}: there is no schedule {name!r}{suggestion(str(name), SCHEDULES)}; known: {', '.join(SCHEDULES)}"
        )
    schedule = SCHEDULES[name]
    hints = typing.get_type_hints(schedule)
    fields = {f.metadata.get("key", f.name): f for f in dataclasses.fields(schedule) if f.init}
    for key in settings:
        if key not in fields:
            raise LossConfigError(
                f"{where}: the schedule '{name}' has no '{key}'{suggestion(key, fields)}; it takes {', '.join(fields)}"
            )
    missing = [key for key, f in fields.items() if f.default is dataclasses.MISSING and key not in settings]
    if missing:
        raise LossConfigError(f"{where}: the schedule '{name}' needs {', '.join(map(repr, missing))}")
    values = {
        fields[key].name: check_type(value, hints[fields[key].name], f"{where}: schedule '{name}', '{key}'")
        for key, value in settings.items()
    }
    try:
        return schedule(**values)
    except LossConfigError as error:
        raise LossConfigError(f"{where}: schedule '{name}': {error}") from error


def accepts_numbers(annotation: Any) -> bool:
    """Whether a hyperparameter of this type may be a number."""
    options = (annotation, *typing.get_args(annotation))
    return annotation is Any or any(option in (int, float) for option in options)


def _whole_numbers(annotation: Any) -> bool:
    """Whether a hyperparameter of this type takes whole numbers only."""
    options = (annotation, *typing.get_args(annotation))
    return int in options and float not in options
