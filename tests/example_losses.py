"""Losses in each of the forms that the registry takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trl_custom_losses import LossFunctionRegistry, ModelOutputs, PolicyBatch, PreferenceBatch, PreferenceLoss


@contextmanager
def restored_registry() -> Iterator[None]:
    """Forget afterwards what is registered meanwhile."""
    LossFunctionRegistry.names()
    before = dict(LossFunctionRegistry._functions)
    try:
        yield
    finally:
        LossFunctionRegistry._functions.clear()
        LossFunctionRegistry._functions.update(before)
        LossFunctionRegistry._loaded = True


class Mine(PreferenceLoss):
    """A loss with a needed and two optional hyperparameters."""

    requires = frozenset({"ref_logps"})

    def __init__(self, *, strength: float, beta: float = 0.3, kind: str = "a") -> None:
        super().__init__()
        self.strength, self.beta, self.kind = strength, beta, kind

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return self.strength * model_outputs.log_ratios.chunk(2)[0], {}


def annotated(batch: PreferenceBatch, outputs: ModelOutputs, *, beta: float = 0.1) -> tuple[Tensor, dict]:
    """A loss in function form, of a family that its annotation tells."""
    return -beta * outputs.logps.chunk(2)[0], {"beta": torch.tensor(beta)}


def plain(batch, outputs, *, scale: float = 1.0):
    return scale * outputs.per_token_logps, {}


class Protocol:
    """Any class with `__call__`."""

    family = "policy"
    requires = frozenset({"entropies"})
    reduction = "sequence_sum"

    def __init__(self, *, weight: float = 2.0) -> None:
        self.weight = weight

    def __call__(self, batch: PolicyBatch, outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return self.weight * outputs.per_token_logps, {}
