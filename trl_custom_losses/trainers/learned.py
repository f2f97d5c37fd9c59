"""Parameters of a loss that are trained beside the model: learned weights and the like."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

from ..base import Loss
from ..errors import LossConfigError


def learned_parameters(loss: Loss) -> list[nn.Parameter]:
    """The parameters of a loss that want a gradient."""
    return [parameter for parameter in loss.parameters() if parameter.requires_grad]


def add_to_optimizer(loss: Loss, optimizer: torch.optim.Optimizer) -> None:
    """Give the loss's parameters groups of their own: no weight decay, and the learning rate of their module.

    A module's attribute `learning_rate` is its parameters' own; without one they get the optimizer's. The learning-rate
    scheduler scales all groups alike.

    Args:
        loss: With parameters that the optimizer may hold already.
        optimizer: The trainer's, before it is prepared.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for module in loss.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in held]
        if own:
            group: dict[str, Any] = {"params": own, "weight_decay": 0.0}
            if getattr(module, "learning_rate", None) is not None:
                group["lr"] = module.learning_rate
            optimizer.add_param_group(group)


def check_trainable(loss: Loss, accelerator: Accelerator, scheduler: Any = None) -> None:
    """Refuse learned parameters where the optimizer could not hold them.

    Args:
        loss: Of the trainer.
        accelerator: Of the trainer.
        scheduler: A learning-rate scheduler that the trainer was given.

    Raises:
        LossConfigError: The launcher's optimizer (DeepSpeed, FSDP) leaves no place for parameters outside of the model,
            or the scheduler was made for an optimizer without them.
    """
    names = [name for name, parameter in loss.named_parameters() if parameter.requires_grad]
    if not names:
        return
    found = accelerator.distributed_type.value
    if found not in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU"):
        raise LossConfigError(
            f"the loss '{loss.name}' learns {', '.join(names)}, which the optimizer must hold beside the model's "
            f"parameters. That works on one process and with DDP; found {found}, whose optimizer takes the model's "
            "parameters alone. Choose one of these, or a loss without learned parameters"
        )
    if scheduler is not None:
        raise LossConfigError(
            f"the loss '{loss.name}' learns {', '.join(names)}, which get a group of the optimizer, but the given "
            "learning-rate scheduler knows its groups already; give the optimizer alone, and `lr_scheduler_type`"
        )


class LearnedParametersCallback(TrainerCallback):
    """Averages the gradients of a loss's parameters over ranks, as DDP does for the model's, and clears them.

    Args:
        loss: The trainer's loss.
        accelerator: Of the trainer.
    """

    def __init__(self, loss: Loss, accelerator: Accelerator) -> None:
        self.loss = loss
        self.accelerator = accelerator

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._clear()  # what a training that was stopped between micro-batches has left

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for parameter in learned_parameters(self.loss):
            if parameter.grad is None:  # every rank takes part in the collective
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._clear()

    def _clear(self) -> None:
        """Drop the gradients; the Trainer clears the model's alone."""
        for parameter in learned_parameters(self.loss):
            parameter.grad = None
