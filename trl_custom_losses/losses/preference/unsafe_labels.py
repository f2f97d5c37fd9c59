"""Which completions are unsafe: the columns that safety losses read, and their one convention, 1 = unsafe."""

from __future__ import annotations

import torch
from torch import Tensor

from ...types import PreferenceBatch

#: Of the chosen and the rejected completion: 0 = safe, 1 = unsafe, or the probability of it.
UNSAFE_COLUMNS = ("chosen_unsafe", "rejected_unsafe")

#: Pairs to show such a loss with: each case once, the usual one first, and one of probabilities.
UNSAFE_EXAMPLES = {"chosen_unsafe": (0.0, 1.0, 0.0, 1.0, 0.3), "rejected_unsafe": (1.0, 0.0, 0.0, 1.0, 0.6)}


def unsafe_labels(batch: PreferenceBatch, like: Tensor) -> tuple[Tensor, Tensor]:
    """How unsafe the chosen and the rejected completions are, 0 to 1, each (B,).

    A label outside of 0..1 becomes NaN, and with it the loss: looking at the values here would make the host wait for
    the device, but the trainer stops on a loss that is not finite before the model moves.

    Args:
        batch: With the columns of `UNSAFE_COLUMNS`.
        like: Gives dtype and device.

    Raises:
        TypeError: The columns do not hold numbers.
    """
    chosen, rejected = (_label(batch, column, like) for column in UNSAFE_COLUMNS)
    return chosen, rejected


def unsafe_indicators(batch: PreferenceBatch, like: Tensor) -> tuple[Tensor, Tensor]:
    """`unsafe_labels` as 0 or 1: a completion is unsafe from a label of 0.5 on."""
    chosen, rejected = (
        torch.where(label.isnan(), label, (label >= 0.5).to(label.dtype)) for label in unsafe_labels(batch, like)
    )
    return chosen, rejected


def _label(batch: PreferenceBatch, column: str, like: Tensor) -> Tensor:
    values = batch[column]
    if not isinstance(values, Tensor):
        raise TypeError(f"the column '{column}' holds numbers from 0 (safe) to 1 (unsafe), found {values[:4]!r}")
    values = values.to(device=like.device, dtype=like.dtype)
    return values.masked_fill((values < 0) | (values > 1), torch.nan)
