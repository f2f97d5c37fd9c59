"""How the package's pictures look: colours that survive a greyscale print, axes, legends, and text from outside."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import LossConfigError

#: Picture elements per inch.
DPI = 150

_STEP = "optimizer step"
_LONGEST_LABEL = 36  # letters
_SETTINGS = {
    "text.parse_math": False,  # a metric's name may hold a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Style:
    """How one of several curves or areas is drawn.

    Args:
        color: One of Okabe and Ito's, told apart by readers with colour-blindness too.
        dash: Line style.
        marker: Of single points.
        hatch: Of areas.
    """

    color: str
    dash: str | tuple[float, tuple[float, ...]]
    marker: str
    hatch: str

    @property
    def pale(self) -> tuple[float, float, float]:
        """The colour mixed with white, for areas that hatching and lines must show on."""
        red, green, blue = (1 - 0.45 * (1 - part) for part in to_rgb(self.color))
        return red, green, blue


#: Neighbours among the first five, which most pictures need, differ in lightness; each has its own dash, marker, hatch.
STYLES: tuple[Style, ...] = (
    Style("#0072B2", "-", "o", "///"),
    Style("#D55E00", "--", "s", "..."),
    Style("#000000", ":", "D", "\\\\\\"),
    Style("#009E73", "-.", "^", "xxx"),
    Style("#CC79A7", (0, (6, 1, 1, 1, 1, 1)), "v", "---"),
    Style("#56B4E9", (0, (1, 1)), "P", "|||"),
    Style("#E69F00", (0, (8, 3)), "X", "ooo"),
    Style("#7F7F7F", (0, (3, 1, 1, 1)), "*", "+++"),
)


def style(index: int) -> Style:
    """The style of the curve of this index; they repeat when there are more than styles."""
    return STYLES[index % len(STYLES)]


def label_text(name: str, longest: int = _LONGEST_LABEL) -> str:
    """A name from a log as a label: printable, not too long, and not one that matplotlib's legends leave out.

    Args:
        name: As logged.
        longest: Number of letters beyond which its middle is left out.
    """
    printable = "".join(" " if unicodedata.category(letter).startswith("C") else letter for letter in name)
    if len(printable) > longest:
        half = longest // 2
        printable = f"{printable[:half]}…{printable[-half:]}"
    return f" {printable}" if printable.startswith("_") else printable


@contextmanager
def drawing() -> Iterator[None]:
    """The package's settings of matplotlib, inside the context only."""
    with rc_context(_SETTINGS), warnings.catch_warnings():
        # Names in other scripts show as boxes, a crowded layout is what it is: nothing that a user could change.
        warnings.simplefilter("ignore")
        yield


def new_figure(
    rows: int = 1,
    columns: int = 1,
    *,
    size: tuple[float, float] = (8.4, 3.6),
    heights: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row; no window, and nothing that pyplot would keep.

    Args:
        rows: Of axes.
        columns: Of axes.
        size: Width and height, inches.
        heights: Of the rows, relative to each other; equal if not given.
    """
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(np.asarray(figure.subplots(rows, columns, squeeze=False, height_ratios=heights)).flat)


def legend_height(entries: int) -> float:
    """Height that axes need, with title and labels, to have a legend of so many entries beside them, inches."""
    return 0.8 + 0.2 * entries


def finish_axes(axes: Axes, *, title: str = "", x: str = _STEP, y: str = "") -> None:
    """Title and axis labels, grid, and no frame at the top and on the right."""
    if title:
        axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if x == _STEP:  # a quarter of a step is none
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def legend_beside(axes: Axes, entries: Sequence[tuple[object, str]] | None = None) -> None:
    """A legend to the right of the axes, where it hides no data.

    Args:
        axes: Drawn on.
        entries: Artist and label of each; by default those that have a label.
    """
    if entries is None:
        entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    if entries:
        handles, labels = zip(*entries, strict=True)
        axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, handlelength=2.8)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG on white, whatever the page around it looks like; returns its path.

    Raises:
        LossConfigError: It cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    except OSError as error:
        raise LossConfigError(f"the picture cannot be written to {path}: {error.strerror or error}") from error
    return path
