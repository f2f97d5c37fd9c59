"""Preference accuracy: numbers made by hand, what must not change them, and inputs that are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trl_custom_losses import metrics

LOG_3, LOG_9 = math.log(3), math.log(9)


@pytest.fixture(scope="module")
def metric():
    return metrics.load("preference_accuracy")


def test_numbers_made_by_hand(metric):
    """Probabilities 3/4, 1/4, 1/2, 9/10: two right, one wrong, one tie."""
    found = metric.compute(margins=[LOG_3, -LOG_3, 0.0, LOG_9], n_bins=10)
    assert found == {
        "accuracy": pytest.approx(2.5 / 4),
        "accuracy_se": pytest.approx(math.sqrt(0.6875 / (4 * 3))),
        "margin": pytest.approx(LOG_9 / 4),
        "margin_se": pytest.approx(np.std([LOG_3, -LOG_3, 0, LOG_9], ddof=1) / 2),
        "nll": pytest.approx((math.log(4 / 3) + math.log(4) + math.log(2) + math.log(10 / 9)) / 4),
        # Bins of confidence: (0.7, 0.8] holds one right and one wrong at 0.75, (0.8, 0.9] or (0.9, 1] the one at 0.9.
        "ece": pytest.approx((2 * 0.25 + 0.1) / 4),
        "brier": pytest.approx((0.0625 + 0.5625 + 0.25 + 0.01) / 4),
        "pairs": 4,
    }


def test_one_bin_compares_the_means(metric):
    found = metric.compute(margins=[LOG_3, -LOG_3, 0.0, LOG_9], n_bins=1)
    assert found["ece"] == pytest.approx(abs(0.625 - (0.75 + 0.75 + 0.5 + 0.9) / 4))


def test_a_confidence_on_an_edge_belongs_to_the_bin_below(metric):
    """0.75 and 0.6 share the bin (0.5, 0.75]: one wrong, one right there."""
    found = metric.compute(margins=[-LOG_3, math.log(1.5)], n_bins=4)
    assert found["ece"] == pytest.approx(abs(0.5 - (0.75 + 0.6) / 2))


def test_a_calibrated_model_has_no_calibration_error(metric):
    """Three of four right at probability 3/4, nine of ten at 9/10."""
    margins = [LOG_3] * 3 + [-LOG_3] + [LOG_9] * 9 + [-LOG_9]
    assert metric.compute(margins=margins)["ece"] == pytest.approx(0, abs=1e-12)


def test_an_untrained_model_knows_nothing(metric):
    found = metric.compute(margins=[0.0] * 5)
    assert found["accuracy"] == 0.5 and found["accuracy_se"] == 0 and found["ece"] == pytest.approx(0, abs=1e-15)
    assert found["nll"] == pytest.approx(math.log(2)) and found["brier"] == pytest.approx(0.25)


def test_order_does_not_matter_and_the_sign_turns_it_round(metric):
    margins = np.random.default_rng(0).normal(size=50)
    found, turned = metric.compute(margins=margins), metric.compute(margins=-margins)
    assert metric.compute(margins=margins[::-1]) == pytest.approx(found)
    assert turned["accuracy"] == pytest.approx(1 - found["accuracy"])
    assert turned["nll"] == pytest.approx(found["nll"] + found["margin"])  # log sigmoid(-m) = log sigmoid(m) - m


def test_extreme_margins_stay_finite(metric):
    found = metric.compute(margins=[1e4, -1e4])
    assert found["nll"] == pytest.approx(5e3) and found["brier"] == pytest.approx(0.5)
    assert found["ece"] == pytest.approx(0.5)
    assert metric.compute(margins=[40.0])["brier"] == pytest.approx(math.exp(-80))  # 1 - p without cancellation


def test_one_pair_has_no_standard_error(metric):
    found = metric.compute(margins=[1.0])
    assert math.isnan(found["accuracy_se"]) and math.isnan(found["margin_se"]) and found["accuracy"] == 1


def test_batches_add_up(metric):
    metric.add_batch(margins=[1.0, -2.0])
    metric.add(margins=0.5)
    assert metric.compute() == metric.compute(margins=[1.0, -2.0, 0.5])


@pytest.mark.parametrize("margins", [[], [1.0, math.nan], [math.inf], [1.0, None]])
def test_margins_must_be_finite_and_there(metric, margins):
    with pytest.raises(ValueError, match=r"`margins` (is empty|must be finite)"):
        metric.compute(margins=margins)


@pytest.mark.parametrize("n_bins", [0, -1, 2.5, True])
def test_bins_must_be_a_positive_whole_number(metric, n_bins):
    with pytest.raises(ValueError, match="`n_bins` must be a whole number of at least 1"):
        metric.compute(margins=[1.0], n_bins=n_bins)
