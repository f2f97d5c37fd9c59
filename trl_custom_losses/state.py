"""State of a loss that moves once per optimizer step: a few numbers, kept exactly and on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import nn


class HostState(nn.Module):
    """A module whose buffers stay on the host in float64, wherever the loss around them is moved.

    What moves once per optimizer step (weights, running means, controllers) is computed from a handful of numbers that
    the host has already; there it is exact, the same on every rank, and costs the device nothing. The buffers are part
    of the loss's `state_dict` and so of the trainer's checkpoints.
    """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        return self
