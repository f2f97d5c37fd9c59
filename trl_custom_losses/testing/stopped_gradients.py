"""Holds what a computation detaches at the values that it had, so that the rest can be differentiated numerically."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.autograd.function
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .check import fail

_AUTOGRAD_FUNCTION = torch.autograd.function.__file__
_DETACHING = frozenset({Tensor.detach, torch.detach, Tensor.data.__get__})


class HeldConstants(TorchFunctionMode):
    """Records the results of `detach` and of all that runs under `no_grad`; from its second use on, hands these out.

    A gradient that is stopped on purpose is the derivative of the loss with these held where they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tape: list[Any] = []
        self._recorded = False
        self._replay: Iterator[Any] = iter(())

    def __enter__(self) -> HeldConstants:
        self._replay = iter(self._tape)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._recorded = True
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        detaches = func in _DETACHING or (not torch.is_grad_enabled() and not _within_autograd_function())
        if not isinstance(result, Tensor) or not detaches:
            return result
        if not self._recorded:
            self._tape.append(result.detach().clone())
            return result
        held = next(self._replay, None)
        if held is None or held.shape != result.shape or held.dtype is not result.dtype:
            fail("the loss takes another way through its code at inputs next to each other")
        return held


def _within_autograd_function() -> bool:
    """Whether this is the forward pass of a `torch.autograd.Function`, which runs without gradient but has one."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename == _AUTOGRAD_FUNCTION:
            return True
        frame = frame.f_back
    return False
