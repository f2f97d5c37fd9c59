"""Stock TRL trainers against ours with the same loss: step time, the loss's share of it, and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from trl_custom_losses.trainers.fused_head import fitted_head

from .measure import alternate, compare, interval, milliseconds, peak_memory, seconds, summary
from .workload import LOSSES, MAKERS, STOCK, Workload, step_timer


def run(work: Workload, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds and bytes of TRL's trainers and of ours, per trainer.

    `step` is a whole optimizer step of `train()`, logging every 10 steps as by default; `loss` is one micro-batch at
    hand, from its inputs to the gradients, where `bare` does nothing but the model's forward pass, the reference's (in
    DPO), the plainest loss and backward; `peak_memory` is that of a `train()` of three steps. Beside TRL as it is,
    `fitted` is TRL with the tiles of its fused head hardly wider than the vocabulary, as ours has them: what
    differs then is the rest.

    Args:
        work: Model and batches.
        rounds: Samples of each contender, taken alternately.
        steps: Optimizer steps of a sample.
    """
    return {name: _run(name, work, rounds, steps) for name in MAKERS}


def _run(name: str, work: Workload, rounds: int, steps: int) -> dict[str, Any]:
    make, loss, stock = MAKERS[name], LOSSES[name], STOCK[name]
    trainers = {"trl": make(work, **stock), "fitted": make(work, **stock), "ours": make(work, loss)}
    timers = {
        key: _fitted(step_timer(trainer, steps, 3, work.device), key, trainer) for key, trainer in trainers.items()
    }
    for timer in timers.values():
        timer()
    found: dict[str, Any] = {"loss_type": loss, "step": _compared(alternate(timers, rounds))}
    memory = {}
    for key, trainer in trainers.items():
        trainer.args.max_steps = 3
        memory[key] = peak_memory(_fitted(trainer.train, key, trainer), work.device)
    found["peak_memory"] = memory | {f"ours/{peer}": memory["ours"] / memory[peer] for peer in ("trl", "fitted")}
    parts = _one_micro_batch(trainers, work)
    samples = {key: partial(seconds, part, steps, 1, work.device) for key, part in parts.items()}
    found["loss"] = _compared(alternate(samples, rounds))
    return found


def _compared(samples: dict[str, list[float]]) -> dict[str, Any]:
    ratios = {f"ours/{peer}": compare(samples, "ours", peer) for peer in samples if peer != "ours"}
    return {key: summary(values) for key, values in samples.items()} | ratios


def _fitted(call: Callable[[], Any], key: str, trainer: Trainer) -> Callable[[], Any]:
    """The call within `fitted_head`, if the contender is to have it; ours has it in `train`."""
    if key != "fitted":
        return call

    def fitted() -> Any:
        with fitted_head(trainer.model):
            return call()

    return fitted


def _one_micro_batch(trainers: dict[str, Trainer], work: Workload) -> dict[str, Callable[[], None]]:
    """What each contender does with one and the same micro-batch, up to the gradients."""
    ours = trainers["ours"]
    ours.model.train()
    inputs = ours._prepare_inputs(next(iter(ours.get_train_dataloader())))

    def with_trainer(key: str, trainer: Trainer) -> Callable[[], None]:
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        model, calls = trainer.model_wrapped, count(1)

        def step() -> None:
            with trainer.compute_loss_context_manager(), nullcontext() if key == "trl" else fitted_head(trainer.model):
                trainer.compute_loss(model, inputs).backward()
            trainer.model.zero_grad()
            if trainer is ours and next(calls) % trainer.args.logging_steps == 0:
                trainer._flush_metrics("train")  # what TRL has done already

        return step

    def bare() -> None:
        with ours.compute_loss_context_manager(), fitted_head(ours.model):
            _bare_loss(ours, inputs).backward()
        ours.model.zero_grad()

    return {key: with_trainer(key, trainer) for key, trainer in trainers.items()} | {"bare": bare}


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
    rows = [["trainer", "what", "TRL", "TRL, fitted", "ours", "ours/TRL", "ours/(TRL, fitted)", "ours/bare"]]
    keys = ("trl", "fitted", "ours")
    ratios = tuple(f"ours/{peer}" for peer in ("trl", "fitted", "bare"))
    for name, result in found.items():
        for cost, label in (("step", "step, ms"), ("loss", "loss and gradients, ms")):
            figures = result[cost]
            intervals = [interval(figures[ratio]) if ratio in figures else "" for ratio in ratios]
            rows.append([name, label, *(milliseconds(figures[key]) for key in keys), *intervals])
        memory = result["peak_memory"]
        megabytes = [f"{memory[key] / 1e6:.1f}" for key in keys]
        rows.append([name, "peak memory, MB", *megabytes, *(f"{memory[ratio]:.3f}" for ratio in ratios[:2]), ""])
    return rows
