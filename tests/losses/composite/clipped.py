"""Bounded losses, what they report, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trl_custom_losses import Denominators, Loss, LossFunctionRegistry
from trl_custom_losses.losses.composite import ClippedLoss
from trl_custom_losses.reductions import reduce_loss
from trl_custom_losses.testing import Data

FAMILIES = {"preference": "ipo", "policy": "grpo"}
PER = ["batch", "sequence"]


def build(base: Any, **options: Any) -> ClippedLoss:
    return LossFunctionRegistry.build({"type": "clipped_loss", "base_loss": base, **options})


def run(loss: Loss, data: Data, denominators: Denominators | None = None) -> tuple[Tensor, dict[str, Any]]:
    """The contribution and the metrics."""
    batch, outputs = data.build(loss, denominators)
    raw, metrics = loss(batch, outputs)
    return reduce_loss(loss, raw, batch), metrics


def gradient(loss: Loss, data: Data, denominators: Denominators | None = None, scale: float = 1.0) -> Tensor:
    """Gradient with respect to the log-probabilities of the loss times what a trainer multiplies it by."""
    return torch.autograd.grad(run(loss, data, denominators)[0] * scale, data.rows["logps"])[0]


def gradient_after(loss: Loss, data: Data, made: Data, denominators: Denominators | None = None) -> Tensor:
    """Gradient with respect to the log-probabilities of `data` of the loss on data made from it."""
    return torch.autograd.grad(run(loss, made, denominators)[0], data.rows["logps"])[0]


def rows_of(data: Data, values: Tensor) -> Tensor:
    """One row for each pair (both of its completions) or sequence."""
    return torch.cat(values.chunk(2), dim=1) if data.family == "preference" else values
