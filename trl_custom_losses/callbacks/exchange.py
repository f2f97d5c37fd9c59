"""A small sum over ranks that reaches the host while the device goes on."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor


class SumOverRanks:
    """Begins to sum a tensor over ranks, and to bring the sum to the host; `on_host` waits for it.

    Between the two, the device and the other ranks have something to do: begun before the last backward pass of an
    optimizer step and read before the optimizer moves, the sum keeps nobody waiting. On CUDA the host waits for an
    event recorded here, not for what was launched after it.

    Args:
        values: Of any shape, of the same on all ranks; not to be used afterwards.
        accelerator: Of the trainer.
    """

    def __init__(self, values: Tensor, accelerator: Accelerator) -> None:
        self._event: torch.cuda.Event | None = None
        self._work = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._work = torch.distributed.all_reduce(values, async_op=True)
            self._sum = values
        else:
            self._sum = accelerator.reduce(values, "sum")
        if values.device.type == "cuda":
            if self._work is not None:
                self._work.wait()  # the stream waits, not the host
                self._work = None
            host = torch.empty_like(values, device="cpu", pin_memory=True)
            self._sum = host.copy_(self._sum, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def on_host(self) -> Tensor:
        """The sum, float64."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._sum.to("cpu", torch.float64)
