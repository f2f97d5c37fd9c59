"""Pictures of a run at its end, in its folder and in its trackers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_FOLDER = "report"
#: What the Trainer logs when the last step is done, while trackers still listen.
_LAST_LOG = "train_runtime"


class RunReportCallback(TrainerCallback):
    """Draws what the run logged when training ends: pictures and `report.html`, see `plotting.plot_run`.

    The custom trainers also have it drawn when training ends by an exception, as on a loss that is not finite.

    `CustomDPOTrainer(..., callbacks=[RunReportCallback()])`; the same for GRPO, and for any other `Trainer`. The report
    is in `<output_dir>/report`, written by the first process alone, with the log it was drawn from beside it. The
    pictures also go to the trackers of `report_to` that are "tensorboard", "wandb" or "trackio", as
    `report/<picture>`.

    A run that has been trained is worth more than its pictures: whatever fails here is a warning. Needs
    `pip install 'trl-custom-losses[plot]'`.

    Args:
        output: Folder of the report, if not `<output_dir>/report`.
        title: Of the report, if not one that names the output folder.

    Attributes:
        loss: Description of the loss for the report's head, which the custom trainers set; else it is the config's
            `loss_function`, if there is one.
    """

    def __init__(self, output: str | Path | None = None, title: str = "") -> None:
        self.output = None if output is None else Path(output)
        self.title = title
        self.loss = ""
        self._drawn_at = -1  # the step of the last report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._drawn_at = -1
        missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
        if state.is_world_process_zero and missing:  # told now, when training can still be stopped
            logger.warning(
                "RunReportCallback will draw nothing: %s is missing; pip install 'trl-custom-losses[plot]'",
                " and ".join(missing),
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if _LAST_LOG in (logs or {}):  # some trackers close their run before this callback hears of the end
            self._report(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._drawn_at != state.global_step:
            self._report(args, state)

    def on_abort(self, args: TrainingArguments, state: TrainerState, error: BaseException) -> None:
        """Draw what was logged before `error` ended the run; the custom trainers call this, and raise it afterwards."""
        if not state.log_history or self._drawn_at == state.global_step:
            return
        try:
            self._report(args, state, ended=f"{type(error).__name__}: {error}".removesuffix(": "))
        except BaseException as second:  # who interrupts the drawing shall still be told what ended the run
            logger.warning("the report of the run was not drawn: %s", type(second).__name__)

    def _report(self, args: TrainingArguments, state: TrainerState, ended: str = "") -> None:
        if not state.is_world_process_zero:
            return
        self._drawn_at = state.global_step
        try:
            pictures = self._draw(args, state, ended)
        except Exception as error:  # the model is trained, and must still be saved
            logger.warning("the report of the run was not drawn: %s: %s", type(error).__name__, error)
            return
        for name in args.report_to if isinstance(args.report_to, (list, tuple)) else [args.report_to]:
            if name not in _TRACKERS:
                continue
            try:
                _TRACKERS[name](pictures, args, state)
            except Exception as error:
                logger.warning("the report's pictures are not in %s: %s: %s", name, type(error).__name__, error)

    def _draw(self, args: TrainingArguments, state: TrainerState, ended: str) -> dict[str, tuple[Path, str]]:
        """Write the report; returns path and title of each picture by name."""
        from ..plotting import draw_report

        folder = Path(args.output_dir) / _FOLDER if self.output is None else self.output
        folder.mkdir(parents=True, exist_ok=True)
        state.save_to_json(str(folder / "trainer_state.json"))
        report = draw_report(
            asdict(state),
            folder,
            title=self.title or f"Training run {Path(args.output_dir).resolve().name}",
            loss=self.loss or _described(getattr(args, "loss_function", None)),
            ended=ended,
        )
        logger.info("report of the run: %s", report.html)
        return {path.stem: (path, title) for path, title in zip(report.pictures, report.titles, strict=True)}


def _described(loss: Any) -> str:
    """A config's `loss_function` as text; empty where the config has none."""
    if loss is None or isinstance(loss, str):
        return loss or ""
    return json.dumps(loss, default=str, ensure_ascii=False)


Pictures = Mapping[str, tuple[Path, str]]


def _to_tensorboard(pictures: Pictures, args: TrainingArguments, state: TrainerState) -> None:
    """An event file of its own, beside that of the run, which the Trainer's callback may have closed."""
    from matplotlib.image import imread

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        from tensorboardX import SummaryWriter

    writer = SummaryWriter(log_dir=str(_tensorboard_folder(args)))
    for name, (path, _) in pictures.items():
        writer.add_image(f"report/{name}", imread(path)[..., :3], state.global_step, dataformats="HWC")
    writer.close()


def _tensorboard_folder(args: TrainingArguments) -> Path:
    """Where the Trainer's callback writes: the newest folder of events."""
    given = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if given:
        return Path(given).expanduser()
    runs = Path(args.output_dir) / "runs"
    events = sorted(runs.glob("*/events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    return events[-1].parent if events else runs / _FOLDER


def _to_wandb(pictures: Pictures, args: TrainingArguments, state: TrainerState) -> None:
    import wandb

    if wandb.run is None:
        raise RuntimeError("no run is open")
    images = {f"report/{name}": wandb.Image(str(path), caption=title) for name, (path, title) in pictures.items()}
    wandb.log({**images, "train/global_step": state.global_step})


def _to_trackio(pictures: Pictures, args: TrainingArguments, state: TrainerState) -> None:
    import trackio

    images = {f"report/{name}": trackio.Image(str(path), caption=title) for name, (path, title) in pictures.items()}
    trackio.log({**images, "train/global_step": state.global_step})


_TRACKERS: Mapping[str, Callable[[Pictures, TrainingArguments, TrainerState], None]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "trackio": _to_trackio,
}
