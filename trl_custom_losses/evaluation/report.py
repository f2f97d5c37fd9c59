"""Results as a table for reading and as JSON for keeping."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .figures import Figures

_PACKAGES = ("trl-custom-losses", "trl", "transformers", "peft", "datasets", "evaluate", "torch")


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole path where two end alike."""
    last = [Path(name).name or name for name in names]
    return [name if last.count(short) > 1 else short for name, short in zip(names, last, strict=True)]


def table(figures: Mapping[str, Figures], differences: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown with one row a figure: its value for every model, then differences to the first, "± standard error".

    Args:
        figures: By the models' names, the base first.
        differences: By the trained models' names, as `paired_differences` gives them.
    """
    labels = dict(zip(figures, short_names(list(figures)), strict=True))
    base = next(iter(labels.values()))
    head = ["figure", *labels.values(), *(f"{labels[name]} - {base}" for name in differences)]
    rows = []
    for name in dict.fromkeys(name for found in figures.values() for name in found.values):
        cells = [_cell(found.values.get(name), found.errors.get(name)) for found in figures.values()]
        changes = [found.get(name, {}) for found in differences.values()]
        cells += [_cell(change.get("difference"), change.get("se"), sign="+") for change in changes]
        rows.append([name, *cells])
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _cell(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None or math.isnan(value):
        return ""
    text = f"{value:{sign}.4g}" if abs(value) >= 1000 else f"{value:{sign}.3f}"
    return text if error is None or math.isnan(error) else f"{text} ± {error:.3f}"


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Versions and hardware."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            versions[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    return {"versions": versions, "device": name, "dtype": str(dtype).removeprefix("torch.")}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, null for NaN and infinities; the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(path.suffix + ".partial")
    text = json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
