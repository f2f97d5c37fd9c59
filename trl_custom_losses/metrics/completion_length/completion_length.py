"""How long completions are, and how many were cut off."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import datasets
import evaluate
import numpy as np

from trl_custom_losses.metrics.statistics import check_entries, finite, standard_error

_DESCRIPTION = """\
Lengths of completions: their spread, and the share that was cut off at a largest length.
"""

_INPUTS = """
Args:
    predictions: one entry a completion, either its length in tokens (a whole number, at least 0) or its text.
    unit (str, default "words"): what texts are counted in: "words" (split at white space) or "characters". Lengths are
        taken as they are.
    percentiles (list of float, default [5, 25, 75, 95]): each in [0, 100]; interpolated linearly.
    max_length (int, optional): the largest length that was allowed, at least 1, in the same unit.
    finished (list of bool, optional): whether each completion ended by itself, that is, with an end token. Goes with
        `max_length`: a completion of the full length that ended by itself was not cut off.

Returns:
    mean, mean_se: with the standard error of independent values, NaN for one completion.
    median, std (divisor n - 1, NaN for one completion), min, max, p<percentile>...
    truncated: with `max_length`, share of completions of at least this length that are not `finished`.
    completions: their number.
"""

_UNITS = {"words": lambda text: len(text.split()), "characters": len}


class CompletionLength(evaluate.Metric):
    """Mean, spread, percentiles and truncated share of lengths; see `inputs_description`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[
                # Texts first: "12" would pass for a number. Doubles, so that 1.5 is refused and not cut down to 1.
                datasets.Features({"predictions": datasets.Value("string")}),
                datasets.Features({"predictions": datasets.Value("float64")}),
            ],
        )

    def _infer_feature_from_batch(self, batch: dict[str, Any]) -> datasets.Features:
        check_entries(batch["predictions"], (str, Real), "predictions", nested=False)
        return super()._infer_feature_from_batch(batch)

    def _compute(
        self,
        predictions: list[str] | list[float],
        unit: str = "words",
        percentiles: Sequence[float] = (5, 25, 75, 95),
        max_length: int | None = None,
        finished: Sequence[bool] | None = None,
    ) -> dict[str, float]:
        lengths = _lengths(predictions, unit)
        if any(not 0 <= percentile <= 100 for percentile in percentiles):
            raise ValueError(f"`percentiles` must be in [0, 100], not {list(percentiles)}")
        several = len(lengths) > 1
        results = {
            "mean": float(lengths.mean()),
            "mean_se": standard_error(lengths),
            "median": float(np.median(lengths)),
            "std": float(lengths.std(ddof=1)) if several else float("nan"),
            "min": float(lengths.min()),
            "max": float(lengths.max()),
        }
        results |= {f"p{percentile:g}": float(np.percentile(lengths, percentile)) for percentile in percentiles}
        if max_length is not None:
            results["truncated"] = _truncated(lengths, max_length, finished)
        elif finished is not None:
            raise ValueError("`finished` goes with `max_length`, which is not given")
        return {**results, "completions": len(lengths)}


def _lengths(predictions: list[str] | list[float], unit: str) -> np.ndarray:
    if isinstance(predictions[0], str):
        if unit not in _UNITS:
            raise ValueError(f"`unit` must be one of {', '.join(_UNITS)}, not {unit!r}")
        return np.array([_UNITS[unit](text) for text in predictions], dtype=np.float64)
    lengths = finite(predictions, "predictions")
    wrong = lengths[(lengths < 0) | (lengths != np.floor(lengths))]
    if wrong.size:
        raise ValueError(f"`predictions` must be texts or whole numbers of at least 0; found {wrong[0]:g}")
    return lengths


def _truncated(lengths: np.ndarray, max_length: float, finished: Sequence[bool] | None) -> float:
    if max_length < 1:
        raise ValueError(f"`max_length` must be at least 1, not {max_length!r}")
    cut = lengths >= max_length
    if finished is not None:
        if len(finished) != len(lengths):
            raise ValueError(
                f"`finished` has {len(finished)} entries, `predictions` has {len(lengths)}; they must be as many"
            )
        cut &= ~np.asarray(finished, dtype=bool)
    return float(cut.mean())
