"""Stock TRL trainers against ours with the same loss: step time, the loss's share of it, and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from trl_custom_losses.trainers.base import LossFunctionTrainer
from trl_custom_losses.trainers.fused_head import fitted_head

from .measure import alternate, compare, interval, milliseconds, peak_memory, seconds, summary
from .workload import Workload, dpo_trainer, grpo_trainer, step_timer

_MAKERS: dict[str, tuple[Callable[..., Trainer], str]] = {
    "dpo": (dpo_trainer, "sigmoid"),
    "grpo": (grpo_trainer, "grpo"),
}


def run(work: Workload, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds and bytes of TRL's trainers and of ours, per trainer.

    `step` is a whole optimizer step of `train()`, logging every 10 steps as by default; `loss` is one micro-batch at
    hand, from its inputs to the gradients, where `bare` does nothing but the model's forward pass, the reference's (in
    DPO), the plainest loss and backward; `peak_memory` is that of a `train()` of three steps.

    Args:
        work: Model and batches.
        rounds: Samples of each contender, taken alternately.
        steps: Optimizer steps of a sample.
    """
    return {name: _run(name, work, rounds, steps) for name in _MAKERS}


def _run(name: str, work: Workload, rounds: int, steps: int) -> dict[str, Any]:
    make, loss = _MAKERS[name]
    stock = {"loss_type": loss} if name == "grpo" else {"loss_type": [loss]}
    trainers = {"trl": make(work, **stock), "ours": make(work, loss)}
    timers = {key: step_timer(trainer, steps, 3, work.device) for key, trainer in trainers.items()}
    for timer in timers.values():
        timer()
    samples = alternate(timers, rounds)
    found = {
        "loss_type": loss,
        "step": {key: summary(values) for key, values in samples.items()}
        | {"ours/trl": compare(samples, "ours", "trl")},
    }
    memory = {}
    for key, trainer in trainers.items():
        trainer.args.max_steps = 3
        memory[key] = peak_memory(trainer.train, work.device)
    found["peak_memory"] = {**memory, "ours/trl": memory["ours"] / memory["trl"]}
    parts = _one_micro_batch(trainers, work)
    samples = alternate(
        {key: lambda part=part: seconds(part, steps, 1, work.device) for key, part in parts.items()}, rounds
    )
    found["loss"] = {key: summary(values) for key, values in samples.items()}
    found["loss"] |= {f"ours/{peer}": compare(samples, "ours", peer) for peer in ("trl", "bare")}
    return found


def _one_micro_batch(trainers: dict[str, Trainer], work: Workload) -> dict[str, Callable[[], None]]:
    """What each contender does with one and the same micro-batch, up to the gradients."""
    ours = trainers["ours"]
    ours.model.train()
    inputs = ours._prepare_inputs(next(iter(ours.get_train_dataloader())))

    def with_trainer(trainer: Trainer) -> Callable[[], None]:
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        model = trainer.model_wrapped

        def step() -> None:
            with trainer.compute_loss_context_manager(), _head(trainer):
                trainer.compute_loss(model, inputs).backward()
            trainer.model.zero_grad()

        return step

    def bare() -> None:
        with ours.compute_loss_context_manager(), _head(ours):
            _bare_loss(ours, inputs).backward()
        ours.model.zero_grad()

    return {key: with_trainer(trainer) for key, trainer in trainers.items()} | {"bare": bare}


def _head(trainer: Trainer) -> AbstractContextManager[None]:
    """What our trainers do around all of a training."""
    return fitted_head(trainer.model) if isinstance(trainer, LossFunctionTrainer) else nullcontext()


def _bare_loss(trainer: Trainer, inputs: dict[str, Any]) -> Tensor:
    """The plainest loss of one micro-batch, from the same forward passes."""
    if "prompt_ids" in inputs:
        ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), dim=1)
        attention = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), dim=1)
        mask = inputs["completion_mask"]
        scored = torch.cat((torch.zeros_like(inputs["prompt_mask"]), mask), dim=1)
        logps = _logps(trainer.model, ids, attention, scored)[:, -mask.size(1) :]
        ratio = torch.exp(logps - logps.detach())
        return -(inputs["advantages"].unsqueeze(1) * ratio * mask).sum() / mask.sum()
    passed = (inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
    with torch.no_grad():
        reference = _logps(trainer.ref_model, *passed).sum(1)
    chosen, rejected = (_logps(trainer.model, *passed).sum(1) - reference).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def _logps(model: nn.Module, ids: Tensor, attention: Tensor, scored: Tensor) -> Tensor:
    labels = ids.masked_fill(scored == 0, -100)
    return model(input_ids=ids, attention_mask=attention, labels=labels, use_cache=False, fused_lm_head=True).log_probs


def table(found: dict[str, Any]) -> list[list[str]]:
    """Rows for a table of what `run` found."""
    rows = [["trainer", "what", "TRL", "ours", "ours/TRL", "ours/bare"]]
    for name, result in found.items():
        step, loss, memory = result["step"], result["loss"], result["peak_memory"]
        rows += [
            [name, "step, ms", milliseconds(step["trl"]), milliseconds(step["ours"]), interval(step["ours/trl"]), ""],
            [
                name,
                "loss and gradients, ms",
                milliseconds(loss["trl"]),
                milliseconds(loss["ours"]),
                interval(loss["ours/trl"]),
                interval(loss["ours/bare"]),
            ],
            [
                name,
                "peak memory, MB",
                *(f"{memory[key] / 1e6:.1f}" for key in ("trl", "ours")),
                f"{memory['ours/trl']:.3f}",
                "",
            ],
        ]
    return rows
