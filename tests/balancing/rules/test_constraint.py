"""The nuPI controller against its recursion, and closing a loop."""

from __future__ import annotations

import math
from functools import partial

import pytest

from trl_custom_losses import LossConfigError
from trl_custom_losses.balancing.rules import ConstraintWeights

from . import INF, NAN, RuleContract, follow, history, names, policy_history


class TestContract(RuleContract):
    make = partial(ConstraintWeights, targets={"a": 0.5})


def _rule(start: float = 1.0, target: float = 0.0, **options) -> ConstraintWeights:
    return ConstraintWeights(names=["a"], initial_weights=[start], targets={"a": target}, **options)


def _reference(signals, start, target, eta, k_i, k_p, nu):
    weight, xi, out = start, None, []
    for signal in signals:
        error = signal - target
        before = error if xi is None else xi
        xi = nu * before + (1 - nu) * error
        weight = max(0.0, weight + eta * (k_i * error + k_p * (xi - before)))
        out.append(weight)
    return out


def test_by_hand() -> None:
    """Errors 1, 0.5, -0.2, -0.4; the first step is eta k_i e_0 = 0.1."""
    rule = _rule(1.0, 0.0, eta=0.1, k_i=1.0, k_p=2.0, nu=0.5)
    weights = [w for (w,) in follow(rule, [[1.0], [0.5], [-0.2], [-0.4]])]
    assert weights == pytest.approx([1.1, 1.1, 0.985, 0.8775], abs=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"k_p": 0.0}, {"k_i": 0.0}, {"nu": 0.0}, {"nu": -0.5}, {"eta": 1.0, "nu": 0.3}]
)
@pytest.mark.parametrize("target", [0.0, 0.4, -0.2])
def test_recursion(options: dict, target: float) -> None:
    settings = {"eta": 0.1, "k_i": 1.0, "k_p": 10.0, "nu": 0.9} | options
    signals = [row[0] for row in history(60, 1)] + [row[0] for row in policy_history(60, 1)]
    found = [w for (w,) in follow(_rule(0.5, target, **options), [[s] for s in signals])]
    assert found == pytest.approx(_reference(signals, 0.5, target, **settings), abs=1e-12)


def test_without_proportional_part_it_is_dual_ascent() -> None:
    weights = follow(_rule(1.0, 0.5, eta=0.2, k_p=0.0), [[1.0], [0.75], [0.25]])
    assert [w for (w,) in weights] == pytest.approx([1.1, 1.15, 1.10])


def test_direction() -> None:
    assert follow(_rule(1.0, 0.1), [[0.2]])[0][0] > 1
    assert follow(_rule(1.0, 0.1), [[0.05]])[0][0] < 1
    assert follow(_rule(1.0, 0.1), [[0.1]] * 5) == [[1.0]] * 5


def test_never_below_zero_and_back_at_once() -> None:
    rule = _rule(0.05, 1.0, eta=0.1, k_p=0.0)
    assert follow(rule, [[0.0]] * 50)[-1] == [0.0]
    rule.update([1.5], 50)  # what was cut off at 0 need not be made up for
    assert rule.weights == pytest.approx([0.05])


def test_bounded_above() -> None:
    assert follow(_rule(1.0, 0.0, eta=1.0), [[1e30]] * 3)[-1] == [1e6]


def test_objectives_without_a_target_keep_their_weights() -> None:
    rule = ConstraintWeights(names=names(3), initial_weights=[0.3, 1.0, 2.0], targets={"b": 0.5})
    for row in follow(rule, history(30, 3)):
        assert row[0] == 0.3
        assert row[2] == 2.0
    assert rule.weights[1] != 1.0
    assert rule.xi.tolist()[::2] == [0.0, 0.0]


def test_each_target_has_its_controller() -> None:
    rows = history(40, 2)
    both = ConstraintWeights(names=names(2), initial_weights=[1.0, 2.0], targets={"b": 3.0, "a": 0.5})
    alone = [follow(_rule(s, t), [[r[k]] for r in rows]) for k, (s, t) in enumerate([(1.0, 0.5), (2.0, 3.0)])]
    assert follow(both, rows) == [a + b for a, b in zip(*alone, strict=True)]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_signal_that_is_not_finite_is_skipped(bad: float) -> None:
    rows = history(20, 1)
    gapped = [[bad], *rows[:7], [bad], [bad], *rows[7:]]
    assert follow(_rule(), gapped)[-1] == follow(_rule(), rows)[-1]


def _closed_loop(**options) -> list[float]:
    """A signal that drifts upward by 0.02 a step, less 0.02 times the weight, as a KL divergence might."""
    rule, signal, signals = _rule(0.0, 0.1, **options), 0.3, []
    for step in range(600):
        signal = max(0.0, signal + 0.02 * (1 - rule.weights[0]))
        rule.update([signal], step)
        signals.append(signal)
    return signals


def test_holds_a_signal_at_its_target() -> None:
    signals = _closed_loop()
    assert signals[-50:] == pytest.approx([0.1] * 50, abs=0.01)
    swings = [max(_closed_loop(k_p=k_p)[200:]) - 0.1 for k_p in (0.0, 10.0)]
    assert swings[1] < 0.5 * swings[0]  # what the proportional part is for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": {}}, "at least one objective; the objectives are 'kl', 'reward'"),
        ({"targets": {"kll": 1.0}}, "no objective is named 'kll'.*did you mean 'kl'.*are 'kl', 'reward'"),
        ({"targets": {"kl": NAN}}, "finite number for 'kl', found nan"),
        ({"targets": {"kl": "0.1"}}, "finite number for 'kl', found '0.1'"),
        ({"targets": {"kl": True}}, "finite number for 'kl'"),
        ({"eta": 0.0}, "eta.* > 0"),
        ({"k_i": -1.0}, "k_i.* >= 0"),
        ({"k_p": -1.0}, "k_p.* >= 0"),
        ({"k_i": 0.0, "k_p": 0.0}, "'k_i' and 'k_p'"),
        ({"nu": 1.0}, "nu.* < 1"),
        ({"nu": -1.0}, "nu.* > -1"),
        ({"eta": math.nan}, "eta"),
    ],
)
def test_bad_hyperparameters(options: dict, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        ConstraintWeights(
            **{"names": ["kl", "reward"], "initial_weights": [1.0, 1.0], "targets": {"kl": 1.0}} | options
        )
