"""What every rule on the host promises; a rule's test file inherits `RuleContract`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch

from trl_custom_losses import LossConfigError
from trl_custom_losses.balancing.rules import WeightRule

NAN, INF = math.nan, math.inf


def history(steps: int, objectives: int, *, seed: int = 0, gaps: bool = False) -> list[list[float]]:
    """Falling, noisy losses of several scales and, with `gaps`, signals that are not finite."""
    draw = random.Random(seed)
    rows = [
        [10.0**k * math.exp(-t * (k + 1) / steps) * draw.uniform(0.8, 1.2) for k in range(objectives)]
        for t in range(steps)
    ]
    if gaps:
        for row in rows:
            row[:] = [draw.choice([NAN, INF, -INF, 1e300]) if draw.random() < 0.2 else value for value in row]
    return rows


def policy_history(steps: int, objectives: int, *, seed: int = 0) -> list[list[float]]:
    """Losses of policy surrogates: of both signs, tiny, and exactly 0 now and then."""
    draw = random.Random(seed)
    sizes = [0.0, 1e-12, 1e-6, 1e-2, 1.0]
    return [[draw.gauss(0, 1) * draw.choice(sizes) for _ in range(objectives)] for _ in range(steps)]


def follow(rule: WeightRule, rows: Sequence[Sequence[float]], start: int = 0) -> list[list[float]]:
    """The weights after each step."""
    weights = []
    for step, row in enumerate(rows, start):
        rule.update(row, step)
        weights.append(rule.weights)
    return weights


def names(count: int) -> list[str]:
    return ["a", "b", "c", "d"][:count]


def snapshot(rule: WeightRule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in rule.state_dict().items()}


class RuleContract:
    """Tests of any rule; `make` builds one from names and initial weights."""

    make: Callable[..., WeightRule]
    lowest = 0.0  # no weight may fall below it

    def rule(self, weights: Sequence[float] = (1.0, 0.5, 2.0)) -> WeightRule:
        return type(self).make(names=names(len(weights)), initial_weights=weights)

    def test_starts_from_the_initial_weights(self) -> None:
        assert self.rule().weights == [1.0, 0.5, 2.0]

    def test_a_resumed_run_continues_bit_for_bit_from_every_step(self) -> None:
        rows = history(30, 3, gaps=True)
        uninterrupted, states = self.rule(), []
        expected = []
        for step, row in enumerate(rows):
            states.append(snapshot(uninterrupted))
            uninterrupted.update(row, step)
            expected.append(uninterrupted.weights)
        assert expected[-1] != [1.0, 0.5, 2.0]
        final = snapshot(uninterrupted)
        for step, state in enumerate(states):
            resumed = self.rule()
            resumed.load_state_dict(state)
            assert follow(resumed, rows[step:], step) == expected[step:]
            assert all(torch.equal(value, final[name]) for name, value in resumed.state_dict().items())

    def test_an_update_leaves_earlier_snapshots_alone(self) -> None:
        rule = self.rule()
        rows = history(30, 3)
        for step, row in enumerate(rows):
            before, kept = rule.state_dict(), snapshot(rule)
            rule.update(row, step)
            assert all(torch.equal(before[name], kept[name]) for name in kept)

    def test_the_state_keeps_its_shapes_on_the_host_in_float64(self) -> None:
        with torch.device("meta"):
            rule = self.rule()
            shapes = {name: value.shape for name, value in rule.state_dict().items()}
            rule.to("meta").half().to(torch.bfloat16)
            expected = follow(self.rule(), history(30, 3))
            assert follow(rule, history(30, 3)) == expected
        assert {name: value.shape for name, value in rule.state_dict().items()} == shapes
        assert {(str(v.device), v.dtype) for v in rule.state_dict().values()} == {("cpu", torch.float64)}

    @pytest.mark.parametrize("rows", [policy_history(100, 3), history(100, 3, gaps=True)], ids=["policy", "gaps"])
    def test_weights_stay_finite(self, rows: list[list[float]]) -> None:
        for weights in follow(self.rule(), rows):
            assert all(math.isfinite(weight) and self.lowest <= weight <= 1e6 for weight in weights)

    @pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e300])
    def test_nothing_finite_changes_nothing(self, bad: float) -> None:
        rule = self.rule()
        rows = history(45, 3)
        follow(rule, rows[:40])
        before = snapshot(rule)
        rule.update([bad] * 3, 40)
        # The number of steps in an open window counts steps, finite or not.
        assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items() if name != "steps")

    def test_a_wrong_number_of_signals(self) -> None:
        with pytest.raises(ValueError, match="expected 3 signals"):
            self.rule().update([1.0, 2.0], 0)

    @pytest.mark.parametrize(
        ("objectives", "weights", "message"),
        [
            ([], [], "at least one objective"),
            (["a", "a"], [1.0, 1.0], "share the name 'a'"),
            (["a", "b"], [1.0], "one initial weight for each"),
            (["a"], [1.0, 1.0], "one initial weight for each"),
            (["a"], [-1.0], "weight of 'a'.* >= 0"),
            (["a"], [NAN], "weight of 'a'"),
            (["a"], [1e7], r"weight of 'a'.* <= 1e\+06"),
        ],
    )
    def test_objectives_that_cannot_be_weighed(self, objectives: list, weights: list, message: str) -> None:
        with pytest.raises(LossConfigError, match=message):
            type(self).make(names=objectives, initial_weights=weights)
