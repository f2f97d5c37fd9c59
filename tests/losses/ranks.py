"""Several ranks in one process: a thread each, which meet where they gather."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import Tensor

from trl_custom_losses import Loss

from .factories import Data


def prepared_on_ranks(loss: Loss, data: Data, ranks: int) -> dict[str, Tensor]:
    """What `loss` prepares when `data` is split over `ranks`, put together in their order."""
    barrier, parts = Barrier(ranks, timeout=30), [torch.empty(0)] * ranks

    def gather_on(rank: int) -> Callable[[Tensor], Tensor]:
        def gather(tensor: Tensor) -> Tensor:
            parts[rank] = tensor
            barrier.wait()
            shapes = {part.shape for part in parts}
            assert len(shapes) == 1, f"real ranks would hang: they gather the shapes {shapes}"
            gathered = torch.cat(parts)
            barrier.wait()
            return gathered

        return gather

    def prepare(rank: int) -> dict[str, Tensor]:
        with torch.no_grad():  # of this thread
            return loss.prepare(data.rollout(rank, ranks, gather_on(rank)))

    with ThreadPoolExecutor(ranks) as pool:
        prepared = list(pool.map(prepare, range(ranks)))
    assert all(value.size(0) == data.size // ranks for part in prepared for value in part.values())
    return {name: torch.cat([part[name] for part in prepared]) for name in prepared[0]}
