"""ReLoBRaLo against the authors' formula on full histories."""

from __future__ import annotations

import math
from functools import partial

import pytest

from trl_custom_losses import LossConfigError
from trl_custom_losses.balancing.rules import ReLoBRaLoWeights

from . import NAN, RuleContract, follow, history, names, policy_history


class TestContract(RuleContract):
    make = partial(ReLoBRaLoWeights, rho=0.7, alpha=0.8)


def _rule(weights: list[float], **options) -> ReLoBRaLoWeights:
    return ReLoBRaLoWeights(names=names(len(weights)), initial_weights=weights, **options)


def _balanced(now: list[float], before: list[float], tau: float) -> list[float]:
    scores = [a / (tau * b) for a, b in zip(now, before, strict=True)]
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [len(now) * value / sum(exponentials) for value in exponentials]


def _reference(rows, draws, alpha, tau):
    """Multipliers after each row; `draws` are the rho_t."""
    out = [[1.0] * len(rows[0])]
    for t in range(1, len(rows)):
        to_first, to_previous = _balanced(rows[t], rows[0], tau), _balanced(rows[t], rows[t - 1], tau)
        rho = float(draws[t])
        out.append(
            [
                rho * alpha * last + (1 - rho) * alpha * first + (1 - alpha) * previous
                for last, first, previous in zip(out[-1], to_first, to_previous, strict=True)
            ]
        )
    return out


