"""SoftAdapt against the authors' numbers and against the formula on full histories."""

from __future__ import annotations

import math
from functools import partial

import pytest

from trl_custom_losses import LossConfigError
from trl_custom_losses.balancing.rules import SoftAdaptWeights

from . import NAN, RuleContract, follow, history, names, policy_history


class TestContract(RuleContract):
    make = partial(SoftAdaptWeights, window=3)


class TestContractNormalized(RuleContract):
    make = partial(SoftAdaptWeights, window=1, accuracy_order=3, variant="normalized", beta=2.0)


class TestContractLossWeighted(RuleContract):
    make = partial(SoftAdaptWeights, window=1, accuracy_order=2, variant="loss_weighted")


# The example of the authors' README and unit tests.
_EXAMPLE = [
    [1.0, 150.0, 1500.0],
    [2.0, 100.0, 1000.0],
    [3.0, 50.0, 500.0],
    [4.0, 10.0, 100.0],
    [5.0, 0.1, 1.0],
]


def _rule(count: int, **options) -> SoftAdaptWeights:
    return SoftAdaptWeights(names=names(count), initial_weights=[1.0] * count, window=1, **options)


def test_authors_example() -> None:
    rule = _rule(3, accuracy_order=4)
    weights = follow(rule, _EXAMPLE)
    assert weights[:4] == [[1.0] * 3] * 4
    assert [w / 3 for w in weights[4]] == pytest.approx([9.9343336e-01, 6.5666283e-03, 3.8908041e-22], rel=1e-6)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("original", [0.33603, 0.32286, 0.34111]),
        ("normalized", [0.33742, 0.31728, 0.34530]),
        ("loss_weighted", [0.30022, 0.53136, 0.16842]),
    ],
)
def test_by_hand(variant: str, expected: list[float]) -> None:
    weights = follow(_rule(3, variant=variant), [[1.0, 2.0, 0.5], [0.9, 1.5, 0.55]])
    assert [w / 3 for w in weights[-1]] == pytest.approx(expected, abs=1e-5)


_COEFFICIENTS = {
    1: [-1, 1],
    2: [-1.5, 2, -0.5],
    3: [-11 / 6, 3, -1.5, 1 / 3],
    4: [-25 / 12, 4, -3, 4 / 3, -0.25],
    5: [-137 / 60, 5, -5, 10 / 3, -1.25, 0.2],
}


def _reference(rows, weights, variant, beta, window, order):
    out, current, means = [], list(weights), []
    for t in range(len(rows)):
        if (t + 1) % window == 0:
            means.append([sum(column) / window for column in zip(*rows[t + 1 - window : t + 1], strict=True)])
            if len(means) > order:
                columns = list(zip(*means[-order - 1 :], strict=True))
                slopes = [sum(c * v for c, v in zip(_COEFFICIENTS[order], column, strict=True)) for column in columns]
                if variant == "normalized":
                    slopes = [s / (sum(map(abs, slopes)) or 1) for s in slopes]
                sizes = [abs(sum(c)) / len(c) if variant == "loss_weighted" else 1.0 for c in columns]
                exponentials = [size * math.exp(beta * s) for size, s in zip(sizes, slopes, strict=True)]
                current = [w * len(weights) * e / sum(exponentials) for w, e in zip(weights, exponentials, strict=True)]
        out.append(current)
    return out


