"""Callbacks of the Trainer: the driver that takes a loss through a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .base import Loss
from .composition import merge_metrics


class LossFunctionCallback(TrainerCallback):
    """Tells a loss and everything it is made of that training begins and that optimizer steps begin and end.

    Before a step it sets scheduled hyperparameters; after it, what the losses observed is summed over ranks, in one
    collective for the whole tree and none if nothing was observed, and handed to their `on_step_end`. It holds no state
    of its own: the step is the Trainer's, the rest are the loss's buffers.

    Args:
        loss: The trainer's loss.
        accelerator: Of the trainer.
        log: Takes the metrics that losses return at a step's end.
    """

    def __init__(
        self, loss: Loss, accelerator: Accelerator, log: Callable[[Mapping[str, float]], None] = lambda metrics: None
    ) -> None:
        self.loss = loss
        self.accelerator = accelerator
        self.log = log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for loss in self.loss.tree():
            for schedule in loss.schedules.values():
                schedule.begin(state.max_steps)
            loss.take_observed()  # of a run that was stopped
            loss.on_train_begin(state.max_steps)
            loss.move_to_step(state.global_step)  # for an evaluation before the first step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        losses = self.loss.tree()
        for loss in losses:
            loss.move_to_step(state.global_step)
        for loss in losses:  # a parent's hook may set what its parts have just been given, so it comes after
            loss.on_step_begin(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        losses = self.loss.tree()
        observed = self._sum_over_ranks([loss.take_observed() for loss in losses])
        reported: dict[str, Mapping[str, Any]] = {}
        for index, (loss, sums) in enumerate(zip(losses, observed, strict=True)):
            # The Trainer has counted the step already.
            metrics = loss.on_step_end(state.global_step - 1, sums)
            if metrics:
                name = loss.name if loss.name not in reported else f"{loss.name}_{index}"
                reported[name] = metrics
        if reported:
            self.log(merge_metrics(reported))

    def _sum_over_ranks(self, observed: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Sums over ranks of what each loss observed, float64, on the host."""
        parts = [values for sums in observed for _, values in sorted(sums.items())]
        if not parts:
            return [{} for _ in observed]
        device = self.accelerator.device  # where collectives work, whatever the losses observed
        # mps has no float64.
        exact = torch.float32 if device.type == "mps" else torch.float64
        flat = torch.cat([values.to(device, exact).flatten() for values in parts])
        flat = self.accelerator.reduce(flat, "sum").to("cpu", torch.float64)
        pieces = iter(flat.split([values.numel() for values in parts]))
        return [{name: next(pieces).view(values.shape) for name, values in sorted(sums.items())} for sums in observed]
