"""A run's report: pictures of what was logged, and one HTML file with all of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LossConfigError
from . import gradients, objective, training
from .components import groups_of
from .history import REPORT_FOLDER, History, read_state
from .page import render, run_facts
from .picture import Picture, Pictures
from .style import drawing, save

logger = logging.getLogger(__name__)

#: In the order of the report.
_PAINTERS = (
    objective.loss_picture,
    objective.component_pictures,
    objective.weight_picture,
    objective.moving_picture,
    gradients.gradient_pictures,
    training.margin_picture,
    training.reward_pictures,
    training.completion_picture,
    training.drift_picture,
    training.optimisation_picture,
)
_PAGE = "report.html"


@dataclass(frozen=True)
class RunReport:
    """What was written.

    Args:
        html: The report, which holds all pictures.
        pictures: The PNGs, in the report's order.
        titles: What each picture shows.
    """

    html: Path
    pictures: list[Path]
    titles: list[str]


def plot_run(run_dir: str | Path, output: str | Path | None = None) -> RunReport:
    """Draw what a run logged: PNGs, and one self-contained HTML report.

    There is a picture for whatever was logged: the loss, components of a composition, weights, hyperparameters that
    move, gradients, margins or rewards, completions, entropy and KL, learning rate, and the rest.

    Args:
        run_dir: The run's `output_dir`. The log is that of the newest `checkpoint-*/trainer_state.json`, of the
            folder's own `trainer_state.json`, or of the one that `RunReportCallback` wrote, whichever goes furthest.
        output: Folder of the report; `report` in the run's folder if not given.

    Returns:
        Where the report and the pictures are.

    Raises:
        LossConfigError: The folder holds no log that can be read, or `output` cannot be written.
    """
    state, path = read_state(run_dir)
    folder = Path(run_dir) / REPORT_FOLDER if output is None else Path(output)
    return draw_report(
        state, folder, title=f"Training run {Path(run_dir).resolve().name}", source=str(path.relative_to(run_dir))
    )


def draw_report(
    state: Mapping[str, Any], folder: str | Path, *, title: str, loss: str = "", source: str = "", ended: str = ""
) -> RunReport:
    """Draw the report of a Trainer's state.

    Args:
        state: Its fields, `log_history` among them.
        folder: Of the report; made if it is missing.
        title: Of the page.
        loss: Description of the loss.
        source: Where the log was read.
        ended: What ended the run before its time.

    Raises:
        LossConfigError: The folder cannot be written.
    """
    folder = Path(folder)
    history = History.from_log(state["log_history"])
    facts = run_facts(state, history, loss or _components(history), source)
    facts += [("Ended by", ended)] if ended else []
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures_of(history):
            file = folder / f"{picture.name}.png"
            with _left_out(picture.title), drawing():
                written.append((picture, save(picture.figure, file)))
        page = render(folder / _PAGE, title=title, facts=facts, pictures=written, history=history)
    except OSError as error:
        raise LossConfigError(f"the report cannot be written to {folder}: {error.strerror or error}") from error
    return RunReport(page, [file for _, file in written], [picture.title for picture, _ in written])


def pictures_of(history: History) -> list[Picture]:
    """All pictures that there is data for."""
    found: Pictures = []
    with drawing():
        for painter in _PAINTERS:
            with _left_out(painter.__name__):
                found += painter(history)
        with _left_out("other_picture"):
            found += training.other_picture(history, {name for _, names in found for name in names})
    return [picture for picture, _ in found]


@contextmanager
def _left_out(what: str) -> Iterator[None]:
    """One picture that fails is a warning; the report has the others."""
    try:
        yield
    except Exception as error:
        logger.warning("the report lacks a picture, '%s': %s: %s", what, type(error).__name__, error)


def _components(history: History) -> str:
    """What the log says of the loss: the names of its components, if it has any."""
    groups = groups_of(history.train)
    return " + ".join(part.name for part in groups[0].components) if groups else ""
