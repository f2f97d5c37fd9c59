"""A small sum over ranks that reaches the host while the device goes on."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor


class SumOverRanks:
    """Begins to sum a tensor over ranks, and to bring the sum to the host; `on_host` waits for it.

    Between the two, the device and the other ranks have something to do: begun before the last backward pass of an
    optimizer step and read before the optimizer moves, the sum keeps nobody waiting. On CUDA it has a stream of its
    own, so that backward does not wait for the other ranks either, and the host waits for an event at the end of that
    stream, not for what was launched meanwhile.

    Args:
        values: Of any shape, of the same on all ranks; not to be used afterwards.
        accelerator: Of the trainer.
    """

    def __init__(self, values: Tensor, accelerator: Accelerator) -> None:
        self._event: torch.cuda.Event | None = None
        self._work: torch.distributed.Work | None = None
        if values.device.type != "cuda":
            self._sum, self._work = _begin(values, accelerator)
            return
        stream = torch.cuda.Stream(values.device)
        stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(stream):
            summed, work = _begin(values, accelerator)
            if work is not None:
                work.wait()  # the stream waits, not the host
            host = torch.empty(summed.shape, dtype=summed.dtype, device="cpu", pin_memory=True)
            self._sum = host.copy_(summed, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(stream)
        values.record_stream(stream)  # its memory is not to be given away before

    def on_host(self) -> Tensor:
        """The sum, float64."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._sum.to("cpu", torch.float64)


def _begin(values: Tensor, accelerator: Accelerator) -> tuple[Tensor, torch.distributed.Work | None]:
    """The tensor that will hold the sum, and what to wait for first, if anything."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return values, torch.distributed.all_reduce(values, async_op=True)
    return accelerator.reduce(values, "sum"), None
