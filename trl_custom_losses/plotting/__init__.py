"""Pictures of runs and of losses; needs matplotlib (`pip install 'trl-custom-losses[plot]'`).

`plot_run` draws what a run logged, with a report to open in a browser. `plot_loss`, `plot_losses` and `plot_family`
draw losses from the registry alone.
"""

from __future__ import annotations

try:
    import jinja2  # noqa: F401
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"trl_custom_losses.plotting needs matplotlib and jinja2 ({error}): pip install 'trl-custom-losses[plot]'"
    ) from error

from .curves import drawable_losses, why_not_drawable
from .losses import plot_family, plot_loss, plot_losses
from .run import RunReport, draw_report, plot_run

__all__ = [
    "RunReport",
    "draw_report",
    "drawable_losses",
    "plot_family",
    "plot_loss",
    "plot_losses",
    "plot_run",
    "why_not_drawable",
]
