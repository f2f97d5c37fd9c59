"""The report of a run as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .history import NOTHING, History
from .picture import Picture

_TEMPLATE = "report.html.j2"
_NONE = "-"
#: Units of metrics by name, or by the part behind a slash; with a slash at the end, by their beginning.
_UNITS = {
    "entropy": "nats per token",
    "kl": "nats per token",
    "logps/": "nats",
    "rewards/margins": "beta x nats",
    "rewards/margins/": "beta x nats",
    "rewards/chosen": "beta x nats",
    "rewards/rejected": "beta x nats",
    "rewards/accuracies": "share",
    "mean_token_accuracy": "share",
    "frac_reward_zero_std": "share",
    "clipped_sequences": "share",
    "clip_fraction": "share",
    "clipped_ratio": "share",
    "clip_ratio/": "share",
    "max_length": "tokens",
    "mean_length": "tokens",
    "min_length": "tokens",
    "max_terminated_length": "tokens",
    "mean_terminated_length": "tokens",
    "min_terminated_length": "tokens",
    "num_tokens": "tokens",
    "step_time": "seconds",
    "grad_cosine/": "cosine",
    "grad_norm/": "loss per nat",
    "grad_norm_weighted/": "loss per nat",
    "beta": "per nat",
    "adaptive_beta": "per nat",
    "adaptive_margin": "nats",
    "adaptive_kl": "nats per completion",
}


def render(
    path: Path,
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    pictures: Sequence[tuple[Picture, Path]],
    history: History,
) -> Path:
    """Write the report; returns its path. Every text in it is escaped, and scripts and requests are forbidden.

    Args:
        path: Of the HTML file.
        title: Of the page.
        facts: Of the run, name and value.
        pictures: With their PNG files, which are embedded.
        history: For the table of values.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    content = environment.get_template(_TEMPLATE).render(
        title=title,
        facts=facts,
        pictures=[_embedded(picture, file) for picture, file in pictures],
        rows=_rows(history),
        not_finite=sorted(history.not_finite.items()),
    )
    path.write_text(content, encoding="utf-8", errors="replace")
    return path


def _embedded(picture: Picture, file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))  # where a PNG has its size
    return {
        "name": picture.name,
        "title": picture.title,
        "caption": picture.caption,
        "data": base64.b64encode(data).decode("ascii"),
        "width": width,
        "height": height,
    }


def _rows(history: History) -> list[dict[str, str]]:
    """One row for each metric: the first, last and extreme values of training, and the last of evaluations."""
    names = dict.fromkeys([*sorted(history.train), *sorted(n for s in history.evaluations.values() for n in s)])
    rows = []
    for name in names:
        series = history.train.get(name, NOTHING)
        finite = series.values[np.isfinite(series.values)]
        ends = (finite[0], finite[-1], finite.min(), finite.max()) if finite.size else (math.nan,) * 4
        evaluated = history.evaluated(name)
        rows.append(
            {
                "name": name,
                "unit": unit_of(name),
                **{key: number(end) for key, end in zip(("first", "last", "lowest", "highest"), ends, strict=True)},
                "logged": str(series.values.size),
                "evaluation": ", ".join(
                    f"{number(found.last)}{f' ({dataset})' if dataset else ''}" for dataset, found in evaluated.items()
                )
                or _NONE,
            }
        )
    return rows


def number(value: float) -> str:
    """A number for a table; a dash for none."""
    return _NONE if not math.isfinite(value) else f"{value:.4g}"


def unit_of(name: str) -> str:
    """The unit of a metric, empty where it has none or is not known."""
    return next(
        (
            unit
            for part, unit in _UNITS.items()
            if name == part or (f"/{part}" in f"/{name}" if part.endswith("/") else name.endswith(f"/{part}"))
        ),
        "",
    )


def run_facts(state: Mapping[str, Any], history: History, loss: str, source: str) -> list[tuple[str, str]]:
    """What the report's head says of a run.

    Args:
        state: Fields of a Trainer's state.
        history: Its log.
        loss: Description of the loss, if known.
        source: Where the log was read.
    """
    done = state.get("global_step") or history.last_step
    planned = state.get("max_steps")
    facts = [("Loss", loss)] if loss else []
    facts.append(("Optimizer steps", f"{done}" + (f" of {planned}" if planned and planned != done else "")))
    epoch = state.get("epoch")
    if isinstance(epoch, (int, float)):
        facts.append(("Epochs", f"{epoch:.4g}"))
    if state.get("train_batch_size"):
        facts.append(("Batch size per device", f"{state['train_batch_size']}"))
    if math.isfinite(history.once.get("train_runtime", math.nan)):
        facts.append(("Training time", _duration(history.once["train_runtime"])))
    if math.isfinite(history.once.get("train_loss", math.nan)):
        facts.append(("Mean loss over the run", number(history.once["train_loss"])))
    if state.get("best_model_checkpoint"):
        best = f"{Path(str(state['best_model_checkpoint'])).name}, with {state.get('best_metric')}"
        facts.append(("Best checkpoint", best))
    if source:
        facts.append(("Log", source))
    return facts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"
