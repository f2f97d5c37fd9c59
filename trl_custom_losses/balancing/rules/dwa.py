"""DWA: more weight for the losses that fall slowly, window by window."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ...hyperparameters import check_range
from ...state import host, host_zeros
from .rule import WeightRule, balance, loss_ratio


class WindowedRule(WeightRule):
    """Multipliers of the initial weights, from the mean losses of the last few windows of optimizer steps.

    weight_k = initial weight_k * multiplier_k,  the multipliers' mean being 1

    They move at the end of a window. A mean leaves out the steps in which the loss was not finite; a window without
    any other is left out of this objective's history. Until an objective has `points` means its multiplier is 1.

    Args:
        names: The objectives' names.
        initial_weights: Their weights before their multipliers.
        window: Optimizer steps to a window, >= 1.
        points: Means of past windows that the rule looks at.
    """

    total: Tensor
    count: Tensor
    steps: Tensor
    means: Tensor
    known: Tensor

    def __init__(self, *, names: Sequence[str], initial_weights: Sequence[float], window: int, points: int) -> None:
        super().__init__(names=names, initial_weights=initial_weights)
        self.window = check_range("window", window, at_least=1)
        self.register_buffer("total", host_zeros(len(names)))  # of the window that is open
        self.register_buffer("count", host_zeros(len(names)))
        self.register_buffer("steps", host_zeros())
        self.register_buffer("means", host_zeros(points, len(names)))  # oldest first
        self.register_buffer("known", host_zeros(len(names)))  # how many of them are filled

    def move(self, values: Tensor, usable: Tensor, step: int) -> Tensor:
        self.total, self.count, self.steps = self.total + values, self.count + usable, self.steps + 1
        if self.steps < self.window:
            return self.current
        mean, points = self.total / self.count.clamp(min=1), self.means.size(0)
        self.means = torch.where(self.count > 0, torch.cat([self.means[1:], mean[None]]), self.means)
        self.known = torch.where(self.count > 0, (self.known + 1).clamp(max=points), self.known)
        self.total, self.count, self.steps = host_zeros(len(self.names)), host_zeros(len(self.names)), host_zeros()
        return host(self.initial_weights) * self.multipliers(self.known == points)

    @abstractmethod
    def multipliers(self, ready: Tensor) -> Tensor:
        """(K,), from `means`; 1 for an objective that is not ready, having fewer means than the rule looks at."""


class DWAWeights(WindowedRule):
    """DWA, dynamic weight average: the softmax of how much of each loss is left.

    multiplier = K softmax_k(r_k / temperature),  r_k = L_k(-1) / L_k(-2);  weight = initial weight * multiplier

    L(-1) and L(-2) are mean losses of the last two windows, epochs in the paper. A single step's loss is noisy, hence
    a window of several; `window: 1` is the formula per step. For the first two windows weights are the initial ones.

    Deviation: r = 1 + (L(-1) - L(-2)) / max(|L(-2)|, loss_floor), within 0 and 10. This is the paper's ratio for
    losses of at least `loss_floor` that grow less than tenfold; policy losses are negative or about 0, where a ratio
    would be noise.

    Args:
        names: The objectives' names.
        initial_weights: Their weights before their multipliers; with ones the weights are the paper's.
        temperature: T, > 0; higher makes the weights more alike.
        window: Optimizer steps averaged into one loss, >= 1.
        loss_floor: Smaller magnitudes of a loss count as this, > 0. For an objective around 0, the change over a
            window that would matter.

    Source: Liu et al. 2019, arXiv:1803.10704; the authors' code (lorenmt/mtan).
    """

    def __init__(
        self,
        *,
        names: Sequence[str],
        initial_weights: Sequence[float],
        temperature: float = 2.0,
        window: int = 10,
        loss_floor: float = 1e-3,
    ) -> None:
        super().__init__(names=names, initial_weights=initial_weights, window=window, points=2)
        self.temperature = check_range("temperature", temperature, above=0)
        self.loss_floor = check_range("loss_floor", loss_floor, above=0)

    def multipliers(self, ready: Tensor) -> Tensor:
        before, now = self.means
        return balance(loss_ratio(now, before, self.loss_floor) / self.temperature, ready)
