"""The checks by name, and how they say what is wrong."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from .subject import Subject


class CheckFailure(AssertionError):
    """What a check found; the message says what is wrong and by how much."""


@dataclass(frozen=True)
class Check:
    """Something that holds for every loss.

    Args:
        name: Of the check.
        description: What holds.
        usual_cause: Why it often does not, and what to do.
        run: Raises `CheckFailure` if it does not hold for a loss; may return a note on what does not apply to it.
        first: Whether the checks after it mean nothing for a loss that fails it.
    """

    name: str
    description: str
    usual_cause: str
    run: Callable[[Subject], str | None]
    first: bool = False


#: All checks, in the order in which they run.
CHECKS: dict[str, Check] = {}


def check(*, usual_cause: str, first: bool = False) -> Callable[[Callable[[Subject], str | None]], Check]:
    """Decorator that makes a check of a function and adds it to `CHECKS`, under the function's name; its docstring
    says what holds for a loss that passes.

    Args:
        usual_cause: Why it often does not, and what to do.
        first: Whether a loss that fails it is not checked further.
    """

    def decorator(run: Callable[[Subject], str | None]) -> Check:
        made = Check(run.__name__, " ".join((run.__doc__ or "").split()), usual_cause, run, first)
        if made.name in CHECKS:
            raise ValueError(f"there are two checks named '{made.name}'")
        CHECKS[made.name] = made
        return made

    return decorator


def fail(message: str) -> NoReturn:
    """Say what is wrong, and by how much."""
    raise CheckFailure(message)


_NOT_THE_LOSS = re.compile(r"[/\\](torch[/\\]|trl_custom_losses[/\\](testing|types|fields\.py|reductions\.py))")


def describe(error: BaseException) -> str:
    """What a loss raised, and on which line of its own."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if not _NOT_THE_LOSS.search(frame.filename)), frames[-1])
    text = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    return f"the loss raises {what} (at {frame.filename}:{frame.lineno}: {frame.line})"


def require_finite(value: Tensor, what: str) -> None:
    """Fail if a tensor holds NaN or infinity."""
    bad = ~value.detach().isfinite()
    if bad.any():
        where = bad.nonzero()[0].tolist()
        found = value.detach()[tuple(where)].item()
        fail(f"{what}{where if where else ''} is {found}; {int(bad.sum())} of {bad.numel()} values are not finite")


def require_equal(
    found: Tensor, expected: Tensor, what: str, *, versus: str, relative: float = 1e-6, absolute: float = 1e-8
) -> None:
    """Fail if two tensors differ by more than `relative` times the expected value plus `absolute`.

    Args:
        found: What is checked.
        expected: What it is compared with.
        what: Name of `found`.
        versus: Name of `expected`.
        relative: Tolerance; 0, together with `absolute=0`, for equality to the last bit.
        absolute: Tolerance.
    """
    found, expected = found.detach(), expected.detach()
    if found.shape != expected.shape:
        fail(f"{what} has the shape {tuple(found.shape)}, {versus} {tuple(expected.shape)}")
    same = (found == expected) | (found.isnan() & expected.isnan())  # that they are NaN is another check's matter
    difference = (found.double() - expected.double()).abs().masked_fill(same, 0)
    wrong = ~same & ~(difference <= absolute + relative * expected.double().abs())  # one NaN is wrong
    if not wrong.any():
        return
    worst = difference.masked_fill(~wrong, -1).nan_to_num(torch.inf).argmax()
    where = [int(index) for index in torch.unravel_index(worst, found.shape)] if found.dim() else []
    position = f", at [{', '.join(map(str, where))}]," if where else ""
    ours, theirs = found.flatten()[worst].item(), expected.flatten()[worst].item()
    gap = abs(ours - theirs)
    share = f", {100 * gap / abs(theirs):.3g} %" if theirs else ""
    size = f" (off by {gap:.3g}{share})" if math.isfinite(gap) else ""
    fail(f"{what.rstrip(',') if position else what}{position} is {ours:.8g}, but {versus} {theirs:.8g}{size}")