@pytest.mark.parametrize("variant", ["original", "normalized", "loss_weighted"])
@pytest.mark.parametrize(("window", "order"), [(1, 1), (3, 1), (1, 2), (2, 3), (1, 4), (2, 5)])
@pytest.mark.parametrize("beta", [0.1, -0.3])
def test_reference(variant: str, window: int, order: int, beta: float) -> None:
    rows, start = history(20, 3), [1.0, 0.2, 3.0]
    rule = SoftAdaptWeights(
        names=names(3), initial_weights=start, variant=variant, beta=beta, window=window, accuracy_order=order
    )
    expected = _reference(rows, start, variant, beta, window, order)
    for got, wanted in zip(follow(rule, rows), expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_differences_are_exact_for_polynomials(order: int) -> None:
    """Of degree up to the order: t^d has the slope 0 at t = 0 for d > 1, and t itself 1."""
    for degree in range(order + 1):
        rule = _rule(2, beta=1.0, accuracy_order=order)
        weights = follow(rule, [[float(t) ** degree, 1.0] for t in range(order + 1)])[-1]
        slope = math.log(weights[0] / weights[1])
        assert slope == pytest.approx(1.0 if degree == 1 else 0.0, abs=1e-9)


def test_normalized_favours_the_loss_that_falls_least_while_all_fall() -> None:
    """The authors' division by the signed sum would favour the one that falls fastest."""
    fast, slow = follow(_rule(2, variant="normalized", beta=1.0), [[2.0, 2.0], [1.0, 1.9]])[-1]
    assert fast < 1 < slow
    # Slopes -1 and -0.1 of a total of 1.1
    assert slow / fast == pytest.approx(math.exp(0.9 / 1.1))


def test_normalized_does_not_depend_on_the_scale() -> None:
    rows = history(10, 3)
    small, large = [follow(_rule(3, variant="normalized"), [[s * v for v in r] for r in rows]) for s in (0.01, 100)]
    assert small[-1] == pytest.approx(large[-1])


@pytest.mark.parametrize("variant", ["original", "normalized"])
@pytest.mark.parametrize("values", [[0.1, 3.0, 7.0], [0.0, 0.0, 0.0], [-0.3, 0.0, 1e-9]])
def test_constant_losses(variant: str, values: list[float]) -> None:
    rule = SoftAdaptWeights(names=names(3), initial_weights=[1.0, 0.5, 2.0], variant=variant, window=1)
    assert follow(rule, [values] * 5)[-1] == pytest.approx([1.0, 0.5, 2.0], rel=1e-12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 3.0], [0.5, 1.5]), ([-1.0, 3.0], [0.5, 1.5]), ([0.0, 0.0], [1.0, 1.0]), ([0.0, 3.0], [0.0, 2.0])],
)
def test_loss_weighted_takes_magnitudes(values: list[float], expected: list[float]) -> None:
    assert follow(_rule(2, variant="loss_weighted"), [values] * 3)[-1] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("variant", ["original", "normalized", "loss_weighted"])
def test_weights_sum_to_their_number(variant: str) -> None:
    for weights in follow(_rule(3, variant=variant), policy_history(100, 3)):
        assert sum(weights) == pytest.approx(3)


@pytest.mark.parametrize("variant", ["original", "normalized", "loss_weighted"])
@pytest.mark.parametrize("value", [0.0, -2.0, 5.0])
def test_one_objective_keeps_its_weight(variant: str, value: float) -> None:
    rule = SoftAdaptWeights(names=["a"], initial_weights=[0.7], window=1, variant=variant)
    assert follow(rule, [[value * t] for t in range(5)]) == [[0.7]] * 5


def test_beta_of_either_sign() -> None:
    rows = [[1.0, 1.0], [0.9, 1.1]]
    assert follow(_rule(2, beta=0.0), rows)[-1] == [1.0, 1.0]
    worst_first, best_first = follow(_rule(2, beta=1.0), rows)[-1], follow(_rule(2, beta=-1.0), rows)[-1]
    assert worst_first[0] < 1 < worst_first[1]
    assert best_first == pytest.approx(worst_first[::-1])


@pytest.mark.parametrize("variant", ["original", "normalized", "loss_weighted"])
def test_an_objective_that_is_not_finite_leaves_the_others_among_themselves(variant: str) -> None:
    rows = history(8, 2)
    rule = SoftAdaptWeights(names=names(3), initial_weights=[1.0, 1.0, 0.3], window=1, variant=variant)
    expected = follow(_rule(2, variant=variant), rows)
    third = [NAN] * 7 + [1e30]  # its first value makes no slope yet
    gapped = [[*row, value] for row, value in zip(rows, third, strict=True)]
    assert follow(rule, gapped) == [pytest.approx([*row, 0.3]) for row in expected]


@pytest.mark.parametrize("values", [[1e30, 1.0], [-1e30, 1.0], [1e38, -1e38]])
def test_exponentials_do_not_overflow(values: list[float]) -> None:
    weights = follow(_rule(2, beta=10.0), [[1.0, 1.0], values])[-1]
    assert sum(weights) == pytest.approx(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "soft"}, "'original' | 'normalized' | 'loss_weighted', found 'soft'"),
        ({"beta": math.inf}, "beta"),
        ({"beta": NAN}, "beta"),
        ({"window": 0}, "window.* >= 1"),
        ({"accuracy_order": 0}, "accuracy_order.* >= 1"),
        ({"accuracy_order": 6}, "accuracy_order.* <= 5"),
    ],
)
def test_bad_hyperparameters(options: dict, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        SoftAdaptWeights(names=["a"], initial_weights=[1.0], **options)
