"""Losses whose gradients are known, and runs with the calls that a Trainer makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from trl_custom_losses import (
    ComposableLossFunction,
    Denominators,
    Loss,
    ModelOutputs,
    PreferenceBatch,
    PreferenceLoss,
)
from trl_custom_losses.balancing.gramian import watch_whole
from trl_custom_losses.callbacks import GradientMonitorCallback, LossFunctionCallback
from trl_custom_losses.reductions import reduce_loss


class Slopes(PreferenceLoss):
    """A loss whose gradient is known: `chosen` at each chosen token, `rejected` at each rejected one."""

    def __init__(self, *, chosen: float, rejected: float = 0.0) -> None:
        super().__init__()
        self.chosen, self.rejected = chosen, rejected

    def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        chosen, rejected = model_outputs.logps.chunk(2)
        return self.chosen * chosen + self.rejected * rejected, {}


def one_pair(chosen: int = 2, rejected: int = 2, **denominators: float) -> tuple[PreferenceBatch, ModelOutputs]:
    """A pair with so many tokens on each side, of at most three."""
    mask = (torch.arange(3) < torch.tensor([[chosen], [rejected]])).long()
    ids = torch.zeros(2, 4, dtype=torch.long)
    counts = Denominators(**{"sequences": 1.0, "tokens": 1.0, **denominators})
    batch = PreferenceBatch(input_ids=ids, attention_mask=ids, mask=mask, denominators=counts)
    return batch, ModelOutputs(per_token_logps=torch.full((2, 3), -1.0, requires_grad=True), mask=mask)


class Run:
    """A run with the Trainer's calls; `world` stands for the number of processes, which all see the same."""

    device = torch.device("cpu")
    distributed_type = SimpleNamespace(value="NO")

    def __init__(self, loss: Loss, every: int = 1, first: str = "monitor", world: int = 1) -> None:
        self.loss, self.world, self.logged, self.reductions = loss, world, [], 0
        self.monitor, self.driver = GradientMonitorCallback(every), LossFunctionCallback(loss, self, self.logged.append)
        self.monitor.attach(loss, self, self.logged.append)
        self.callbacks = [self.monitor, self.driver] if first == "monitor" else [self.driver, self.monitor]
        self.state = TrainerState(max_steps=100)
        self.call("on_train_begin")

    def reduce(self, tensor: Tensor, how: str) -> Tensor:
        assert how == "sum"
        self.reductions += 1
        return self.world * tensor

    def call(self, event: str) -> None:
        for callback in self.callbacks:
            args = TrainingArguments(use_cpu=True, bf16=False, report_to="none")
            getattr(callback, event)(args, self.state, TrainerControl(), model=None)

    def step(self, *micro_batches: tuple[PreferenceBatch, ModelOutputs]) -> dict[str, float]:
        """An optimizer step; returns what was logged."""
        self.logged.clear()
        self.call("on_step_begin")
        for batch, outputs in micro_batches:
            raw, _ = self.loss(batch, outputs)
            watch_whole(self.loss, reduce_loss(self.loss, raw, batch), batch, outputs)
        self.state.global_step += 1
        self.call("on_step_end")
        return {name: value for metrics in self.logged for name, value in metrics.items()}


def two(**options: Any) -> ComposableLossFunction:
    return ComposableLossFunction({"a": Slopes(chosen=3.0), "b": Slopes(chosen=1.0, rejected=-2.0)}, **options)
