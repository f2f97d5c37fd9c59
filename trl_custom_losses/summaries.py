"""Metrics of a micro-batch as sums and counts, which add up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .types import Metric


def summarise(
    metrics: Mapping[str, Tensor | Metric | float], mask: Tensor, where: str
) -> dict[str, tuple[Tensor, Tensor | float, str, str]]:
    """Turn what a loss returned as metrics into sums and counts, without leaving the device.

    Args:
        metrics: Scalars, (N,) per sequence or pair, (N, 1) or (N, T) per token; N rows from the top of `mask`.
        mask: Scored tokens, (rows, T).
        where: The loss's name, for messages.
    """
    summed, tokens = {}, Tokens(mask)
    for name, metric in metrics.items():
        value, per, reduce, counted = metric, "log", "mean", None
        if isinstance(metric, Metric):
            value, reduce, counted = metric.value, metric.reduce, metric.mask
            per = {"mean": metric.per, "exp": "log"}.get(reduce, "micro_batch")
        if not isinstance(value, Tensor):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(
                    f"loss '{where}': metric '{name}' must be a detached tensor, found {type(value).__name__}"
                )
            value = torch.full((), float(value), device=mask.device)
        value = value.detach().float() if not value.dtype.is_floating_point else value.detach()
        summed_as = "mean" if reduce == "exp" else reduce
        what = f"loss '{where}': metric '{name}'"
        summed[name] = (*sum_and_count(value, tokens, summed_as, what, counted), per, reduce)
    return summed


class Tokens:
    """Scored tokens, and what several metrics need of them, computed once.

    Args:
        mask: (rows, T).
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._known: dict[tuple[str, int], Tensor] = {}

    def first(self, what: str, rows: int) -> Tensor:
        """Of the first rows: which positions are "unscored", each row's "lengths", or their sum, "count"."""
        if (what, rows) not in self._known:
            if what == "unscored":
                found = self.mask[:rows] == 0
            else:
                found = self.mask[:rows].sum() if what == "count" else self.mask[:rows].sum(1)
            self._known[what, rows] = found
        return self._known[what, rows]


def sum_and_count(
    value: Tensor, tokens: Tokens, reduce: str, what: str, counted: Tensor | None = None
) -> tuple[Tensor, Tensor | float]:
    """Sum (or extremum) and count of a metric; `what` names it in messages, `counted` is its own mask. See
    `summarise`."""
    if counted is not None:
        if counted.shape != value.shape or value.dim() == 0:
            raise ValueError(f"{what} has shape {tuple(value.shape)} and a mask of shape {tuple(counted.shape)}")
        value, tokens = value.reshape(value.size(0), -1), Tokens(counted.reshape(value.size(0), -1))
    elif value.dim() == 2 and value.size(1) == 1:
        value = value.squeeze(1)
    if value.dim() == 2:
        rows, shape = value.size(0), tuple(tokens.mask.shape)
        if value.size(1) != shape[1] or rows > shape[0]:
            raise ValueError(f"{what} has shape {tuple(value.shape)}, but the batch has {shape} tokens")
        scored = value.masked_fill(tokens.first("unscored", rows), 0)
        if reduce == "mean":
            return scored.sum(), tokens.first("count", rows)
        lengths = tokens.first("lengths", rows)
        means = scored.sum(1) / lengths.clamp(min=1)
        none = torch.inf if reduce == "min" else -torch.inf
        value = means.masked_fill(lengths == 0, none)  # a sequence without tokens has no mean
    if value.dim() > 2:
        raise ValueError(f"{what} must be a scalar, (B,), (B, 1) or (B, T), found {tuple(value.shape)}")
    if reduce == "mean":
        return value.sum(), float(value.numel())
    return (value.amin() if reduce == "min" else value.amax()), 1.0
