"""Trend: reward the objectives whose loss is falling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...hyperparameters import check_range
from ...state import host_zeros
from .rule import WeightRule, check_objectives

_RECENT = 10
# Two means of the same constant differ by rounding; such a difference is no trend.
_ROUNDING = 1e-9


class TrendWeights(WeightRule):
    """Trend: a weight grows while its loss falls, and shrinks otherwise.

    weight <- max(weight * (1 + adaptation_rate), floor)  if mean(last 10 losses) < mean(all before)
    weight <- max(weight * (1 - adaptation_rate), floor)  otherwise

    From the 11th loss of an objective on; its initial weight before. Of the history, the last 10 losses and the sum
    and number of those before are kept. Weights are not normalised: a loss that falls for 1000 steps has 20 000 times
    its weight at the default rate, and what improves draws further attention, unlike with `dwa` or `softadapt`.

    Deviation: weights are at most 1e6, and means that differ by less than 1e-9 of their size count as equal.

    Args:
        names: The objectives' names.
        initial_weights: Their weights at first, at least `floor`.
        adaptation_rate: Relative change of a weight per optimizer step, 0 <= adaptation_rate < 1.
        floor: No weight falls below it, > 0.

    Source: A heuristic of tutorials, without a paper.
    """

    recent: Tensor
    seen: Tensor
    older_sum: Tensor
    older_count: Tensor

    def __init__(
        self,
        *,
        names: Sequence[str],
        initial_weights: Sequence[float],
        adaptation_rate: float = 0.01,
        floor: float = 0.01,
    ) -> None:
        super().__init__(names=names, initial_weights=initial_weights)
        self.adaptation_rate = check_range("adaptation_rate", adaptation_rate, at_least=0, below=1)
        self.floor = check_range("floor", floor, above=0)
        check_objectives(names, initial_weights, at_least=floor)
        self.register_buffer("recent", host_zeros(_RECENT, len(names)))  # oldest first
        self.register_buffer("seen", host_zeros(len(names)))  # how many of them are filled
        self.register_buffer("older_sum", host_zeros(len(names)))
        self.register_buffer("older_count", host_zeros(len(names)))

    def move(self, values: Tensor, usable: Tensor, step: int) -> Tensor:
        leaves = usable & (self.seen == _RECENT)  # the oldest recent loss makes room
        self.older_sum = self.older_sum + self.recent[0].where(leaves, 0.0)
        self.older_count = self.older_count + leaves
        self.recent = torch.where(usable, torch.cat([self.recent[1:], values[None]]), self.recent)
        self.seen = (self.seen + usable).clamp(max=_RECENT)

        before = self.older_sum / self.older_count.clamp(min=1)
        falling = before - self.recent.mean(0) > _ROUNDING * before.abs()
        grown, shrunk = self.current * (1 + self.adaptation_rate), self.current * (1 - self.adaptation_rate)
        judged = usable & (self.older_count > 0)
        return torch.where(judged, torch.where(falling, grown, shrunk).clamp(min=self.floor), self.current)
