"""What the metrics share: reading inputs, and standard errors of means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def finite(values: Sequence[float | None], name: str) -> np.ndarray:
    """The values as a vector of doubles.

    Raises:
        ValueError: There are none, or one of them is missing, NaN or infinite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError(f"`{name}` is empty; at least one value is needed")
    wrong = np.flatnonzero(~np.isfinite(array))
    if wrong.size:
        raise ValueError(
            f"`{name}` must be finite numbers; {wrong.size} of {array.size} are not, the first is {array[wrong[0]]} at "
            f"position {wrong[0]}"
        )
    return array


def check_entries(values: Sequence[Any], types: type | tuple[type, ...], name: str, *, nested: bool = True) -> None:
    """Check what `evaluate` would convert without a word (5 to "5", a list to its text) or refuse with a strange one.

    Args:
        values: The entries of a metric's input.
        types: What an entry may be; all of the same one.
        name: What the values are called in a message.
        nested: Whether the entries may be lists of such values instead.

    Raises:
        ValueError: There are none, or they are something else, or mixed.
    """
    if not len(values):
        raise ValueError(f"`{name}` is empty; at least one value is needed")
    lists = [isinstance(value, list | tuple | np.ndarray) for value in values]
    if any(lists) and not (nested and all(lists)):
        raise ValueError(f"`{name}` must be a flat list{' or a list of lists, not a mixture' if nested else ''}")
    entries = [entry for value in values for entry in value] if any(lists) else values
    wanted = types if isinstance(types, tuple) else (types,)
    if not any(all(isinstance(entry, type_) for entry in entries) for type_ in wanted):
        found = sorted({type(entry).__name__ for entry in entries})
        kinds = " or all ".join({"str": "texts", "Real": "numbers"}[type_.__name__] for type_ in wanted)
        raise ValueError(f"`{name}` must be all {kinds}; found {', '.join(found)}")


def whole_number(value: Any, name: str, least: int) -> int:
    """The value, if it is a whole number of at least `least`.

    Raises:
        ValueError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, not {value!r}")
    return int(value)


def grouped(values: Sequence[Any], groups: Sequence[Any] | None, name: str) -> list[list[Any]]:
    """Values by prompt: a list of lists as it is, or a flat list split by `groups`.

    Args:
        values: One list a prompt, or one value a completion.
        groups: With a flat list, the prompt that each value belongs to (anything hashable); None with a list of lists.
        name: What the values are called in a message.

    Returns:
        One list a prompt; with `groups` in the order in which the prompts first come.

    Raises:
        ValueError: There are no values, a prompt has none, or `groups` is missing, not wanted or of another length.
    """
    if not len(values):
        raise ValueError(f"`{name}` is empty; at least one value is needed")
    if isinstance(values[0], list):
        if groups is not None:
            raise ValueError(f"`groups` goes with a flat list; `{name}` is grouped already")
        empty = [index for index, group in enumerate(values) if not group]
        if empty:
            raise ValueError(f"`{name}` has a prompt without values, at position {empty[0]}")
        return list(values)
    if groups is None:
        raise ValueError(f"`{name}` is a flat list, so `groups` must say which prompt each value belongs to")
    if len(groups) != len(values):
        raise ValueError(f"`groups` has {len(groups)} entries, `{name}` has {len(values)}; they must be as many")
    found: dict[Any, list[Any]] = {}
    for group, value in zip(groups, values, strict=True):
        found.setdefault(group, []).append(value)
    return list(found.values())


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values, sqrt(sum (x - mean)^2 / (n (n - 1))); NaN for one value."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def clustered_error(groups: Sequence[np.ndarray]) -> float:
    """Standard error of the mean over all values, where values of the same group are not independent.

        se = sqrt(G / (G - 1) sum_g (sum_{i in g} (x_i - mean))^2) / n,  G groups, n values

    For groups of equal size this is the standard error of the mean of the groups' means. Miller 2024 (arXiv:2411.00640)
    gives it without the factor G / (G - 1), which corrects the bias for few groups. NaN for one group.
    """
    if len(groups) < 2:
        return float("nan")
    values = np.concatenate(groups)
    sums = np.array([np.sum(group - values.mean()) for group in groups])
    return float(np.sqrt(len(groups) / (len(groups) - 1) * np.sum(sums**2)) / len(values))
