"""What a run logged, as series over the optimizer steps."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LossConfigError

logger = logging.getLogger(__name__)

#: Where the report's folder is, inside of the run's.
REPORT_FOLDER = "report"
STATE_FILE = "trainer_state.json"

#: Logged once at the end, or of no interest over steps.
_ONCE = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
_EVALUATION_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
_POSITION = ("step", "epoch")
#: Larger values count as not finite: sums and axes of them would overflow. Larger steps are none.
_LARGEST, _LARGEST_STEP = 1e100, 1e15


@dataclass(frozen=True)
class Series:
    """Values of one metric.

    Args:
        steps: Optimizer steps done when it was logged, rising, (n,).
        values: (n,); NaN where what was logged is not finite, or beyond 1e100.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        """The last value that is finite; NaN if none is."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if finite.size else math.nan

    @property
    def drawable(self) -> bool:
        """Whether there is a finite value."""
        return bool(np.isfinite(self.values).any())

    def at(self, steps: np.ndarray) -> np.ndarray:
        """Values at `steps`, NaN where it was not logged."""
        if not self.steps.size:
            return np.full(steps.size, math.nan)
        place = np.searchsorted(self.steps, steps).clip(max=self.steps.size - 1)
        return np.where(self.steps[place] == steps, self.values[place], math.nan)


#: Of a metric that was not logged.
NOTHING = Series(np.array([]), np.array([]))


@dataclass(frozen=True)
class History:
    """A run's log.

    Args:
        train: Series of what training logged, by name.
        evaluations: The same of evaluations, without the prefix "eval_", by data set ("" if there is one only).
        once: What was logged once at the end, such as the run time.
        not_finite: Number of NaN, infinite and enormous values by name, as logged.
    """

    train: Mapping[str, Series]
    evaluations: Mapping[str, Mapping[str, Series]] = field(default_factory=dict)
    once: Mapping[str, float] = field(default_factory=dict)
    not_finite: Mapping[str, int] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """The last step at which something was logged; 0 if nothing was."""
        groups = (self.train, *self.evaluations.values())
        return max((int(series.steps[-1]) for group in groups for series in group.values()), default=0)

    def evaluated(self, name: str) -> dict[str, Series]:
        """The series of a metric in evaluations, by data set."""
        found = {dataset: series[name] for dataset, series in self.evaluations.items() if name in series}
        return {dataset: series for dataset, series in found.items() if series.drawable}

    @classmethod
    def from_log(cls, entries: Iterable[Mapping[str, Any]]) -> History:
        """Read a Trainer's `log_history`; entries may have different keys, and what is no number is left out."""
        points: dict[str, dict[float, float]] = {}
        once: dict[str, float] = {}
        not_finite: dict[str, int] = {}
        for entry in entries:
            step = _number(entry.get("step")) if isinstance(entry, Mapping) else None
            if step is None or not abs(step) <= _LARGEST_STEP:
                continue
            for name, logged in entry.items():
                value = _number(logged)
                if value is None or name in _POSITION:
                    continue
                if not abs(value) <= _LARGEST:
                    not_finite[name] = not_finite.get(name, 0) + 1
                    value = math.nan
                if name in _ONCE:
                    once[name] = value
                else:  # a step logged twice, as after a resumed evaluation, has its last value
                    points.setdefault(name, {})[step] = value
        series = {name: _series(values) for name, values in points.items()}
        train = {name: values for name, values in series.items() if not name.startswith("eval_")}
        return cls(train, _by_dataset(series, train), once, not_finite)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _series(points: Mapping[float, float]) -> Series:
    steps = sorted(points)
    return Series(np.array(steps), np.array([points[step] for step in steps]))


def _by_dataset(series: Mapping[str, Series], train: Mapping[str, Series]) -> dict[str, dict[str, Series]]:
    """Evaluations by data set; with several, the Trainer logs `eval_<dataset>_<metric>`."""
    found: dict[str, dict[str, Series]] = {}
    for name, values in series.items():
        if name in train:
            continue
        metric, dataset = name.removeprefix("eval_"), ""
        if metric not in train:
            known = (*train, *_EVALUATION_SPEED)
            longest = max((other for other in known if metric.endswith(f"_{other}")), key=len, default="")
            if longest:
                metric, dataset = longest, metric.removesuffix(f"_{longest}")
        if metric not in _EVALUATION_SPEED:
            found.setdefault(dataset, {})[metric] = values
    return found


def read_state(run_dir: str | Path) -> tuple[dict[str, Any], Path]:
    """The newest `trainer_state.json` of a run's folder that can be read, and where it was; a warning names the others.

    Raises:
        LossConfigError: There is none, or none can be read; the message says where was looked.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise LossConfigError(
            f"a run's folder was needed, found {'a file' if folder.exists() else 'nothing'}: {folder}"
        )
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _checkpoint(path))]
    places = [path / STATE_FILE for _, path in sorted(numbered, reverse=True)]
    places += [folder / STATE_FILE, folder / REPORT_FOLDER / STATE_FILE]
    candidates = [path for path in places if path.is_file()]
    if not candidates:
        raise LossConfigError(
            f"there is no log of a run in {folder}: looked for checkpoint-*/{STATE_FILE}, {STATE_FILE} and "
            f"{REPORT_FOLDER}/{STATE_FILE}. A run that saves nothing has one if it is trained with "
            "`callbacks=[RunReportCallback()]`, or calls `trainer.save_state()` at its end"
        )
    states, problems = [], []
    for path in candidates:
        if states and _checkpoint(path.parent):
            continue  # older than the one that was read
        try:
            states.append((_read(path), path))
        except LossConfigError as error:
            problems.append(str(error))
    if not states:
        raise LossConfigError("; ".join(problems))
    for problem in problems:
        logger.warning("%s; the log is read from another file", problem)
    # A finished run's own file goes on after its last checkpoint.
    return max(states, key=lambda found: (_number(found[0].get("global_step")) or 0, len(found[0]["log_history"])))


def _checkpoint(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name) if (path / STATE_FILE).is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LossConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise LossConfigError(f"{path} is no Trainer's state: a list 'log_history' was needed")
    return state
