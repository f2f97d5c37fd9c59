"""Data-set columns that a loss names, on their way through collators and input dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..base import Loss
from ..errors import LossConfigError
from ..hyperparameters import suggestion

#: Prefix of the loss's data-set columns in TRL's input dicts, so that they never meet a model argument.
COLUMN_PREFIX = "loss_column:"


def check_columns(loss: Loss, dataset: Any, which: str) -> None:
    """Raise if a data set (map-style, iterable or a dict of them) lacks a column that the loss names."""
    if dataset is None or not loss.columns:
        return
    if isinstance(dataset, dict):
        for name, part in dataset.items():
            check_columns(loss, part, f"{which}[{name!r}]")
        return
    names = column_names(dataset)
    for column in loss.columns:
        if column not in names:
            could = any(column in leaf.columns and hasattr(leaf, "scorer") for leaf in loss.leaves())
            raise LossConfigError(
                f"the loss '{loss.name}' needs the column '{column}', which `{which}` lacks"
                f"{suggestion(column, names)}; it has {', '.join(names)}"
                + ("; a `scorer` of the loss could fill it" if could else "")
            )


def column_names(dataset: Any) -> list[str]:
    """Names of a data set's columns; a stream that does not know them is asked for its first example."""
    names = dataset.column_names if isinstance(dataset, Dataset) else getattr(dataset, "column_names", None)
    return list(next(iter(dataset), {})) if names is None else names


def column_values(examples: list[Mapping[str, Any]], column: str) -> Tensor | list[Any]:
    """One column of a list of examples: a tensor if its values are numbers, else the list."""
    values = [example.get(column) for example in examples]
    if any(value is None for value in values):
        raise ValueError(f"the column '{column}' that the loss needs is missing or empty in an example")
    if all(isinstance(value, (bool, int, float)) for value in values):
        return torch.tensor(values, dtype=torch.float32 if any(isinstance(v, float) for v in values) else None)
    return values


class ColumnCollator:
    """A data collator that adds the loss's columns to what another one makes.

    Args:
        collator: The collator of the trainer.
        columns: Names of columns, each carried as a tensor (numbers) or list under a prefixed key.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], columns: tuple[str, ...]) -> None:
        self.collator = collator
        self.columns = columns

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        carried = {COLUMN_PREFIX + column: column_values(examples, column) for column in self.columns}
        batch = self.collator(examples)
        batch.update(carried)
        return batch
