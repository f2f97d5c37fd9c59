"""Balanced compositions of losses that pull in chosen directions, their steps and the Gramian of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trl_custom_losses import (
    ComposableLossFunction,
    LossFunctionRegistry,
    ModelOutputs,
    PreferenceBatch,
    PreferenceLoss,
)
from trl_custom_losses.testing import Data, random_data


class Reading(PreferenceLoss):
    """The weighted sum of squares of a field of the outputs, padding included, with weights of a seed."""

    def __init__(self, *, field: str = "per_token_logps", seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.requires = frozenset() if field == "per_token_logps" else frozenset({field})
        self.field, self.seed, self.scale = field, seed, scale

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        values = getattr(model_outputs, self.field)
        direction = torch.randn(values.shape, generator=torch.Generator().manual_seed(self.seed)).to(values)
        return self.scale * (direction * (1 + values) ** 2).sum(), {}


class Everywhere(PreferenceLoss):
    """Pulls at every position, padding included."""

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return (1 - model_outputs.per_token_logps).log().sum(1), {}


class Constant(PreferenceLoss):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return torch.ones(batch.num_pairs, dtype=model_outputs.logps.dtype), {}


def balanced(balancing: Any, *components: Any, weights: Sequence[Any] | None = None) -> ComposableLossFunction:
    losses = {}
    for config in components:
        name = config["type"] if isinstance(config, dict) else config
        losses[f"{name}{len(losses)}"] = LossFunctionRegistry.build(config)
    return ComposableLossFunction(losses, weights, balancing=balancing)


def conflicting(seed: int, scale: float = 1.0) -> list[dict[str, Any]]:
    return [{"type": "reading", "seed": 3 * seed + k, "scale": scale * (k + 1)} for k in range(3)]


def step_data(step: int) -> Data:
    return random_data("preference", seed=step)


def explicit_gramian(losses: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
    """Inner products, entry by entry."""
    gradients = [
        [
            torch.zeros_like(anchor) if part is None else part
            for anchor, part in zip(
                anchors, torch.autograd.grad(loss, anchors, retain_graph=True, allow_unused=True), strict=True
            )
        ]
        for loss in losses
    ]
    return torch.tensor(
        [[sum((a * b).sum().item() for a, b in zip(x, y, strict=True)) for y in gradients] for x in gradients],
        dtype=torch.float64,
    )


def take_step(loss: ComposableLossFunction, step: int, parts: Sequence[tuple[Any, ModelOutputs]]) -> Tensor:
    """One optimizer step as the driver passes it on; returns the Gramian that was observed."""
    loss.move_to_step(step)
    for batch, outputs in parts:
        loss(batch, outputs)
    observed = {name: value.double() for name, value in loss.take_observed().items()}
    loss.on_step_end(step, observed)
    return observed["gramian"]
