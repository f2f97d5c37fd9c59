"""Verifiable accuracy: numbers made by hand, pass@k against counting, and inputs that are refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from trl_custom_losses import metrics
from trl_custom_losses.metrics.verifiable_accuracy.verifiable_accuracy import pass_at_k


@pytest.fixture(scope="module")
def metric():
    return metrics.load("verifiable_accuracy")


def test_numbers_made_by_hand(metric):
    found = metric.compute(predictions=[[1, 0, 0], [1, 1, 0.5]], k=[1, 2])
    assert found == {
        "score": pytest.approx(3.5 / 6),
        "score_se": pytest.approx(0.25),  # means 1/3 and 5/6: their standard deviation / sqrt(2)
        "accuracy": pytest.approx(0.5),
        "accuracy_se": pytest.approx(1 / 6),
        "pass@1": pytest.approx(0.5),
        "pass@1_se": pytest.approx(1 / 6),
        "pass@2": pytest.approx((2 / 3 + 1) / 2),
        "pass@2_se": pytest.approx(1 / 6),
        "completions": 6,
        "prompts": 2,
    }


def test_the_standard_error_of_groups_of_different_size(metric):
    """Mean 2/3; the deviations of the groups sum to 2/3 and -2/3: sqrt(2/1 * 8/9) / 3."""
    found = metric.compute(predictions=[[1, 1], [0]])
    assert found["score_se"] == pytest.approx(4 / 9)


def test_repeating_each_completion_adds_no_certainty(metric):
    scores = np.random.default_rng(0).random((10, 1))
    once, often = metric.compute(predictions=scores.tolist()), metric.compute(predictions=scores.repeat(5, 1).tolist())
    assert often["score_se"] == pytest.approx(once["score_se"])
    assert once["score_se"] == pytest.approx(scores.std(ddof=1) / math.sqrt(10))


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_of_many_completions():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


def test_a_threshold_for_partial_credit(metric):
    assert metric.compute(predictions=[[0.5, 0.4]], threshold=0.5)["accuracy"] == 0.5
    assert metric.compute(predictions=[[0.5, 0.4]])["accuracy"] == 0


def test_a_flat_list_with_groups_is_the_same(metric):
    nested = metric.compute(predictions=[[1.0, 0.25], [0.0, 1.0]], k=2)
    assert metric.compute(predictions=[1.0, 0.0, 0.25, 1.0], groups=["a", "b", "a", "b"], k=2) == nested


def test_one_prompt_has_no_standard_error(metric):
    assert math.isnan(metric.compute(predictions=[[1, 0]])["score_se"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"predictions": []}, "`predictions` is empty"),
        ({"predictions": [[1.0], []]}, "prompt without values, at position 1"),
        ({"predictions": [1.0, 0.0]}, "`groups` must say"),
        ({"predictions": [1.0, 0.0], "groups": ["a"]}, "`groups` has 1 entries, `predictions` has 2"),
        ({"predictions": [[1.0, math.nan]]}, "must be finite"),
        ({"predictions": [[1.5, 0.0]]}, r"scores in \[0, 1\]; 1 are not, the first is 1.5"),
        ({"predictions": [[-0.5]]}, r"scores in \[0, 1\]"),
        ({"predictions": ["right"], "groups": [0]}, "must be all numbers; found str"),
        ({"predictions": [[1.0, 0.0], [1.0]], "k": 2}, "`k` is 2, but a prompt has only 1 completions"),
        ({"predictions": [[1.0]], "k": 0}, "`k` must be a whole number"),
        ({"predictions": [[1.0]], "threshold": 0.0}, "`threshold` must be in"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(metric, inputs, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(**inputs)