def test_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = _rule([1.0, 1.0], alpha=0.9)
    monkeypatch.setattr(rule, "remembers", lambda step: [True, True, False, True][step])
    weights = follow(rule, [[4.0, 1.0], [2.0, 0.9], [1.0, 0.9], [0.5, 0.8]])
    expected = [[1.0, 1.0], [0.980262, 1.019738], [0.692889, 1.307111], [0.704397, 1.295603]]
    for got, wanted in zip(weights, expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("start", [[1.0, 1.0, 1.0], [0.2, 3.0, 1.0]], ids=["ones", "others"])
@pytest.mark.parametrize("options", [{}, {"rho": 0.5, "tau": 0.1, "alpha": 0.7}, {"rho": 0.0}, {"rho": 1.0, "tau": 3}])
def test_reference(start: list[float], options: dict) -> None:
    rows, settings = history(300, 3), {"alpha": 0.95, "tau": 1.0, "rho": 0.99} | options
    draws = [_rule([1.0], rho=settings["rho"]).remembers(step) for step in range(300)]
    expected = _reference(rows, draws, settings["alpha"], settings["tau"])
    for got, wanted in zip(follow(_rule(start, **options), rows), expected, strict=True):
        assert got == pytest.approx([w * m for w, m in zip(start, wanted, strict=True)], rel=1e-9)


def test_draws_depend_on_seed_and_step_alone() -> None:
    rule = _rule([1.0], rho=0.6, seed=3)
    draws = [rule.remembers(step) for step in range(1500)]
    assert [rule.remembers(step) for step in reversed(range(1500))] == draws[::-1]
    assert [_rule([1.0, 2.0], rho=0.6, seed=3).remembers(step) for step in range(1500)] == draws
    assert sum(draws) / 1500 == pytest.approx(0.6, abs=0.05)
    other = [_rule([1.0], rho=0.6, seed=4).remembers(step) for step in range(1500)]
    for first, second in ((draws, other), (draws, draws[1:])):  # seeds and neighbouring steps are independent
        agree = sum(a == b for a, b in zip(first, second, strict=False)) / len(second)
        assert agree == pytest.approx(0.6**2 + 0.4**2, abs=0.05)


def test_draws_of_this_version() -> None:
    """A resumed run draws what it would have drawn, also with a later version of the package."""
    rule = _rule([1.0], rho=0.5)
    assert [rule.remembers(step) for step in range(12)] == [draw == "1" for draw in "011101110100"]


def test_rho_is_the_probability_to_remember() -> None:
    assert all(_rule([1.0], rho=1.0).remembers(step) for step in range(200))
    assert not any(_rule([1.0], rho=0.0).remembers(step) for step in range(200))


def test_looking_back_compares_with_the_first_loss() -> None:
    rule = _rule([1.0, 1.0], rho=0.0, alpha=1.0)
    follow(rule, [[4.0, 1.0], [3.0, 1.0], [2.0, 1.0]])
    assert rule.weights == pytest.approx(_balanced([2.0, 1.0], [4.0, 1.0], 1.0))


@pytest.mark.parametrize("values", [[0.1, 3.0, 7.0], [0.0, 0.0, 0.0], [-0.3, 0.0, 1e-9]])
def test_constant_losses(values: list[float]) -> None:
    rule = _rule([1.0, 0.5, 2.0], rho=0.5)
    assert follow(rule, [values] * 20)[-1] == pytest.approx([1.0, 0.5, 2.0], rel=1e-12)


def test_one_objective_keeps_its_weight() -> None:
    rule = _rule([0.7], rho=0.5)
    assert follow(rule, history(20, 1))[-1] == pytest.approx([0.7], rel=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_losses_around_zero(rho: float) -> None:
    rule = _rule([1.0, 1.0, 1.0], rho=rho, alpha=0.5, tau=0.1)
    for weights in follow(rule, policy_history(150, 3)):
        assert sum(weights) == pytest.approx(3)
        assert min(weights) >= 0


def test_a_negative_loss_that_falls_loses() -> None:
    rule = _rule([1.0, 1.0], rho=1.0, alpha=0.0)
    falling, constant = follow(rule, [[-1.0, 1.0], [-1.5, 1.0]])[-1]
    assert falling / constant == pytest.approx(math.exp(0.5 - 1))


def test_the_floor_is_the_scale_of_small_losses() -> None:
    for floor, ratio in ((1e-3, 1.01), (1e-6, 2.0)):
        rule = _rule([1.0, 1.0], rho=1.0, alpha=0.0, loss_floor=floor)
        small, constant = follow(rule, [[1e-5, 1.0], [2e-5, 1.0]])[-1]
        assert small / constant == pytest.approx(math.exp(ratio - 1))


def test_an_objective_that_is_not_finite_keeps_its_weight_and_history() -> None:
    rule = _rule([1.0, 1.0, 0.5], rho=0.5, alpha=0.5)
    rows = history(30, 3)
    follow(rule, rows[:20])
    kept = rule.weights[2], rule.first[2].item(), rule.previous[2].item()
    for step in range(20, 30):
        rule.update([*rows[step][:2], NAN], step)
        assert (rule.weights[2], rule.first[2].item(), rule.previous[2].item()) == kept
        assert sum(rule.multipliers.tolist()) == pytest.approx(3)
    assert rule.weights[0] != rule.weights[1]
    assert rule.previous.tolist()[:2] == rows[29][:2]


def test_an_objective_that_comes_later() -> None:
    rows = history(20, 3)
    rule, pair = _rule([1.0, 1.0, 0.5], rho=0.5), _rule([1.0, 1.0], rho=0.5)
    for step, row in enumerate(rows):
        rule.update([*row[:2], NAN], step)
        pair.update(row[:2], step)
        assert rule.weights == pytest.approx([*pair.weights, 0.5])
    rule.update([1.0, 1.0, 9.0], 20)
    assert rule.weights[2] == 0.5
    assert rule.first.tolist() == [*rows[0][:2], 9.0]
    rule.update([1.0, 1.0, 4.0], 21)
    assert rule.weights[2] != 0.5
    assert sum(rule.multipliers.tolist()) == pytest.approx(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha.* >= 0"),
        ({"alpha": 1.1}, "alpha.* <= 1"),
        ({"rho": -0.1}, "rho.* >= 0"),
        ({"rho": 1.1}, "rho.* <= 1"),
        ({"tau": 0.0}, "tau.* > 0"),
        ({"loss_floor": 0.0}, "loss_floor.* > 0"),
    ],
)
def test_bad_hyperparameters(options: dict, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        _rule([1.0], **options)
