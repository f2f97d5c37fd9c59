"""Lengths of completions: numbers made by hand and inputs that are refused."""

from __future__ import annotations

import math

import pytest

from trl_custom_losses import metrics


@pytest.fixture(scope="module")
def metric():
    return metrics.load("completion_length")


def test_numbers_made_by_hand(metric):
    found = metric.compute(predictions=[10, 1, 3, 2], percentiles=[25, 75, 90], max_length=3)
    assert found == {
        "mean": 4.0,
        "mean_se": pytest.approx(math.sqrt(50 / 3) / 2),
        "median": 2.5,
        "std": pytest.approx(math.sqrt(50 / 3)),
        "min": 1.0,
        "max": 10.0,
        "p25": pytest.approx(1.75),
        "p75": pytest.approx(4.75),
        "p90": pytest.approx(3 + 0.7 * 7),
        "truncated": 0.5,
        "completions": 4,
    }


def test_what_ended_by_itself_was_not_cut_off(metric):
    lengths = {"predictions": [3, 3, 2], "max_length": 3}
    assert metric.compute(**lengths)["truncated"] == pytest.approx(2 / 3)
    assert metric.compute(**lengths, finished=[True, False, False])["truncated"] == pytest.approx(1 / 3)


def test_texts_are_counted_in_words_or_characters(metric):
    texts = ["12", "a  bc\nd", ""]
    assert metric.compute(predictions=texts)["mean"] == pytest.approx((1 + 3 + 0) / 3)
    assert metric.compute(predictions=texts, unit="characters")["mean"] == pytest.approx((2 + 7 + 0) / 3)


def test_a_text_of_digits_is_a_text(metric):
    assert metric.compute(predictions=["123"])["max"] == 1


def test_one_completion_has_no_spread(metric):
    found = metric.compute(predictions=[5])
    assert math.isnan(found["std"]) and math.isnan(found["mean_se"]) and found["median"] == found["p95"] == 5
    assert "truncated" not in found


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"predictions": []}, "`predictions` is empty"),
        ({"predictions": [1.5]}, "whole numbers of at least 0; found 1.5"),
        ({"predictions": [-1]}, "whole numbers of at least 0; found -1"),
        ({"predictions": [math.nan]}, "must be finite"),
        ({"predictions": [None]}, "all texts or all numbers; found NoneType"),
        ({"predictions": ["a", 1]}, "all texts or all numbers; found int, str"),
        ({"predictions": [["a"]]}, "must be a flat list"),
        ({"predictions": ["a"], "unit": "tokens"}, "`unit` must be one of words, characters"),
        ({"predictions": [1], "percentiles": [101]}, "`percentiles` must be in"),
        ({"predictions": [1], "max_length": 0}, "`max_length` must be at least 1"),
        ({"predictions": [1], "max_length": 2, "finished": [True, True]}, "`finished` has 2 entries"),
        ({"predictions": [1], "finished": [True]}, "`finished` goes with `max_length`"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(metric, inputs, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(**inputs)
