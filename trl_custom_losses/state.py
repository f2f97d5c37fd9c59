"""State of a loss that moves once per optimizer step: a few numbers, kept exactly and on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class HostState(nn.Module):
    """A module whose buffers stay on the host in float64, wherever the loss around them is moved.

    What moves once per optimizer step (weights, running means, controllers) is computed from a handful of numbers that
    the host has already; there it is exact, the same on every rank, and costs the device nothing. The buffers are part
    of the loss's `state_dict` and so of the trainer's checkpoints.
    """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        return self


def host(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor on the host, whatever torch's default device is."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def host_zeros(*shape: int) -> Tensor:
    """Zeros in float64 on the host, whatever torch's default device is."""
    return torch.zeros(shape, dtype=torch.float64, device="cpu")
