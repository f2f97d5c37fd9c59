"""What was not finite in an optimizer step, remembered on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class NonFiniteFlags:
    """Flags of the micro-batches of an optimizer step; nothing waits for the device before `found`."""

    def __init__(self) -> None:
        self._flags: dict[tuple[str, ...], Tensor] = {}

    def look(self, loss: Tensor, metrics: Mapping[str, Any], parts: Mapping[str, Tensor]) -> None:
        """Take in one micro-batch.

        Args:
            loss: With everything added to it.
            metrics: The loss's own; those of components, `<name>_loss`, tell which one it was.
            parts: What the loss was made of, by name.
        """
        watched = {"loss": loss} | {
            name: value for name, value in metrics.items() if name.endswith("_loss") and isinstance(value, Tensor)
        }
        watched |= parts
        # A sum is not finite if any of its terms is not.
        sums = [tensor.detach().sum(dtype=torch.float32).to(loss.device) for tensor in watched.values()]
        flags = ~torch.isfinite(torch.stack(sums))
        names = tuple(watched)
        seen = self._flags.get(names)
        self._flags[names] = flags if seen is None else seen | flags

    def alarm(self) -> Tensor:
        """Whether the loss of any micro-batch was not finite, a scalar on the device."""
        return torch.stack([flags[0] for flags in self._flags.values()]).any()

    def found(self) -> list[str]:
        """What was not finite in micro-batches like one whose loss was not; waits for the device."""
        known = [(names, flags.tolist()) for names, flags in self._flags.items()]
        bad = [zip(names, flags, strict=True) for names, flags in known if flags[0]]
        return [name for pairs in bad for name, flag in pairs if flag]

    def clear(self) -> None:
        """Forget all."""
        self._flags = {}
