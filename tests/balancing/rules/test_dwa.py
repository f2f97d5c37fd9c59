"""DWA against the paper's formula on full histories."""

from __future__ import annotations

import math
from functools import partial

import pytest

from trl_custom_losses import LossConfigError
from trl_custom_losses.balancing.rules import DWAWeights

from . import NAN, RuleContract, follow, history, names, policy_history


class TestContract(RuleContract):
    make = partial(DWAWeights, window=3)


class TestContractPerStep(RuleContract):
    make = partial(DWAWeights, window=1)


def _softmax(scores: list[float]) -> list[float]:
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def _reference(rows, weights, temperature=2.0, window=1):
    """The paper on positive, finite losses: one epoch of the paper is `window` rows."""
    out, means, current = [], [], list(weights)
    for t in range(len(rows)):
        if (t + 1) % window == 0:
            block = rows[t + 1 - window : t + 1]
            means.append([sum(column) / window for column in zip(*block, strict=True)])
            if len(means) >= 2:
                ratios = [now / before / temperature for now, before in zip(means[-1], means[-2], strict=True)]
                current = [w * len(weights) * s for w, s in zip(weights, _softmax(ratios), strict=True)]
        out.append(current)
    return out


@pytest.mark.parametrize("window", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("start", [[1.0, 1.0, 1.0], [0.2, 3.0, 1.0]], ids=["ones", "others"])
def test_paper(window: int, temperature: float, start: list[float]) -> None:
    rows = history(60, 3)
    rule = DWAWeights(names=names(3), initial_weights=start, temperature=temperature, window=window)
    for got, expected in zip(follow(rule, rows), _reference(rows, start, temperature, window), strict=True):
        assert got == pytest.approx(expected, rel=1e-12)


def test_by_hand() -> None:
    rule = DWAWeights(names=names(2), initial_weights=[1.0, 1.0], window=1)
    assert follow(rule, [[1.0, 2.0], [0.8, 1.8]]) == [[1.0, 1.0], pytest.approx([0.9750052, 1.0249948], abs=1e-7)]
    # exp(0.4) / (exp(0.4) + exp(0.45)) = 1 / (1 + exp(0.05))
    assert rule.weights[0] == pytest.approx(2 / (1 + math.exp(0.05)), rel=1e-12)


def test_two_windows_at_the_initial_weights() -> None:
    rule = DWAWeights(names=names(2), initial_weights=[1.0, 0.5])
    weights = follow(rule, history(31, 2))
    assert weights[:19] == [[1.0, 0.5]] * 19  # in use up to and with step 19, the last of two windows of ten
    assert weights[19] != [1.0, 0.5]
    assert all(row == weights[19] for row in weights[19:29])
    assert weights[29] != weights[19]


def test_the_loss_that_falls_least_gains() -> None:
    rule = DWAWeights(names=["fast", "slow"], initial_weights=[1.0, 1.0], window=1)
    fast, slow = follow(rule, [[1.0, 1.0], [0.5, 0.9]])[-1]
    assert fast < 1 < slow
    assert fast + slow == pytest.approx(2)


@pytest.mark.parametrize("values", [[0.1, 3.0, 7.0], [0.0, 0.0, 0.0], [-0.3, 0.0, 1e-9]])
def test_constant_losses(values: list[float]) -> None:
    rule = DWAWeights(names=names(3), initial_weights=[1.0, 0.5, 2.0], window=1)
    assert follow(rule, [values] * 5) == [[1.0, 0.5, 2.0]] * 5


def test_one_objective_keeps_its_weight() -> None:
    rule = DWAWeights(names=["a"], initial_weights=[0.7], window=1)
    assert follow(rule, history(10, 1)) == [[0.7]] * 10


def _multiplier(before: float, now: float, **options: float) -> float:
    """That of an objective next to a constant one."""
    rule = DWAWeights(names=names(2), initial_weights=[1.0, 1.0], window=1, **options)
    return follow(rule, [[before, 1.0], [now, 1.0]])[-1][0]


def _with_ratio(ratio: float) -> float:
    return 2 / (1 + math.exp((1 - ratio) / 2))


@pytest.mark.parametrize(
    ("before", "now", "ratio"),
    [
        (2.0, 3.0, 1.5),
        (-1.0, -1.5, 0.5),  # below 0 and falling
        (-1.0, -0.5, 1.5),
        (0.5, -0.1, 0.0),  # through 0
        (-1.0, 1.0, 3.0),
        (0.0, 0.0, 1.0),
        (0.0, 1e-9, 1 + 1e-6),
        (1e-12, -1e-12, 1.0),  # 1e-9 below, within the tolerance
        (0.0, 1e-3, 2.0),
        (1e-9, 5.0, 10.0),
        (1e-9, -5.0, 0.0),
        (1.0, 50.0, 10.0),
    ],
)
def test_losses_around_zero(before: float, now: float, ratio: float) -> None:
    assert _multiplier(before, now) == pytest.approx(_with_ratio(ratio), abs=2e-9)


def test_the_floor_is_the_scale_of_small_losses() -> None:
    assert _multiplier(1e-5, 2e-5) == pytest.approx(_with_ratio(1.01))
    assert _multiplier(1e-5, 2e-5, loss_floor=1e-6) == pytest.approx(_with_ratio(2.0))


def test_no_objective_starves() -> None:
    rule = DWAWeights(names=names(3), initial_weights=[1.0, 1.0, 1.0], window=1)
    for weights in follow(rule, policy_history(200, 3)):
        assert min(weights) >= 3 / (1 + 2 * math.exp(5)) * 0.999
        assert sum(weights) == pytest.approx(3)


def test_a_window_averages_its_finite_losses() -> None:
    full = DWAWeights(names=names(2), initial_weights=[1.0, 1.0], window=2)
    gaps = DWAWeights(names=names(2), initial_weights=[1.0, 1.0], window=2)
    follow(full, [[1.0, 4.0], [1.0, 2.0], [0.5, 2.0], [0.5, 1.0]])
    follow(gaps, [[NAN, 4.0], [1.0, 2.0], [0.5, 2.0], [math.inf, 1.0]])
    assert gaps.weights == full.weights


def test_a_window_without_finite_losses_is_left_out() -> None:
    rule = DWAWeights(names=names(2), initial_weights=[1.0, 1.0], window=1)
    follow(rule, [[1.0, 1.0], [0.5, 1.0], [NAN, 0.8]])
    scores = [0.5 / 2, 0.8 / 2]  # the first's ratio is still that of its last two means
    assert rule.weights == pytest.approx([2 * share for share in _softmax(scores)])
    rule.update([0.4, 0.8], 3)
    assert rule.weights == pytest.approx([2 * share for share in _softmax([0.8 / 2, 1.0 / 2])])


def test_an_objective_that_is_never_finite_does_not_hold_up_the_others() -> None:
    rule = DWAWeights(names=names(3), initial_weights=[1.0, 1.0, 0.3], window=1)
    follow(rule, [[1.0, 2.0, NAN], [0.8, 1.8, NAN]])
    assert rule.weights == pytest.approx([0.9750052, 1.0249948, 0.3], abs=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature.* > 0"),
        ({"temperature": -1.0}, "temperature.* > 0"),
        ({"window": 0}, "window.* >= 1"),
        ({"loss_floor": 0.0}, "loss_floor.* > 0"),
    ],
)
def test_bad_hyperparameters(options: dict, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        DWAWeights(names=["a"], initial_weights=[1.0], **options)
