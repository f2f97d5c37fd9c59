"""The driver that takes a loss through a run."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..balancing.gramian import WATCHED, WATCHED_WEIGHTED, watched_metrics
from ..base import Loss
from ..composition import merge_metrics


class LossFunctionCallback(TrainerCallback):
    """Tells a loss and everything it is made of that training begins and that optimizer steps begin and end.

    Before a step it sets scheduled hyperparameters; after it, what the losses observed is summed over ranks, in one
    collective for the whole tree and none if no loss observes, and handed to their `on_step_end`. It holds no state
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
        self.loss.begin_run(state.max_steps, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.loss.begin_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        losses = self.loss.tree()
        seen = [loss.take_observed() for loss in losses]
        # A collective, so that whether it happens must not depend on what this rank has observed.
        summed = any(loss.observes or loss.watched for loss in losses)
        observed = self._sum_over_ranks(seen) if summed else [{} for _ in losses]
        # The Trainer has counted the step already.
        told, placed = _end_step(self.loss, state.global_step - 1, iter(observed))
        if told or placed:
            self.log(told | placed)

    def _sum_over_ranks(self, observed: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Sums over ranks of what each loss observed, float64, on the host."""
        parts = [values for sums in observed for _, values in sorted(sums.items())]
        device = self.accelerator.device  # where collectives work, whatever the losses observed
        # mps has no float64.
        exact = torch.float32 if device.type == "mps" else torch.float64
        # Ranks that observed different things would add up what has nothing to do with each other: a checksum of the
        # names and shapes rides along, and its square, so that differences cannot cancel.
        layout = [[(name, tuple(values.shape)) for name, values in sorted(sums.items())] for sums in observed]
        checksum = float(zlib.crc32(repr(layout).encode()) % 2**12)
        header = torch.tensor([1.0, checksum, checksum**2], device=device, dtype=exact)
        flat = torch.cat([header, *(values.to(device, exact).flatten() for values in parts)])
        flat = self.accelerator.reduce(flat, "sum").to("cpu", torch.float64)
        count, total, squares = flat[:3].tolist()
        if total**2 != count * squares:
            raise RuntimeError(
                "ranks observed different things; a loss must give `observe` the same names and shapes on every rank. "
                f"This rank: {layout}"
            )
        pieces = iter(flat[3:].split([values.numel() for values in parts]) if parts else ())
        return [{name: next(pieces).view(values.shape) for name, values in sorted(sums.items())} for sums in observed]


def _end_step(
    loss: Loss, step: int, observed: Iterator[Mapping[str, Tensor]], outer: frozenset[str] = frozenset()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell a loss and its parts that a step ended.

    Args:
        loss: The loss, or a part of it.
        step: Number of optimizer steps done before.
        observed: Of the loss and its parts, in the order of `tree`.
        outer: Names of the components of the losses around it.

    Returns:
        Metrics that are named as in a forward pass, and those whose names begin with the path of the composition that
        they are of: without it, gradients named after components could be another composition's.
    """
    seen = dict(next(observed))
    watched = {name: seen.pop(name) for name in (WATCHED, WATCHED_WEIGHTED) if name in seen}
    told = dict(loss.on_step_end(step, seen) or {})
    # Balancing and the monitor find the same cosines.
    placed = {key: value for key, value in watched_metrics(loss, watched).items() if key not in told}
    names = frozenset(name for name, _ in loss.components())
    if loss.watches_parts and names & outer:
        placed |= {key: told.pop(key) for key in list(told) if key.startswith("grad_cosine/")}
    parts = {}
    for name, component in loss.components():
        parts[name], inner = _end_step(component, step, observed, outer | names)
        placed |= {f"{name}/{key}": value for key, value in inner.items()}
    return told | merge_metrics(parts, taken=told), placed
