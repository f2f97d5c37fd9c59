"""Finds where a loss makes the host wait for the device, without a device."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Methods and functions whose result needs the values of a tensor.
_WAITING = frozenset(
    {
        "item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "__complex__",
        "__contains__", "__repr__", "__str__", "__format__", "nonzero", "argwhere", "masked_select", "unique",
        "unique_consecutive", "is_nonzero", "equal", "allclose", "bincount", "histc",
    }
)  # fmt: skip

_OWN_FOLDER = os.path.dirname(__file__)
_TORCH_FOLDER = os.path.dirname(torch.__file__)


class HostSync(Exception):
    """A tensor's values are asked for on the host; the message says by what and where."""


class HostSyncDetector(TorchFunctionMode):
    """Raises `HostSync` where values of a tensor that is not on the CPU are asked for.

    Meant for tensors of the meta device, which have no values: whatever needs them, needs to wait for them on a GPU.
    What a loss keeps on the CPU may be read. The first find is kept as `found`, should the loss catch the exception.
    """

    found: HostSync | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        on_device = any(tensor.device.type != "cpu" for tensor in tensors_of(args, kwargs))
        what = what_waits(func, args, kwargs) if on_device else ""
        if what:
            self.found = self.found or HostSync(f"{what} waits for the device (at {_calling_line()})")
            raise self.found
        return func(*args, **kwargs)


def tensors_of(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among a call's arguments."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def what_waits(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> str:
    """What a call waits for if its tensors are on a device, or nothing."""
    name = getattr(func, "__name__", "")
    if name in _WAITING:
        return "printing a tensor" if name in ("__repr__", "__str__", "__format__") else f"`{name}`"
    if name == "to" and any(str(value) == "cpu" for value in (*args[1:], *kwargs.values())):
        return "`to('cpu')`"
    if name == "where" and len(args) + len(kwargs) == 1:
        return "`where` with one argument"
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        # Assigning one number through a mask needs no count of the places.
        number = name == "__setitem__" and (not isinstance(args[2], Tensor) or args[2].dim() == 0)
        if not number and any(isinstance(part, Tensor) and part.dtype is torch.bool for part in index):
            return "indexing with a mask"
    if name == "repeat_interleave" and len(tensors_of(args, kwargs)) > 1 and "output_size" not in kwargs:
        return "`repeat_interleave` by a tensor"
    return ""


def _calling_line() -> str:
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((_OWN_FOLDER, _TORCH_FOLDER)):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "unknown"
