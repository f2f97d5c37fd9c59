"""What the strategies share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ....state import HostState
from ....types import ModelOutputs, PreferenceBatch

if TYPE_CHECKING:
    from ..adaptive_dpo import AdaptiveDPOLoss

#: Where strategies that follow the training hold beta: below, pairs hardly pull any more.
LOWEST_BETA = 1e-3


class BetaStrategy(HostState, ABC):
    """Beta as a function of the optimizer step and of what was seen in the steps before it.

    The numbers that a user chooses are attributes of the loss and read there; a strategy keeps what moves, in buffers.
    """

    #: The loss's hyperparameters that it reads, and no other strategy does.
    reads: ClassVar[tuple[str, ...]] = ()
    #: What it needs beyond the needs of the wrapped loss.
    requires: ClassVar[frozenset[str]] = frozenset()

    def lowest(self, loss: AdaptiveDPOLoss) -> float:
        """The lowest beta there can be."""
        return LOWEST_BETA

    @abstractmethod
    def begin_step(self, loss: AdaptiveDPOLoss, step: int) -> float:
        """An optimizer step begins, `step` of them are done; returns its beta."""

    def followed(self, batch: PreferenceBatch, outputs: ModelOutputs) -> Tensor | None:
        """What it follows, (2,): a total over the micro-batch and how many it is of; None if it follows nothing."""
        return None

    def end_step(self, loss: AdaptiveDPOLoss, total: float, count: float) -> Mapping[str, float] | None:
        """Take in what was followed in the whole optimizer step; returns metrics."""
        return None


def total_and_count(values: Tensor, batch: PreferenceBatch) -> Tensor:
    """Sum and number of `values`, (B,) or (2B,), without those of rows that hold no pair."""
    if not batch.has("pair_mask"):
        return torch.stack((values.sum(), values.new_full((), values.numel())))
    counted = batch.pair_mask.repeat(values.numel() // batch.num_pairs) != 0
    return torch.stack((values.masked_fill(~counted, 0).sum(), counted.sum().to(values.dtype)))
