"""Diversity: numbers made by hand, what must not change them, and inputs that are refused."""

from __future__ import annotations

import math

import pytest

from trl_custom_losses import metrics


@pytest.fixture(scope="module")
def metric():
    return metrics.load("diversity")


def test_numbers_made_by_hand(metric):
    found = metric.compute(predictions=[["a b a", "a b"], ["c"]])
    assert found == {
        "distinct_1": pytest.approx(3 / 6),  # a b a a b c
        "distinct_2": pytest.approx(2 / 3),  # ab ba ab
        "distinct_3": 1.0,  # aba
        "pairwise_diversity": pytest.approx(1 - 3 / 4),  # {a, b, ab, ba} and {a, b, ab}; the second prompt has no pair
        "unique": 1.0,
        "completions": 3,
        "prompts": 2,
    }


def test_the_pairwise_diversity_weighs_prompts_alike(metric):
    """Three pairs, of which two share nothing, against one pair of the same."""
    found = metric.compute(predictions=[["x", "x", "y"], ["z", "z"]])
    assert found["pairwise_diversity"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["unique"] == pytest.approx(3 / 5)


def test_only_words_are_compared_where_asked(metric):
    two = ["a b", "b a"]
    assert metric.compute(predictions=[two], similarity_n=1)["pairwise_diversity"] == 0
    assert metric.compute(predictions=[two], similarity_n=2)["pairwise_diversity"] == pytest.approx(1 - 2 / 4)


def test_a_flat_list_with_groups_is_the_same(metric):
    nested = metric.compute(predictions=[["a b", "a c"], ["a", "d d"]])
    assert metric.compute(predictions=["a", "a b", "d d", "a c"], groups=[7, "x", 7, "x"]) == pytest.approx(
        nested, nan_ok=True
    )


def test_the_same_text_for_another_prompt_is_no_repetition(metric):
    found = metric.compute(predictions=[["a", "b"], ["a", "b"]])
    assert found["unique"] == 1 and found["distinct_1"] == 0.5


def test_characters_as_units(metric):
    found = metric.compute(predictions=[["ab", "abb"]], unit="characters", n=1)
    assert found["distinct_1"] == pytest.approx(2 / 5)
    assert found["pairwise_diversity"] == pytest.approx(1 - 3 / 4)  # {a, b, ab} and {a, b, ab, bb}
    assert "distinct_2" not in found


def test_empty_completions_are_alike_and_have_no_n_grams(metric):
    found = metric.compute(predictions=[["", ""]])
    assert found["pairwise_diversity"] == 0 and found["unique"] == 0.5 and math.isnan(found["distinct_1"])
    assert metric.compute(predictions=[["", "a"]])["pairwise_diversity"] == 1


def test_without_pairs_there_is_no_pairwise_diversity(metric):
    assert math.isnan(metric.compute(predictions=[["a"], ["b"]])["pairwise_diversity"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"predictions": []}, "`predictions` is empty"),
        ({"predictions": [[]]}, "prompt without values, at position 0"),
        ({"predictions": [["a"], []]}, "prompt without values, at position 1"),
        ({"predictions": ["a", "b"]}, "`groups` must say"),
        ({"predictions": ["a", "b"], "groups": [1]}, "`groups` has 1 entries, `predictions` has 2"),
        ({"predictions": [["a"]], "groups": [1]}, "grouped already"),
        ({"predictions": ["a", ["b"]], "groups": [1, 2]}, "not a mixture"),
        ({"predictions": [1, 2], "groups": [1, 2]}, "must be all texts; found int"),
        ({"predictions": [["a", None]]}, "must be all texts; found NoneType, str"),
        ({"predictions": [["a"]], "n": 0}, "`n` must be"),
        ({"predictions": [["a"]], "similarity_n": 0}, "`similarity_n` must be"),
        ({"predictions": [["a"]], "unit": "lines"}, "`unit` must be one of"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(metric, inputs, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(**inputs)
