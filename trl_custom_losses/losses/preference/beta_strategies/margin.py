"""Beta that follows the margins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....state import host
from ....types import ModelOutputs, PreferenceBatch, Ranks
from .strategy import LOWEST_BETA, BetaStrategy, total_and_count

if TYPE_CHECKING:
    from ..adaptive_dpo import AdaptiveDPOLoss


class MarginFollowing(BetaStrategy):
    """Higher where pairs are told apart more clearly than on average so far (beta-DPO).

    beta_t = max(beta (1 + margin_scale (M - M0)), 0.001),  M0 <- margin_decay M0 + (1 - margin_decay) M

    M is the mean over pairs of the log-ratio of chosen minus that of rejected, free of beta, in nats. With lag 1, M and
    M0 are those after the previous optimizer step: beta is then the same for all of a step, whatever its split, and
    costs no collective of its own; the first step has the initial beta. With lag 0, M is that of the micro-batch at
    hand over all ranks and M0 what it becomes with it, as in the authors' code; evaluation is as with lag 1.

    Otherwise than in the authors' code, M0 starts at the first M, not at 0, where beta would jump for the first tens of
    steps; it takes in each optimizer step once, and evaluation never. Left out is their filter, which drops the pairs
    furthest from M0: at the start, where all margins are 0, it divides 0 by 0. As with them, beta has no upper bound.

    Source: Wu et al. 2024, arXiv:2407.08639.
    """

    reads = ("margin_scale", "margin_decay", "lag")
    requires = frozenset({"ref_logps"})

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("margin", host(0.0))
        self.register_buffer("average", host(0.0))
        self.register_buffer("steps", host(0, torch.int64))
        self._average: float | None = None  # at the step's beginning, where a forward pass can read it without waiting

    def begin_step(self, loss: AdaptiveDPOLoss, step: int) -> float:
        self._average = self.average.item() if self.steps else None
        excess = (self.margin - self.average).item()  # 0 in the first step
        return max(loss.initial_beta * (1 + loss.margin_scale * excess), LOWEST_BETA)

    def beta_of_batch(self, loss: AdaptiveDPOLoss, followed: Tensor, ranks: Ranks) -> Tensor:
        """Beta from the micro-batch's own margin over all ranks, without gradient; a collective."""
        total, count = ranks.sum(followed).unbind()
        margin = total / count
        excess = loss.margin_decay * (margin - (margin if self._average is None else self._average))
        excess = torch.where(excess.isfinite(), excess, 0)  # no pair at all: 0 / 0
        return (loss.initial_beta * (1 + loss.margin_scale * excess)).clamp(min=LOWEST_BETA)

    def followed(self, batch: PreferenceBatch, outputs: ModelOutputs) -> Tensor:
        chosen, rejected = outputs.log_ratios.detach().chunk(2)
        return total_and_count(chosen - rejected, batch)

    def end_step(self, loss: AdaptiveDPOLoss, total: float, count: float) -> Mapping[str, float] | None:
        margin = total / count if count else math.nan
        if not math.isfinite(margin):
            return None
        decay = loss.margin_decay if self.steps else 0.0
        self.margin.fill_(margin)
        self.average.mul_(decay).add_((1 - decay) * margin)
        self.steps += 1
        return {"adaptive_margin": margin}
