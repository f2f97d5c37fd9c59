"""The driver that takes a loss through a run."""

from __future__ import annotations

import math
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
from .exchange import SumOverRanks


class LossFunctionCallback(TrainerCallback):
    """Tells a loss and everything it is made of that training begins and that optimizer steps begin and end.

    Before a step it sets scheduled hyperparameters; after it, what the losses observed is summed over ranks, in one
    collective for the whole tree, together with the trainer's alarm, and none if there is neither, and handed to their
    `on_step_end`. It holds no state beyond the step under way: the step is the Trainer's, the rest are the loss's
    buffers.

    Args:
        loss: The trainer's loss.
        accelerator: Of the trainer.
        log: Takes the metrics that losses return at a step's end.
        before_update: Called before the optimizer moves; may ask `alarmed`.
    """

    def __init__(
        self,
        loss: Loss,
        accelerator: Accelerator,
        log: Callable[[Mapping[str, float]], None] = lambda metrics: None,
        before_update: Callable[[], None] = lambda: None,
    ) -> None:
        self.loss = loss
        self.accelerator = accelerator
        self.log = log
        self.before_update = before_update
        self._exchange: _Exchange | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.forget()
        self.loss.begin_run(state.max_steps, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.loss.begin_step(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.before_update()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._exchange is None:
            self.exchange()
        observed = self._exchange.observed()
        self.forget()
        # The Trainer has counted the step already.
        told, placed = _end_step(self.loss, state.global_step - 1, iter(observed))
        if told or placed:
            self.log(told | placed)

    def exchange(self, alarm: Tensor | None = None) -> None:
        """Begin to sum over ranks what the losses observed in this optimizer step. A collective.

        The trainer calls it when the last micro-batch has its loss and backward is still to come; without that,
        `on_step_end` does.

        Args:
            alarm: Above 0 where this rank has something to stop for, a scalar; None on all ranks or none.
        """
        losses = self.loss.tree()
        # They stay with the losses: a micro-batch that computes its loss more than once exchanges all of it.
        observed = [loss.observed_so_far() for loss in losses]
        # A collective, so that whether it happens must not depend on what this rank has observed.
        needed = alarm is not None or any(loss.observes or loss.watched for loss in losses)
        self._exchange = _Exchange(observed, alarm, self.accelerator if needed else None)

    def alarmed(self) -> bool:
        """Whether any rank gave an alarm in the step under way."""
        return self._exchange is not None and self._exchange.alarmed()

    def forget(self) -> None:
        """Drop what was observed and exchanged."""
        self._exchange = None
        for loss in self.loss.tree():
            loss.take_observed()


class _Exchange:
    """What the losses of a tree observed on all ranks, and whether a rank is alarmed, in one sum over ranks.

    Args:
        observed: What each loss observed on this rank.
        alarm: See `LossFunctionCallback.exchange`.
        accelerator: Of the trainer; None where nobody wants to know.
    """

    def __init__(
        self, observed: list[dict[str, Tensor]], alarm: Tensor | None, accelerator: Accelerator | None
    ) -> None:
        self._layout = [[(name, tuple(values.shape)) for name, values in sorted(sums.items())] for sums in observed]
        self._sum: SumOverRanks | None = None
        self._host: Tensor | None = None
        if accelerator is None:
            return
        parts = [values for sums in observed for _, values in sorted(sums.items())]
        device = accelerator.device  # where collectives work, whatever the losses observed
        # mps has no float64.
        exact = torch.float32 if device.type == "mps" else torch.float64
        # Ranks that observed different things would add up what has nothing to do with each other: a checksum of the
        # names and shapes rides along, and its square, so that differences cannot cancel. Filled in on the
        # device: the host would wait for a copy.
        checksum = float(zlib.crc32(repr(self._layout).encode()) % 2**12)
        header = [torch.full((1,), value, device=device, dtype=exact) for value in (1.0, checksum, checksum**2)]
        raised = header[0].new_zeros(1) if alarm is None else alarm.detach().reshape(1)
        flat = [values.to(device, exact).flatten() for values in (*header, raised, *parts)]
        self._sum = SumOverRanks(torch.cat(flat), accelerator)

    def _values(self) -> Tensor:
        if self._host is None:
            self._host = self._sum.on_host()
        return self._host

    def alarmed(self) -> bool:
        return self._sum is not None and bool(self._values()[3] > 0)

    def observed(self) -> list[dict[str, Tensor]]:
        """Sums over ranks of what each loss observed, float64, on the host; nothing where nobody wants to know."""
        if self._sum is None:
            return [{} for _ in self._layout]
        count, total, squares = self._values()[:3].tolist()
        if total**2 != count * squares:
            raise RuntimeError(
                "ranks observed different things; a loss must give `observe` the same names and shapes on every rank. "
                f"This rank: {self._layout}"
            )
        sizes = [math.prod(shape) for sums in self._layout for _, shape in sums]
        pieces = iter(self._values()[4:].split(sizes) if sizes else ())
        return [{name: next(pieces).view(shape) for name, shape in sums} for sums in self._layout]


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
