"""Losses that take what they should refuse, or do not follow a schedule."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from trl_custom_losses import ModelOutputs, PreferenceBatch
from trl_custom_losses.hyperparameters import check_range

from .base import Cases, Right, right_margin

# hyperparameters


class NoAnnotation(Right):
    def __init__(self, *, beta=1.0) -> None:
        super().__init__()
        self.beta = beta


class TakesAnything(Right):
    def __init__(self, *, beta: Any = 1.0) -> None:
        super().__init__(beta=beta)


class DividesByBeta(Right):
    def of(self, margin: Tensor) -> Tensor:
        return (margin - margin.new_ones(()) / self.beta) ** 2


class LogOfBeta(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) + margin.new_tensor(self.beta + 0.5).log()


class RootOfTheLoss(Right):
    """Where beta is 0, the gradient of the root is infinite, and its value is 0."""

    def of(self, margin: Tensor) -> Tensor:
        return (self.beta * margin).square().sqrt()


class PicksByBeta(Right):
    def __init__(self, *, beta: float = 1.0, order: int = 1) -> None:
        super().__init__(beta=check_range("beta", beta, above=0))
        self.order = check_range("order", order, at_least=0)

    def of(self, margin: Tensor) -> Tensor:
        return (super().of(margin), super().of(margin / 2))[int(self.order)]


class PicksHalves(Right):
    """Whose list has no place for a half."""

    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) + {-1.0: 1, 0.0: 2, 1.0: 3, 2.0: 4}[self.beta]


# schedules


class KeepsAFunctionOfBeta(Right):
    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__(beta=beta)
        self.scale = lambda values: beta * values

    def of(self, margin: Tensor) -> Tensor:
        return -F.logsigmoid(self.scale(margin))


class KeepsAFunctionBelowOne(KeepsAFunctionOfBeta):
    """Whose range refuses twice the value."""

    def __init__(self, *, beta: float = 0.8) -> None:
        super().__init__(beta=check_range("beta", beta, above=0, at_most=1))


class KeepsAFunctionFromZero(KeepsAFunctionOfBeta):
    """Twice and half of whose value are its value."""

    def __init__(self, *, beta: float = 0.0) -> None:
        super().__init__(beta=beta)


class KeepsAWholeNumber(Right):
    def __init__(self, *, beta: float = 1.0, power: int = 2) -> None:
        super().__init__(beta=beta)
        self.power = power
        self.kept = lambda: power

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return self.of(right_margin(model_outputs)) ** self.kept(), {}


BUILDING: Cases = {
    "hyperparameters": [
        (NoAnnotation, "'beta' has no type annotation"),
        (TakesAnything, "'beta' has no type annotation"),
        (DividesByBeta, "beta = 0.0 is accepted"),
        (LogOfBeta, "beta = -1.0 is accepted, and the loss is nan"),
        (RootOfTheLoss, "beta = 0.0 is accepted, and the loss is 0.0 (or its gradient is not finite)"),
        (PicksByBeta, "order = 2 is accepted, and the loss then raises IndexError"),
        (PicksHalves, "beta = 0.5 is accepted, and the loss then raises KeyError"),
    ],
    "schedules": [
        (KeepsAFunctionOfBeta, "'beta' moved by a schedule from 1 to 2"),
        (KeepsAFunctionBelowOne, "'beta' moved by a schedule from 0.8 to 0.4"),
        (KeepsAFunctionFromZero, "'beta' moved by a schedule from 0 to 1"),
        (KeepsAWholeNumber, "'power' moved by a schedule from 2 to 4"),
    ],
}
