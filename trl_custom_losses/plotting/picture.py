"""What the pictures of a run have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .history import NOTHING, History, Series
from .lines import LONG, draw_evaluations, draw_series, evaluation_entries
from .style import finish_axes, label_text, legend_beside, legend_height, new_figure, style


@dataclass(frozen=True)
class Picture:
    """One picture of a report.

    Args:
        name: Of its file, without extension.
        title: What is seen.
        caption: What it shows and in which unit, in a sentence or two.
        figure: Drawn.
    """

    name: str
    title: str
    caption: str
    figure: Figure


#: More curves than this in one panel cannot be told apart.
MOST_CURVES = 8

#: Pictures, each with the names of the metrics in it.
Pictures = list[tuple[Picture, set[str]]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes with one curve per metric.

    Args:
        title: Above it.
        unit: Of the y axis.
        names: Metric -> label; those that were not logged are left out.
        limits: Of the y axis, None where the data decide.
        evaluations: Whether evaluations are drawn too.
    """

    title: str
    unit: str
    names: Mapping[str, str]
    limits: tuple[float | None, float | None] = (None, None)
    evaluations: bool = True

    def logged(self, history: History) -> dict[str, str]:
        """Those of its metrics that training or an evaluation logged."""
        return {
            name: label
            for name, label in self.names.items()
            if (name in history.train and history.train[name].drawable)
            or (self.evaluations and history.evaluated(name))
        }


def picture_of(name: str, title: str, caption: str, panels: Sequence[Panel], history: History) -> Pictures:
    """A picture of all panels that there is data for, one above the other; none without data."""
    drawn = [(panel, panel.logged(history)) for panel in panels]
    drawn = [(panel, names) for panel, names in drawn if names]
    if not drawn:
        return []
    heights = [max(2.7, legend_height(len(names) + len(history.evaluations))) for _, names in drawn]
    figure, all_axes = new_figure(len(drawn), 1, size=(8.4, 0.6 + sum(heights)), heights=heights)
    for axes, (panel, names) in zip(all_axes, drawn, strict=True):
        draw_panel(axes, panel, names, history)
    shown = {name for _, names in drawn for name in names}
    return [(Picture(name, title, caption + smoothed(history, shown), figure), shown)]


def draw_panel(axes: Axes, panel: Panel, names: Mapping[str, str], history: History) -> None:
    """Draw one panel's curves, evaluations and legend."""
    for index, (name, label) in enumerate(names.items()):
        draw_series(axes, history.train.get(name, NOTHING), style(index), label_text(label))
        if panel.evaluations:
            draw_evaluations(axes, history, name, style(index))
    finish_axes(axes, title=panel.title, y=panel.unit)
    set_limits(axes, panel.limits)
    entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    if panel.evaluations:
        entries += evaluation_entries(history, names)
    if len(entries) > 1 or entries[0][1].lower() not in panel.title.lower():  # else the title says it
        legend_beside(axes, entries)


def set_limits(axes: Axes, limits: tuple[float | None, float | None]) -> None:
    """Fix one or both ends of the y axis, with a little room for the lines."""
    if limits == (None, None):
        return
    low, high = (found if end is None else end for found, end in zip(axes.get_ylim(), limits, strict=True))
    room = 0.02 * (high - low)
    axes.set_ylim(low - room, high + room)


def smoothed(history: History, names: set[str]) -> str:
    """A sentence for captions of pictures that show running means."""
    series: list[Series] = [history.train[name] for name in names if name in history.train]
    if any(one.values.size > LONG for one in series):
        return " Thin: every log; thick: the running mean."
    return ""


def keys(history: History, *, suffix: str = "", part: str = "") -> list[str]:
    """Names of metrics that end in `suffix` and have `part` at their beginning or after a slash."""
    return [
        key
        for key in sorted(history.train)
        if key.endswith(suffix) and (key.startswith(part) or f"/{part}" in key) and history.train[key].drawable
    ]


def panels(
    title: str, unit: str, names: dict[str, str], limits: tuple[float | None, float | None] = (None, None)
) -> list[Panel]:
    """As many panels as it takes to draw all curves; what they show moves with the training alone."""
    items = list(names.items())
    return [
        Panel(title, unit, dict(items[start : start + MOST_CURVES]), limits, evaluations=False)
        for start in range(0, len(items), MOST_CURVES)
    ]
