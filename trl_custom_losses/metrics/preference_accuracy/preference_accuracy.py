"""How often, by how much and how credibly a model prefers the chosen completion of a pair."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

from trl_custom_losses.metrics.statistics import finite, standard_error, whole_number

_DESCRIPTION = """\
Preference accuracy of a model on pairs of a chosen and a rejected completion, with the quality of the probabilities
sigmoid(margin) that the Bradley-Terry model gives to "chosen is better".

The margin of a pair is in nats. It is one of
  - with a reference, the implicit reward margin of DPO (arXiv:2305.18290):
    beta * ((log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)));
  - without one, the difference of log-probabilities, log p(chosen) - log p(rejected), sums over tokens or per token.
Only the first is what DPO fits, so nll, ece and brier mean something there; for the second read accuracy and margin.
"""

_INPUTS = """
Args:
    margins (list of float): one margin a pair, in nats, finite.
    n_bins (int, default 15): bins of the calibration error, at least 1.

Returns:
    accuracy: share of pairs with margin > 0; a margin of exactly 0 counts one half, as a coin would decide it.
    accuracy_se: standard error of the accuracy, sqrt(sum (c - accuracy)^2 / (n (n - 1))), c in {0, 1/2, 1}.
    margin, margin_se: mean margin and its standard error, nats.
    nll: mean of -log sigmoid(margin), nats; log 2 = 0.693 for a model that knows nothing.
    ece: expected calibration error, sum_b n_b / n |accuracy_b - confidence_b|. Confidence is max(p, 1 - p), p =
        sigmoid(margin); right is margin > 0 (0 counts one half). The bins are ((b - 1) / n_bins, b / n_bins];
        confidence is at least one half, so only the upper half of them is used.
    brier: mean of (1 - p)^2.
    pairs: their number.
Standard errors of one pair are NaN.
"""

_CITATION = """\
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  year={2017},
  note={arXiv:1706.04599}
}
"""


class PreferenceAccuracy(evaluate.Metric):
    """Accuracy, margin, likelihood and calibration of preferences; see `inputs_description`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"margins": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/1706.04599", "https://arxiv.org/abs/2305.18290"],
        )

    def _compute(self, margins: list[float], n_bins: int = 15) -> dict[str, float]:
        values = finite(margins, "margins")
        bins = whole_number(n_bins, "n_bins", least=1)
        right = (np.sign(values) + 1) / 2
        log_wrong = -np.logaddexp(0.0, values)  # log(1 - p), without cancellation where p is near 1
        return {
            "accuracy": float(right.mean()),
            "accuracy_se": standard_error(right),
            "margin": float(values.mean()),
            "margin_se": standard_error(values),
            "nll": float(np.logaddexp(0.0, -values).mean()),
            "ece": _calibration_error(np.exp(-np.logaddexp(0.0, -np.abs(values))), right, bins),
            "brier": float(np.exp(2 * log_wrong).mean()),
            "pairs": len(values),
        }


def _calibration_error(confidence: np.ndarray, right: np.ndarray, n_bins: int) -> float:
    """sum_b n_b / n |mean right_b - mean confidence_b| over bins of equal width, closed on the right."""
    bin_of = np.searchsorted(np.linspace(0, 1, n_bins + 1)[1:], confidence, side="left")
    gaps = np.bincount(bin_of, weights=right - confidence, minlength=n_bins)  # n_b (accuracy_b - confidence_b)
    return float(np.abs(gaps).sum() / len(confidence))
