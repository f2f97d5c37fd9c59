"""Several ranks in one process: a thread each, which meet where they reduce or gather."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import Loss
from ..types import Ranks
from .batches import Data
from .check import fail

_Result = TypeVar("_Result")
_PATIENCE = 20.0  # seconds that a rank waits for the others


def on_ranks(count: int, work: Callable[[Ranks], _Result]) -> list[_Result]:
    """Run `work` on every rank, with collectives that meet; returns what each made of it.

    Args:
        count: Number of ranks.
        work: Called with the `Ranks` of one rank.

    Raises:
        CheckFailure: Ranks exchange tensors of different shapes, or some of them exchange nothing: real ones would
            hang.
    """
    barrier: Barrier = Barrier(count)
    parts: list[Tensor | None] = [None] * count

    def meet(rank: int, own: Tensor | None) -> list[Tensor | None]:
        parts[rank] = own
        barrier.wait(_PATIENCE)
        found = list(parts)
        barrier.wait(_PATIENCE)
        return found

    def exchange(rank: int, own: Tensor) -> list[Tensor]:
        found = [part.detach() for part in meet(rank, own) if part is not None]
        if len(found) < count:
            fail("real ranks would hang: not all of them take part in a collective")
        shapes = {tuple(part.shape) for part in found}
        if len(shapes) > 1:
            fail(f"real ranks would hang: they exchange the shapes {sorted(shapes)}")
        return found

    def run(rank: int) -> _Result:
        ranks = Ranks(
            index=rank,
            count=count,
            # As in training, where neither carries a gradient to the other ranks.
            sum=lambda tensor: torch.stack(exchange(rank, tensor)).sum(0),
            gather=lambda tensor: torch.cat(exchange(rank, tensor)),
        )
        try:
            result = work(ranks)
            while any(part is not None for part in meet(rank, None)):  # until all are done, so that others notice
                pass
        except BaseException:
            barrier.abort()
            raise
        return result

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(run, rank) for rank in range(count)]
    failures = [error for future in futures if (error := future.exception()) is not None]
    if failures:  # one rank's failure breaks the others' barrier
        raise next((error for error in failures if not isinstance(error, BrokenBarrierError)), failures[0])
    return [future.result() for future in futures]


def prepared_on_ranks(loss: Loss, data: Data, ranks: int) -> dict[str, Tensor]:
    """What `loss` prepares when `data` is split over `ranks`, put together in their order."""

    def prepare(rank: Ranks) -> dict[str, Tensor]:
        with torch.no_grad():  # of this thread
            return loss.prepare(data.rollout(rank.index, ranks, rank.gather, loss=loss))

    prepared = on_ranks(ranks, prepare)
    names = {name for part in prepared for name in part}
    for name in sorted(names):
        if not all(name in part for part in prepared):
            fail(f"'{name}' is prepared on some of two ranks only")
        for part in prepared:
            if part[name].size(0) != data.size // ranks:
                fail(
                    f"on a rank with {data.size // ranks} completions, '{name}' has the shape "
                    f"{tuple(part[name].shape)}: `tensor[rollout.local]` takes this rank's part of a gathered tensor"
                )
    return {name: torch.cat(_padded_alike([part[name] for part in prepared])) for name in prepared[0]}


def _padded_alike(parts: list[Tensor]) -> list[Tensor]:
    """Tensors of each token, which a rank cuts to its longest completion, filled with 0 to one width."""
    width = max((part.size(1) for part in parts if part.dim() == 2), default=0)
    return [F.pad(part, (0, width - part.size(1))) if part.dim() == 2 else part for part in parts]
