"""Curves over optimizer steps: long ones as a thin line with its running mean, evaluations as points."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .history import History, Series
from .style import Style, label_text

#: Above this many points a curve is drawn thin, with its running mean.
LONG = 150
#: More are not drawn: a picture is not that wide.
_MOST_POINTS = 4000
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


def spread_out(points: int) -> np.ndarray:
    """Indices of at most some thousand points, evenly spread, with the first and the last."""
    return np.unique(np.linspace(0, max(points - 1, 0), min(points, _MOST_POINTS)).round().astype(int))


def extremes(values: np.ndarray) -> np.ndarray:
    """Indices of at most some thousand points with the lowest and the highest of each stretch, so that peaks stay."""
    if values.size <= _MOST_POINTS:
        return np.arange(values.size)
    kept = [np.array([0, values.size - 1])]
    for stretch in np.array_split(np.arange(values.size), _MOST_POINTS // 2):
        finite = stretch[np.isfinite(values[stretch])]
        kept.append(finite[[values[finite].argmin(), values[finite].argmax()]] if finite.size else stretch[:1])
    return np.unique(np.concatenate(kept))


def widened(steps: np.ndarray, *curves: np.ndarray) -> list[np.ndarray]:
    """Steps and curves; a single step becomes two around it, so that an area over it can be seen."""
    if steps.size != 1:
        return [steps, *curves]
    return [steps[0] + np.array([-0.4, 0.4]), *(np.repeat(curve, 2) for curve in curves)]


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
        thin, thick = extremes(values), spread_out(values.size)
        axes.plot(steps[thin], values[thin], color=look.color, linewidth=0.6, alpha=0.35)
        means = running_mean(values, window)[thick]
        axes.plot(steps[thick], means, color=look.color, linestyle=look.dash, linewidth=2, label=label)
        return
    marker = look.marker if values.size <= _FEW or _isolated(values) else None
    axes.plot(
        steps, values, color=look.color, linestyle=look.dash, linewidth=1.8, marker=marker, markersize=4, label=label
    )


def _isolated(values: np.ndarray) -> bool:
    """Whether a point stands between two gaps, where a line would not show it."""
    finite = np.concatenate(([False], np.isfinite(values), [False]))
    return bool((finite[1:-1] & ~finite[:-2] & ~finite[2:]).any())


def draw_evaluations(axes: Axes, history: History, name: str, look: Style) -> None:
    """Draw what evaluations gave, as hollow points without a line; each data set has its own marker."""
    for dataset, series in history.evaluated(name).items():
        axes.plot(
            series.steps,
            series.values,
            **_point(history, dataset),
            markeredgecolor=look.color,
            zorder=3,
            clip_on=False,  # a share of 1 lies on the edge
        )


def evaluation_entries(history: History, names: Iterable[str]) -> list[tuple[Line2D, str]]:
    """For a legend: the marker of each data set that any of the metrics was evaluated on."""
    datasets = dict.fromkeys(dataset for name in names for dataset in history.evaluated(name))
    return [
        (
            Line2D([], [], **_point(history, dataset), markeredgecolor="#444444"),
            f"evaluation: {label_text(dataset)}" if dataset else "evaluation",
        )
        for dataset in datasets
    ]


def _point(history: History, dataset: str) -> dict[str, Any]:
    """Marker of a data set, the same in all pictures."""
    index = list(history.evaluations).index(dataset) % len(_EVALUATION_MARKERS)
    return {
        "linestyle": "",
        "marker": _EVALUATION_MARKERS[index],
        "markersize": 7,
        "markerfacecolor": "white",
        "markeredgewidth": 1.6,
    }


def draw_band(axes: Axes, steps: np.ndarray, low: np.ndarray, high: np.ndarray, look: Style, **options: object) -> None:
    """Fill between two curves in the style's colour; gaps stay gaps, and one step alone has some width."""
    shown = spread_out(steps.size)
    steps, low, high = widened(steps[shown], low[shown], high[shown])
    # alpha, label and the like are the caller's
    axes.fill_between(steps, low, high, facecolor=look.color, linewidth=0, **options)
