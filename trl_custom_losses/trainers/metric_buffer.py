"""Metrics stay on the device and are reduced over ranks at once when something logs."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Micro-batches that are kept apart before `compact` folds them into running sums.
_MOST_ROWS = 1024

#: Numbers that ranks exchange at once, their header included; what is more goes in a second exchange.
_FIRST_EXCHANGE = 4096


class _Key(NamedTuple):
    name: str
    per: str
    reduce: str


class _Row(NamedTuple):
    """One micro-batch: for each key a sum and a count, as they came.

    Numbers that the host knows stay there until something logs: a copy to the device would make the host wait.
    """

    keys: tuple[_Key, ...]
    tensors: Tensor  # those that are tensors, 1-d, on the device
    numbers: tuple[float, ...]  # the others
    order: tuple[int, ...]  # position of each of the former, then of the latter, in key order


class MetricBuffer:
    """Collects (sum, count) pairs of metrics, micro-batch by micro-batch.

    A metric averaged per "log" is the total sum over the total count since the last log. One per "micro_batch" is
    the mean over micro-batches of each one's sum over count, both taken over all ranks: the value TRL logs. "min" and
    "max" per "micro_batch" are taken over all ranks' sequences of a micro-batch and then averaged over micro-batches;
    per "log" they are those of everything since the last log. "exp" is the exponential of what is averaged per "log".

    Args:
        device: Where the metrics are kept.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        # Token counts outgrow float32, which is all that mps has.
        self._dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self._rows: list[_Row] = []
        self._totals: dict[str, list[float]] = {}  # name -> sum, count
        self._exponentials: set[str] = set()  # names of `_totals`
        self._means: dict[str, list[float]] = {}  # name -> sum of micro-batches' values, their number
        self._extrema: dict[str, float] = {}  # name -> lowest or highest value since the last log

    def __bool__(self) -> bool:
        return bool(self._rows or self._totals or self._means or self._extrema)

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor | float, str, str]]) -> None:
        """Add one micro-batch.

        Args:
            metrics: Name -> (sum or extremum, count, per, reduce), scalars.
        """
        if not metrics:
            return
        keys = tuple(_Key(name, per, reduce) for name, (_, _, per, reduce) in sorted(metrics.items()))
        flat = [part for key in keys for part in metrics[key.name][:2]]
        kinds: dict[torch.dtype, list[int]] = {}  # tensors of a kind are stacked without converting each
        for index, part in enumerate(flat):
            if isinstance(part, Tensor):
                kinds.setdefault(part.dtype, []).append(index)
        known = [index for index, part in enumerate(flat) if not isinstance(part, Tensor)]
        with torch.no_grad():
            stacked = [self._stack([flat[index] for index in indices]) for indices in kinds.values()]
            tensors = torch.cat(stacked) if stacked else torch.empty(0, device=self._device, dtype=self._dtype)
        order = (*(index for indices in kinds.values() for index in indices), *known)
        self._rows.append(_Row(keys, tensors, tuple(float(flat[index]) for index in known), order))

    def _stack(self, scalars: Sequence[Tensor]) -> Tensor:
        return torch.stack([value.reshape(()).to(self._device) for value in scalars]).to(self._dtype)

    def compact(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Reduce early if much has been collected, so that a run that never logs does not grow. Every rank calls it."""
        if len(self._rows) >= _MOST_ROWS:
            self._merge(gather)

    def reduce(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Reduce everything collected, over ranks, and start anew. Every rank must call it.

        Args:
            gather: Concatenates a 1-d tensor over ranks.

        Raises:
            RuntimeError: The ranks collected different metrics.
        """
        self._merge(gather)
        result = {name: total / count for name, (total, count) in self._totals.items() if count}
        result |= {name: _exp(result[name]) for name in self._exponentials & result.keys()}
        result |= {name: total / count if count else math.nan for name, (total, count) in self._means.items()}
        result |= self._extrema
        self._totals, self._means, self._exponentials, self._extrema = {}, {}, set(), {}
        return result

    def _merge(self, gather: Callable[[Tensor], Tensor]) -> None:
        rows, self._rows = self._rows, []
        if not rows:
            return
        layouts = [row.keys for row in rows]
        checksum = float(zlib.crc32(repr(layouts).encode()) % 2**24)
        header, values = self._in_order(rows, checksum)
        # Ranks first agree on what they exchange: a collective of unequal sizes would crash or hang. So the first one,
        # mostly the only one, has the same size everywhere.
        at_once = min(values.numel(), _FIRST_EXCHANGE - 2)
        padding = values.new_zeros(_FIRST_EXCHANGE - 2 - at_once)
        received = gather(torch.cat((header, values[:at_once], padding))).reshape(-1, _FIRST_EXCHANGE).cpu()
        headers = received[:, :2]
        if (headers != headers[0]).any():
            names = sorted({key.name for keys in layouts for key in keys})
            raise RuntimeError(
                "ranks logged different metrics; a loss must return the same metric names on every rank and "
                f"micro-batch. This rank: {names}"
            )
        received = received[:, 2 : 2 + at_once]
        if at_once < values.numel():
            rest = gather(values[at_once:]).reshape(received.size(0), -1).cpu()
            received = torch.cat((received, rest), dim=1)
        self._combine(layouts, received)

    def _in_order(self, rows: Sequence[_Row], checksum: float) -> tuple[Tensor, Tensor]:
        """The checksum and the number of values; sums and counts of all rows in the order of their keys; both 1-d."""
        numbers = [number for row in rows for number in row.numbers]
        tensors = sum(row.tensors.numel() for row in rows)
        places = [0] * (tensors + len(numbers))
        of_tensor, of_number, start = 0, tensors, 0
        for row in rows:
            here = row.tensors.numel()
            for index, place in enumerate(row.order):
                places[start + place] = of_tensor + index if index < here else of_number + index - here
            of_tensor, of_number, start = of_tensor + here, of_number + len(row.numbers), start + len(row.order)
        # All that the host knows goes to the device in one copy, which it waits for.
        known = torch.tensor([checksum, len(places), *numbers, *places], dtype=self._dtype).to(self._device)
        header, numbers_there, places_there = known.split([2, len(numbers), len(places)])
        return header, torch.cat([*(row.tensors for row in rows), numbers_there])[places_there.long()]

    def _combine(self, layouts: list[tuple[_Key, ...]], gathered: Tensor) -> None:
        """Fold what was gathered, (ranks, 2 x metrics of all micro-batches), into the running sums."""
        position = 0
        for keys in layouts:
            block = gathered[:, position : position + 2 * len(keys)].reshape(gathered.size(0), len(keys), 2)
            position += 2 * len(keys)
            summed = block.sum(0).tolist()
            lowest, highest = block[..., 0].amin(0).tolist(), block[..., 0].amax(0).tolist()
            for index, key in enumerate(keys):
                total, count = summed[index]
                extremum = lowest[index] if key.reduce == "min" else highest[index]
                if key.per == "log" and key.reduce in ("min", "max"):
                    self._extrema[key.name] = _further(key.reduce, self._extrema.get(key.name), extremum)
                    continue
                if key.per == "log":
                    running = self._totals.setdefault(key.name, [0.0, 0.0])
                    running[0] += total
                    running[1] += count
                    if key.reduce == "exp":
                        self._exponentials.add(key.name)
                    continue
                running = self._means.setdefault(key.name, [0.0, 0])
                value = extremum if key.reduce != "mean" else total / count if count else 0.0
                if math.isfinite(value) or key.reduce == "mean":  # an extremum over no sequence is infinite
                    running[0] += value
                    running[1] += 1


def _further(reduce: str, so_far: float | None, value: float) -> float:
    """The lower or the higher of two values; NaN if either is."""
    if so_far is None or math.isnan(value):  # Python's own `min` and `max` keep a NaN only if it comes first
        return value
    return (min if reduce == "min" else max)(so_far, value)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
