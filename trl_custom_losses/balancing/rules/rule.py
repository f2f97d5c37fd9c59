"""What the rules share: K weights that move once per optimizer step, from that step's mean losses.

Rules look back, so that weights computed from the losses of step t are those of step t + 1.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import LossConfigError
from ...hyperparameters import check_range
from ...state import HostState, host

# Where a rule lets a weight grow without end, float32 must still hold the weight times a loss.
LARGEST_WEIGHT = 1e6
# A signal is a float32 mean. What lies beyond is no loss, and sums of it would overflow even in float64.
_LARGEST_SIGNAL = torch.finfo(torch.float32).max
# One window in which a loss jumped from almost nothing must not leave the others without weight.
_LARGEST_RATIO = 10.0


class WeightRule(HostState, ABC):
    """Weights of K objectives, a function of the losses seen so far.

    The state is a few float64 buffers of fixed shape, part of `state_dict`: a resumed run continues bit for bit, and
    ranks fed with the same signals agree. An objective whose signal is not finite in some step (nothing to average, an
    overflow) keeps its history as it was; the others go on. Weights are at most 1e6.

    Args:
        names: The objectives' names, unique.
        initial_weights: Their weights before anything is known, 0 to 1e6.

    Errors: No objectives, a repeated name, another number of weights than of names, or a weight out of range.
    """

    current: Tensor

    def __init__(self, *, names: Sequence[str], initial_weights: Sequence[float]) -> None:
        super().__init__()
        check_objectives(names, initial_weights, at_least=0, at_most=LARGEST_WEIGHT)
        self.names = tuple(names)
        self.initial_weights = tuple(map(float, initial_weights))
        self.register_buffer("current", host(self.initial_weights))

    @property
    def weights(self) -> list[float]:
        """The current weights, in the order of `names`."""
        return self.current.tolist()

    def update(self, signals: Sequence[float], step: int) -> None:
        """Move the weights; called once per optimizer step, on every rank with the same numbers.

        Args:
            signals: Mean loss of each objective over the step and all ranks, before its weight, or what is followed in
                its place; in the order of `names`, NaN where there was none.
            step: Number of the optimizer step.
        """
        values = host(signals)
        if values.shape != self.current.shape:
            raise ValueError(f"expected {len(self.names)} signals {self.names}, found {len(signals)}")
        usable = values.abs() <= _LARGEST_SIGNAL  # NaN compares false
        self.current = self.move(values.where(usable, 0.0), usable, step).clamp(max=LARGEST_WEIGHT)

    @abstractmethod
    def move(self, values: Tensor, usable: Tensor, step: int) -> Tensor:
        """The next weights.

        Args:
            values: (K,), the signals, 0 where not usable.
            usable: (K,), whether the signal is finite.
            step: Number of the optimizer step.
        """

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={weight:g}" for name, weight in zip(self.names, self.weights, strict=True))


def check_objectives(names: Sequence[str], weights: Sequence[float], **bounds: float) -> None:
    """Check that names are unique and that each has a weight within the bounds of `check_range`."""
    if not names:
        raise LossConfigError("expected at least one objective to weigh, found none")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise LossConfigError(f"objectives share the name {repeated[0]!r}: give each its own")
    for name, weight in itertools.zip_longest(names, weights):
        if name is None or weight is None:
            raise LossConfigError(f"expected one initial weight for each of {list(names)}, found {list(weights)}")
        check_range(f"weight of '{name}'", weight, **bounds)


def balance(scores: Tensor, ready: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Multipliers of mean 1: K softmax(scores), times sizes before it is normalised.

    Args:
        scores: (K,), dimensionless.
        ready: (K,), whether the score means something; an objective that is not ready has the multiplier 1.
        sizes: (K,), > 0; None counts all alike.
    """
    if not ready.any():
        return torch.ones_like(scores)
    shares = torch.exp(scores - scores[ready].max()) * (1.0 if sizes is None else sizes)
    shares = shares.where(ready, 0.0)
    return torch.where(ready, shares * (ready.sum() / shares.sum()), 1.0)


def loss_ratio(now: Tensor, before: Tensor, floor: float) -> Tensor:
    """now / before, made safe for losses that are negative or about 0.

    ratio = 1 + (now - before) / max(|before|, floor), held within 0 and 10

    For losses above the floor this is now / before. Below 0, a falling loss still has a ratio under 1. A loss that
    hovers around 0 on a scale smaller than the floor has a ratio of about 1, that of a constant loss.
    """
    return (1 + (now - before) / before.abs().clamp(min=floor)).clamp(0.0, _LARGEST_RATIO)
