"""Counts collectives and host syncs of a training, by who asks for them, without an accelerator."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import accelerate
import torch
import transformers
import trl
from torch import Tensor
from torch.overrides import TorchFunctionMode

import trl_custom_losses
from trl_custom_losses import Loss
from trl_custom_losses.callbacks.exchange import SumOverRanks
from trl_custom_losses.state import HostState
from trl_custom_losses.testing.host_syncs import tensors_of, what_waits

#: Functions of torch.distributed that start a collective. DDP's reduction of gradients does not pass through them.
_COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce",
    "reduce_scatter_tensor",
    "scatter",
)
#: Folder of each package that may ask.
_PACKAGES = {
    package.__name__: f"{Path(package.__file__).parent}{os.sep}"
    for package in (trl_custom_losses, trl, transformers, accelerate)
}
#: Attribute of tensors that would be in the host's memory.
_ON_HOST = "_benchmark_on_host"
_SKIPPED = (str(Path(torch.__file__).parent), __file__)


class HostSyncCounter(TorchFunctionMode):
    """Counts where the host would wait if the tensors of a training on the CPU were on an accelerator.

    Copies to the device are counted too, where they are not `non_blocking`: `to`, `torch.tensor(..., device=)` and
    `new_tensor` wait. What
    `SumOverRanks`, `cpu()` or `to("cpu")` have brought to the host is in the host's memory: reading it, and what is
    computed from it, waits for nothing more. The waits of `SumOverRanks` for its event are counted as `events`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.events = 0
        self.paused = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        lists = [value for value in (*args, *kwargs.values()) if isinstance(value, (list, tuple))]
        tensors = tensors_of((*args, *(part for parts in lists for part in parts)), kwargs)  # as in `cat`
        # The training's own device is the CPU here; who means the host names it.
        to_host = any(isinstance(value, str) and value == "cpu" for value in (*args[1:], *kwargs.values()))
        to_device = any(isinstance(value, torch.device) for value in (*args[1:], *kwargs.values()))
        if tensors:
            on_host = all(getattr(tensor, _ON_HOST, False) for tensor in tensors) and not to_device
        else:  # made from nothing, where torch's default device is the host
            on_host = not to_device
        what = "" if on_host or self.paused else self._waits(func, args, kwargs, to_host)
        copied = to_device and tensors and all(getattr(tensor, _ON_HOST, False) for tensor in tensors)
        if copied and not kwargs.get("non_blocking") and getattr(func, "__name__", "") == "to":
            what = "`to(device)` from the host"
        if not what:
            result = func(*args, **kwargs)
            return _mark(result, on_host) if on_host or to_device else result
        self.waits[_asked_by(sys._getframe(1)), what] += 1
        result = func(*args, **kwargs)
        if to_device:
            return _mark(result, on_host=False)
        # On an accelerator it would be a copy.
        return _mark(result.clone()) if what in ("`to('cpu')`", "`cpu`") else result

    @staticmethod
    def _waits(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any], to_host: bool) -> str:
        name = getattr(func, "__name__", "")
        if name == "new_tensor" or (name in ("tensor", "as_tensor") and kwargs.get("device") is not None):
            return f"`{name}`"
        what = what_waits(func, args, kwargs) if tensors_of(args, kwargs) else ""
        return "" if what == "`to('cpu')`" and not to_host else what

    @contextmanager
    def counting(self, loss: Loss | None) -> Iterator[None]:
        """Count from here on; what the loss keeps on the host may be read."""
        on_host = SumOverRanks.on_host
        for module in () if loss is None else loss.modules():
            if isinstance(module, HostState):
                _mark(list(module.buffers()))

        def counted(exchange: SumOverRanks) -> Tensor:
            self.events += 1
            self.paused = True
            try:
                values = on_host(exchange).clone()
            finally:
                self.paused = False
            return _mark(values)

        SumOverRanks.on_host = counted
        try:
            with self:
                yield
        finally:
            SumOverRanks.on_host = on_host


class CollectiveCounter:
    """Counts calls of torch.distributed's collectives by the package that makes them, accelerate's by its caller."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count from here on."""
        stock = {name: getattr(torch.distributed, name) for name in _COLLECTIVES}

        def counted(name: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.calls[_asked_by(sys._getframe(1), pass_over=("accelerate",)), name] += 1
                return stock[name](*args, **kwargs)

            return call

        for name in stock:
            setattr(torch.distributed, name, counted(name))
        try:
            yield
        finally:
            for name, function in stock.items():
                setattr(torch.distributed, name, function)


def _mark(result: Any, on_host: bool = True) -> Any:
    for tensor in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(tensor, Tensor):
            setattr(tensor, _ON_HOST, on_host)
    return result


def _asked_by(frame: FrameType | None, pass_over: tuple[str, ...] = ()) -> str:
    """The package of the innermost caller that is none of torch's and none to pass over."""
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_SKIPPED):
            for package, folder in _PACKAGES.items():
                if name.startswith(folder) and package not in pass_over:
                    return package
        frame = frame.f_back
    return "other"
