"""How often completions are right, where each can be checked, and what more attempts would reach."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import datasets
import evaluate
import numpy as np

from trl_custom_losses.metrics.statistics import check_entries, clustered_error, finite, grouped, whole_number

_DESCRIPTION = """\
Accuracy of completions whose answers are checked by a program: mean score, share of right ones, and pass@k, with
standard errors that respect that completions of the same prompt are not independent.
"""

_INPUTS = """
Args:
    predictions: scores in [0, 1], either a list of numbers a prompt, or a flat list with `groups`.
    groups (list, optional): with a flat list, the prompt that each score belongs to.
    k (int or list of int, default 1): of pass@k; each at least 1 and at most the number of completions of every prompt.
    threshold (float, default 1.0): a completion is right if its score is at least this, in (0, 1].

Returns:
    score, score_se: mean over all completions and its standard error.
    accuracy, accuracy_se: share of right completions and its standard error.
    pass@<k>, pass@<k>_se: mean over prompts of 1 - C(n - c, k) / C(n, k), n completions of which c are right: the
        chance that at least one of k of them, drawn without replacement, is right; the standard error is that of the
        mean over prompts.
    completions, prompts: their numbers.
Standard errors of score and accuracy are clustered by prompt: sqrt(G / (G - 1) sum_g (sum_i (x_i - mean))^2) / n over G
prompts and n completions. With one prompt they are NaN.
"""

_CITATION = """\
@article{chen2021evaluating,
  title={Evaluating Large Language Models Trained on Code},
  author={Chen, Mark and others},
  journal={arXiv:2107.03374},
  year={2021}
}
@article{miller2024adding,
  title={Adding Error Bars to Evals: A Statistical Approach to Language Model Evaluations},
  author={Miller, Evan},
  journal={arXiv:2411.00640},
  year={2024}
}
"""


class VerifiableAccuracy(evaluate.Metric):
    """Mean score, share of right completions and pass@k; see `inputs_description`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": datasets.Value("float64")}),
                datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
            ],
            reference_urls=["https://arxiv.org/abs/2107.03374", "https://arxiv.org/abs/2411.00640"],
        )

    def _infer_feature_from_batch(self, batch: dict[str, Any]) -> datasets.Features:
        check_entries(batch["predictions"], Real, "predictions")
        return super()._infer_feature_from_batch(batch)

    def _compute(
        self,
        predictions: list[Any],
        groups: Sequence[Any] | None = None,
        k: int | Sequence[int] = 1,
        threshold: float = 1.0,
    ) -> dict[str, float]:
        if not 0 < threshold <= 1:
            raise ValueError(f"`threshold` must be in (0, 1], not {threshold!r}")
        prompts = [finite(group, "predictions") for group in grouped(predictions, groups, "predictions")]
        scores = np.concatenate(prompts)
        outside = scores[(scores < 0) | (scores > 1)]
        if outside.size:
            raise ValueError(
                f"`predictions` must be scores in [0, 1]; {outside.size} are not, the first is {outside[0]}"
            )
        orders = [whole_number(order, "k", least=1) for order in (k if isinstance(k, Sequence) else [k])]
        fewest = min(len(group) for group in prompts)
        if any(order > fewest for order in orders):
            raise ValueError(f"`k` is {max(orders)}, but a prompt has only {fewest} completions")
        right = [(group >= threshold).astype(np.float64) for group in prompts]
        results = {
            "score": float(scores.mean()),
            "score_se": clustered_error(prompts),
            "accuracy": float(np.concatenate(right).mean()),
            "accuracy_se": clustered_error(right),
        }
        for order in orders:
            passed = [np.array([pass_at_k(len(group), int(group.sum()), order)]) for group in right]
            results[f"pass@{order}"] = float(np.mean(passed))
            results[f"pass@{order}_se"] = clustered_error(passed)
        return {**results, "completions": len(scores), "prompts": len(prompts)}


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k) for `c` right ones of `n`, 1 <= k <= n; as a product of factors in [0, 1)."""
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))
