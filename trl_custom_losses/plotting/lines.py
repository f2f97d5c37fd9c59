"""Curves over optimizer steps: long ones as a thin line with its running mean, evaluations as points."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from .history import Series
from .style import Style, label_text

#: Above this many points a curve is drawn thin, with its running mean.
LONG = 150
#: Up to this many, each point has a marker, so that a curve of one point shows.
_FEW = 30
_EVALUATION_MARKERS = "osD^v*PX"


def window_of(points: int) -> int:
    """Odd number of points that a running mean is taken over; 1 for a short curve."""
    return 1 if points <= LONG else max(5, points // 40) | 1


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` points around each, over fewer at the ends and at gaps; NaN stays NaN.

    Args:
        values: (n,).
        window: Odd.
    """
    finite = np.isfinite(values)
    totals = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    index, half = np.arange(values.size), window // 2
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, values.size)
    number = counts[high] - counts[low]
    means = (totals[high] - totals[low]) / np.maximum(number, 1)
    return np.where(finite, means, np.nan)


def draw_series(axes: Axes, series: Series, look: Style, label: str) -> None:
    """Draw one curve.

    Args:
        axes: To draw on.
        series: Of one metric.
        look: Its style.
        label: In the legend; a name from a log has been through `label_text`.
    """
    steps, values = series.steps, series.values
    window = window_of(values.size)
    if window > 1:
        axes.plot(steps, values, color=look.color, linewidth=0.6, alpha=0.35)
        axes.plot(steps, running_mean(values, window), color=look.color, linestyle=look.dash, linewidth=2, label=label)
        return
    marker = look.marker if values.size <= _FEW or _isolated(values) else None
    axes.plot(
        steps, values, color=look.color, linestyle=look.dash, linewidth=1.8, marker=marker, markersize=4, label=label
    )


def _isolated(values: np.ndarray) -> bool:
    """Whether a point stands between two gaps, where a line would not show it."""
    finite = np.concatenate(([False], np.isfinite(values), [False]))
    return bool((finite[1:-1] & ~finite[:-2] & ~finite[2:]).any())


def draw_evaluations(axes: Axes, evaluated: Mapping[str, Series], look: Style, label: str) -> None:
    """Draw what evaluations gave, as hollow points without a line; each data set has its own marker."""
    for index, (dataset, series) in enumerate(evaluated.items()):
        text = f"{label} ({f'evaluation: {label_text(dataset)}' if dataset else 'evaluation'})"
        axes.plot(
            series.steps,
            series.values,
            linestyle="",
            marker=_EVALUATION_MARKERS[index % len(_EVALUATION_MARKERS)],
            markersize=7,
            markerfacecolor="white",
            markeredgecolor=look.color,
            markeredgewidth=1.6,
            label=text,
            zorder=3,
            clip_on=False,  # a share of 1 lies on the edge
        )


def draw_band(axes: Axes, steps: np.ndarray, low: np.ndarray, high: np.ndarray, look: Style, **options: object) -> None:
    """Fill between two curves in the style's colour; gaps stay gaps."""
    # alpha, label and the like are the caller's
    axes.fill_between(steps, low, high, facecolor=look.color, linewidth=0, **options)
