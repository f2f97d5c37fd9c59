"""`plot`: pictures of a run, or of a loss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import LossConfigError
from .files import look_here, refuse_paths


def plot(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN_DIR", help="A run's output folder, or one of its checkpoints.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(metavar="LOSS", help="A loss in place of a run: its value and its gradient.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the pictures of a run, or file for the picture of a loss.")
    ] = None,
) -> None:
    """Draw what a run logged, or a loss.

    Of a run, pictures and a report in one HTML file; of a loss, its value and gradient. Prints the files it wrote.

    Needs matplotlib: pip install 'trl-custom-losses[plot]'
    """
    if (run is None) == (loss is None):
        raise typer.BadParameter("give the folder of a run, or --loss NAME")
    try:
        from ..plotting import plot_loss, plot_run
    except ImportError as error:  # which says what to install
        raise LossConfigError(str(error)) from error

    if loss is not None:
        look_here()
        refuse_paths(loss, "plot --loss")
        paths = [plot_loss(loss, output or Path(f"{loss.replace(':', '.')}.png"))]
    else:
        report = plot_run(run, output)
        paths = [*report.pictures, report.html]
    for path in paths:
        typer.echo(str(path))
