"""Schedules: values by hand, ends, continuity, and mistakes that a config may hold."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from trl_custom_losses import LossConfigError
from trl_custom_losses.schedules import SCHEDULES, Schedule, as_schedule, is_schedule


def schedule(annotation: Any = float, **config: Any) -> Schedule:
    config["schedule"] = config.pop("type")
    return as_schedule(config, annotation, "loss 'x', hyperparameter 'y'")


CASES = [
    ({"type": "constant", "value": 0.3}, {0: 0.3, 7: 0.3}),
    ({"type": "linear", "start": 1.0, "end": 0.0, "total_steps": 4}, {0: 1.0, 1: 0.75, 3: 0.25, 4: 0.0, 9: 0.0}),
    ({"type": "linear", "start": -1, "end": 3, "total_steps": 2}, {0: -1, 1: 1, 2: 3, 3: 3}),
    (
        {"type": "cosine", "start": 1.0, "end": 0.0, "total_steps": 4},
        {0: 1.0, 1: (1 + math.sqrt(0.5)) / 2, 2: 0.5, 3: (1 - math.sqrt(0.5)) / 2, 4: 0.0, 5: 0.0},
    ),
    (
        {"type": "warmup_cosine", "start": 0.0, "peak": 1.0, "end": 0.2, "warmup_steps": 2, "total_steps": 6},
        {0: 0.0, 1: 0.5, 2: 1.0, 4: 0.6, 6: 0.2, 100: 0.2},
    ),
    (
        {"type": "warmup_cosine", "start": 0.5, "peak": 1.0, "end": 0.0, "warmup_steps": 0, "total_steps": 2},
        {0: 1.0, 1: 0.5, 2: 0.0},
    ),
    ({"type": "exponential", "start": 2.0, "decay": 0.5}, {0: 2.0, 1: 1.0, 3: 0.25}),
    ({"type": "piecewise", "boundaries": [2, 5], "values": [1, 2.5, 0]}, {0: 1, 1: 1, 2: 2.5, 4: 2.5, 5: 0, 99: 0}),
]


@pytest.mark.parametrize(("config", "expected"), CASES, ids=lambda value: str(value.get("type", "")))
def test_values_by_hand(config: dict[str, Any], expected: dict[int, float]) -> None:
    made = schedule(**config)
    for step, value in expected.items():
        assert made.value(step) == pytest.approx(value, abs=1e-12), step
    assert made.value(max(expected)) == expected[max(expected)]  # the end is exact
    extremes = made.extremes()
    assert all(min(extremes) <= value <= max(extremes) for value in map(made.value, range(20)))


def test_every_schedule_is_tried() -> None:
    assert {config["type"] for config, _ in CASES} == set(SCHEDULES)


@pytest.mark.parametrize("kind", ["linear", "cosine", "warmup_cosine"])
def test_a_left_out_length_is_the_runs(kind: str) -> None:
    options = {"peak": 0.8, "warmup_steps": 3} if kind == "warmup_cosine" else {}
    open_ended = schedule(type=kind, start=0.5, end=0.1, **options)
    fixed = schedule(type=kind, start=0.5, end=0.1, total_steps=12, **options)
    assert open_ended.value(0) == 0.5  # asked before a run, when the loss is built
    with pytest.raises(LossConfigError, match="no run has begun"):
        open_ended.value(5)
    open_ended.begin(12)
    fixed.begin(99)  # its own length holds
    assert [open_ended.value(step) for step in range(15)] == [fixed.value(step) for step in range(15)]
    assert open_ended.value(12) == 0.1


def test_a_run_that_ends_within_the_warm_up() -> None:
    made = schedule(type="warmup_cosine", start=0.0, peak=1.0, end=0.0, warmup_steps=100)
    made.begin(2)
    assert [made.value(step) for step in range(3)] == [0.0, 0.01, 0.02]


def test_a_warm_up_is_continuous() -> None:
    made = schedule(type="warmup_cosine", start=0.0, peak=1.0, end=0.1, warmup_steps=1000, total_steps=3000)
    values = [made.value(step) for step in range(4000)]
    assert max(abs(after - before) for before, after in itertools.pairwise(values)) <= 1e-3 + 1e-12
    assert max(values) == values[1000] == 1.0


def test_whole_numbers_where_the_hyperparameter_takes_no_others() -> None:
    made = schedule(int, type="linear", start=1, end=4, total_steps=2)
    assert [made.value(step) for step in range(3)] == [1, 2, 4] and all(type(made.value(s)) is int for s in range(3))
    assert made.extremes() == [1, 4]
    assert schedule(int | float, type="linear", start=1, end=4, total_steps=2).value(1) == 2.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "liner", "start": 1, "end": 0}, "no schedule 'liner' .did you mean 'linear'"),
        ({"type": 3}, "no schedule 3"),
        ({"type": ["linear"]}, "no schedule .'linear'."),
        ({"type": "linear", "start": 1.0}, "needs 'end'"),
        ({"type": "linear", "start": 1.0, "end": 0.0, "steps": 3}, "has no 'steps' .did you mean 'total_steps'"),
        ({"type": "linear", "start": "1", "end": 0.0}, "'start': expected float, found '1'"),
        ({"type": "linear", "start": True, "end": 0.0}, "'start': expected float"),
        ({"type": "linear", "start": float("nan"), "end": 0.0}, "expected a finite number"),
        ({"type": "linear", "start": 1.0, "end": 0.0, "total_steps": 0}, "'total_steps': expected at least 1, found 0"),
        ({"type": "linear", "start": 1.0, "end": 0.0, "total_steps": 2.5}, "'total_steps': expected"),
        (
            {"type": "warmup_cosine", "start": 0.0, "peak": 1.0, "end": 0.0, "warmup_steps": 5, "total_steps": 4},
            "at least 'warmup_steps' .5., found 4",
        ),
        ({"type": "warmup_cosine", "start": 0.0, "peak": 1.0, "end": 0.0, "warmup_steps": -1}, "'warmup_steps'"),
        ({"type": "exponential", "start": 1.0, "decay": 1.1}, "'decay': expected a value > 0 and <= 1, found 1.1"),
        ({"type": "exponential", "start": 1.0, "decay": 0.0}, "'decay'"),
        ({"type": "piecewise", "boundaries": [], "values": [1.0]}, "'boundaries': expected rising steps"),
        ({"type": "piecewise", "boundaries": [3, 3], "values": [1.0, 2.0, 3.0]}, "'boundaries': expected rising"),
        ({"type": "piecewise", "boundaries": [0], "values": [1.0, 2.0]}, "'boundaries': expected rising"),
        ({"type": "piecewise", "boundaries": [3], "values": [1.0]}, "'values': expected one more .*2., found 1"),
        ({"type": "piecewise", "boundaries": [3], "values": [1.0, "2"]}, "'values'"),
    ],
    ids=str,
)
def test_mistakes_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(LossConfigError, match=f"^loss 'x', hyperparameter 'y'.*{message}"):
        schedule(**config)


def test_only_numbers_follow_a_schedule() -> None:
    for annotation in (str, bool, list):
        with pytest.raises(LossConfigError, match="only numbers can be scheduled"):
            schedule(annotation, type="constant", value=1.0)


def test_what_is_a_schedule() -> None:
    made = schedule(type="constant", value=1.0)
    assert is_schedule(made) and is_schedule({"schedule": "nonsense"})
    assert not is_schedule({"type": "sigmoid"}) and not is_schedule(0.1) and not is_schedule("linear")
    assert as_schedule(made, float, "x") is made
