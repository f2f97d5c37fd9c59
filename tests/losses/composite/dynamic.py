"""Sums of two losses whose weights move, by rule, and their steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trl_custom_losses import Denominators, LossFunctionRegistry, Metric, ModelOutputs, PreferenceLoss
from trl_custom_losses.balancing.rules import RULES
from trl_custom_losses.losses.composite import DynamicMultiObjectiveLoss
from trl_custom_losses.testing import Data, random_data

OBJECTIVES = {"main": {"type": "sigmoid", "beta": 0.3}, "other": "sft"}
#: What a rule needs, and makes it move from the first steps on.
OPTIONS: dict[str, dict[str, Any]] = {
    "trend": {"adaptation_rate": 0.1},
    "dwa": {"window": 1, "temperature": 0.5},
    "softadapt": {"window": 1, "beta": 2.0},
    "relobralo": {"alpha": 0.5, "rho": 0.5},
    "constraint": {"targets": {"other": 0.5}, "eta": 0.2},
    "uncertainty": {"learning_rate": 0.1},
}
HOST_RULES = [name for name in RULES if name != "uncertainty"]


class Reporting(PreferenceLoss):
    """Reports metrics of several kinds."""

    def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        logps = model_outputs.logps.detach()
        return -model_outputs.logps, {
            "per_row": logps,
            "per_pair": logps.chunk(2)[0],
            "column": logps.unsqueeze(1),
            "per_token": model_outputs.per_token_logps.detach(),
            "one": logps.mean(),
            "number": 2.5,
            "count": torch.tensor(3),
            "masked": Metric(logps, mask=(logps < -4).to(logps)),
            "smallest": Metric(logps, reduce="min"),
            "perplexity": Metric(-logps, reduce="exp"),
        }


class Renaming(Reporting):
    def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        raw, metrics = super().forward(batch, model_outputs)
        return raw, {"per_row": 10 * metrics["per_row"], "only_here": metrics["one"]}


def build(rule: Any = "trend", *, family: Any = "preference", **settings: Any) -> DynamicMultiObjectiveLoss:
    config = {"type": "dynamic_multi_objective", "objectives": OBJECTIVES, "rule": rule, **settings}
    loss = LossFunctionRegistry.build(config, family=family)
    assert isinstance(loss, DynamicMultiObjectiveLoss)
    return loss


def moving(rule: str, **settings: Any) -> DynamicMultiObjectiveLoss:
    return build(rule, **{"initial_weights": {"main": 1.0, "other": 0.5}, **OPTIONS[rule], **settings})


def observe(loss: DynamicMultiObjectiveLoss, data: Data, denominators: Denominators | None = None) -> Tensor:
    return loss(*data.build(loss, denominators))[0]


def end_step(loss: DynamicMultiObjectiveLoss, step: int) -> None:
    loss.on_step_end(step, {name: value.double() for name, value in loss.take_observed().items()})


def take_steps(loss: DynamicMultiObjectiveLoss, steps: range) -> list[dict[str, float]]:
    """The weights after each of several steps on one batch each."""
    found = []
    for step in steps:
        loss.move_to_step(step)
        observe(loss, random_data("preference", seed=step))
        end_step(loss, step)
        found.append(loss.current_weights())
    return found
