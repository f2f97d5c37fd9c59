"""A loss taken through optimizer steps as a trainer takes it, without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Loss
from .batches import Data

_LEARNING_RATE = 0.1  # of the loss's own parameters


def take_step(loss: Loss, data: Data, step: int) -> Tensor:
    """One optimizer step of two micro-batches; returns its loss, detached.

    Args:
        loss: Told of the step's begin and end; what it learns is moved down its gradient.
        data: The step's pairs or sequences.
        step: Number of steps done before.
    """
    loss.begin_step(step)
    half = max(data.size // 2, loss.minimum_batch)
    parts = [list(range(half)), list(range(half, data.size))]
    parts = [part for part in parts if len(part) >= loss.minimum_batch]
    total = torch.stack(
        [
            data.take(part).loss(loss, data.denominators(micro_batches=len(parts), share=len(part) / data.size))
            for part in parts
        ]
    ).sum()
    learned = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    if learned:
        gradients = torch.autograd.grad(total, learned, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(learned, gradients, strict=True):
                if gradient is not None:
                    parameter -= _LEARNING_RATE * gradient
    for part in loss.tree():
        observed = part.take_observed()
        part.on_step_end(step, {name: values.to("cpu", torch.float64) for name, values in observed.items()})
    return total.detach()
