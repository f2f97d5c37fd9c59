"""The trend rule against histories kept in full."""

from __future__ import annotations

import math
from functools import partial

import pytest

from trl_custom_losses import LossConfigError
from trl_custom_losses.balancing.rules import TrendWeights

from . import INF, NAN, RuleContract, follow, history, names, policy_history


class TestContract(RuleContract):
    make = partial(TrendWeights, adaptation_rate=0.05)
    lowest = 0.01


def _reference(rows: list[list[float]], weights: list[float], rate: float, floor: float = 0.01) -> list[list[float]]:
    seen: list[list[float]] = [[] for _ in weights]
    weights, out = list(weights), []
    for row in rows:
        for k, value in enumerate(row):
            if not abs(value) < 1e38:
                continue
            seen[k].append(value)
            if len(seen[k]) > 10:
                recent, before = sum(seen[k][-10:]) / 10, sum(seen[k][:-10]) / len(seen[k][:-10])
                weights[k] = max(weights[k] * (1 + rate if recent < before else 1 - rate), floor)
        out.append(list(weights))
    return out


@pytest.mark.parametrize("rate", [0.01, 0.04])
@pytest.mark.parametrize(
    "rows",
    [history(200, 3), history(200, 3, seed=1, gaps=True), policy_history(200, 3)],
    ids=["losses", "gaps", "policy"],
)
def test_bounded_state_is_the_full_history(rows: list[list[float]], rate: float) -> None:
    start = [1.0, 0.3, 2.0]
    found = follow(TrendWeights(names=names(3), initial_weights=start, adaptation_rate=rate), rows)
    for got, expected in zip(found, _reference(rows, start, rate), strict=True):
        assert got == pytest.approx(expected, rel=1e-12)


def test_by_hand() -> None:
    rule = TrendWeights(names=["down", "up"], initial_weights=[1.0, 1.0])
    first = follow(rule, [[11.0 - t, t] for t in range(10)])
    assert first == [[1.0, 1.0]] * 10  # ten losses have nothing before them
    rule.update([1.0, 10.0], 10)  # down: mean 5.5 after 11; up: mean 5.5 after 0
    assert rule.weights == pytest.approx([1.01, 0.99])
    rule.update([0.0, 0.0], 11)  # down: 4.5 after 10.5; up: 5.4 - 0.9 = 4.5... after 0.5
    assert rule.weights == pytest.approx([1.01**2, 0.99**2])


def test_the_mean_before_counts_every_loss_before() -> None:
    # Before: 100 and then zeros. Recent losses of 5 lie below their mean while it is 100 / n > 5, up to n = 19.
    rows = [[100.0]] + [[0.0]] * 30 + [[5.0]] * 10
    rule = TrendWeights(names=["a"], initial_weights=[1.0], adaptation_rate=0.1)
    follow(rule, rows)
    before = rule.weights[0]
    assert 100 / 31 < 5
    rule.update([5.0], 41)
    assert rule.weights[0] == pytest.approx(before * 0.9)


@pytest.mark.parametrize("value", [0.0, 0.1, -0.3, 1 / 3, 1e-20, 1e20])
def test_a_constant_is_not_falling(value: float) -> None:
    rule = TrendWeights(names=["a"], initial_weights=[1.0])
    weights = follow(rule, [[value]] * 60)
    assert [w for (w,) in weights] == pytest.approx([1.0] * 10 + [0.99 ** (t + 1) for t in range(50)])


def test_a_small_fall_is_falling() -> None:
    rule = TrendWeights(names=["a"], initial_weights=[1.0])
    assert follow(rule, [[1.0 - 1e-6 * t] for t in range(12)])[-1][0] == pytest.approx(1.01**2)


def test_floor() -> None:
    rows = [[float(t)] for t in range(80)]
    assert follow(TrendWeights(names=["a"], initial_weights=[1.0], adaptation_rate=0.1), rows)[-1] == [0.01]
    assert follow(TrendWeights(names=["a"], initial_weights=[1.0], floor=0.6), rows)[-1] == [0.6]


def test_weights_are_bounded_above() -> None:
    rule = TrendWeights(names=["a"], initial_weights=[1.0], adaptation_rate=0.9)
    assert follow(rule, [[-float(t)] for t in range(60)])[-1] == [1e6]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_signal_that_is_not_finite_is_skipped(bad: float) -> None:
    clean = history(40, 2)
    expected = follow(TrendWeights(names=names(2), initial_weights=[1.0, 1.0]), clean)[-1]
    gapped = [row for t, row in enumerate(clean) for row in ([[bad, bad], row] if t % 3 == 0 else [row])]
    assert follow(TrendWeights(names=names(2), initial_weights=[1.0, 1.0]), gapped)[-1] == expected


def test_long_runs_keep_little() -> None:
    rule = TrendWeights(names=names(2), initial_weights=[1.0, 1.0])
    follow(rule, history(50, 2))
    assert sum(value.numel() for value in rule.state_dict().values()) == 2 * (10 + 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptation_rate": -0.01}, "adaptation_rate.* >= 0"),
        ({"adaptation_rate": 1.0}, "adaptation_rate.* < 1"),
        ({"adaptation_rate": math.nan}, "adaptation_rate"),
        ({"floor": 0.0}, "floor.* > 0"),
        ({"floor": 1.5}, r"weight of 'a'.* >= 1\.5"),
        ({"initial_weights": [0.001]}, r"weight of 'a'.* >= 0\.01"),
    ],
)
def test_bad_hyperparameters(options: dict, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        TrendWeights(**{"names": ["a"], "initial_weights": [1.0]} | options)


def test_rate_zero_keeps_the_weights() -> None:
    rule = TrendWeights(names=names(2), initial_weights=[1.0, 3.0], adaptation_rate=0.0)
    assert follow(rule, history(40, 2))[-1] == [1.0, 3.0]
