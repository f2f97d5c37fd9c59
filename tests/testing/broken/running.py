"""Mistakes that show in a run: the host waits, inputs change, state is forgotten."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trl_custom_losses import ModelOutputs, PolicyBatch, PreferenceBatch

from .base import Cases, Right, RightPolicy
from .syncs import SYNCS

# inputs_unchanged


class Changes(Right):
    """Does `change` to its inputs, then what is right."""

    def change(self, batch: PreferenceBatch, outputs: ModelOutputs) -> None:
        raise NotImplementedError

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        result = super().forward(batch, model_outputs)
        self.change(batch, model_outputs)
        return result


class ChangesTheMask(Changes):
    def change(self, batch: PreferenceBatch, outputs: ModelOutputs) -> None:
        batch.mask[:, 0] = 0


class PutsOthersInTheirPlace(Changes):
    def change(self, batch: PreferenceBatch, outputs: ModelOutputs) -> None:
        outputs.per_token_logps = outputs.per_token_logps.clamp(max=0)


class ScalesTheAdvantages(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        batch.advantages *= 2
        return super().forward(batch, model_outputs)


class WritesPastTheVersion(Changes):
    def change(self, batch: PreferenceBatch, outputs: ModelOutputs) -> None:
        outputs.per_token_logps.data[0] = 0


class WritesWhatWasThere(Changes):
    def change(self, batch: PreferenceBatch, outputs: ModelOutputs) -> None:
        batch.mask.mul_(1)


class CountsInTheDenominators(Changes):
    def change(self, batch: PreferenceBatch, outputs: ModelOutputs) -> None:
        batch.denominators.tokens += 1  # type: ignore[operator]


class AddsAField(Changes):
    def change(self, batch: PreferenceBatch, outputs: ModelOutputs) -> None:
        outputs.extra = outputs.mean_logps  # type: ignore[attr-defined]


class AddsAColumn(Changes):
    def change(self, batch: PreferenceBatch, outputs: ModelOutputs) -> None:
        batch.columns["extra"] = outputs.mean_logps  # type: ignore[index]


class ChangesWhatBackwardNeeds(Right):
    def of(self, margin: Tensor) -> Tensor:
        root = (1 + margin.square()).sqrt()
        loss = root.exp()
        root.sqrt_()  # of which `sqrt` above needs the value
        loss.mul_(2)  # of which `exp` does
        return loss


class SortsAColumn(Changes):
    columns = ("answer",)
    column_examples = {"answer": ("two", "one")}

    def change(self, batch: PreferenceBatch, outputs: ModelOutputs) -> None:
        batch.columns["answer"].sort()


# same_input_same_output


class Random(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) * torch.rand_like(margin)


class RandomMetric(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss, {"noise": torch.rand_like(metrics["margin"])}


class RandomInEvaluation(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) * (1 if self.training else torch.rand_like(margin))


class DropsOut(Right):
    def of(self, margin: Tensor) -> Tensor:
        return nn.functional.dropout(super().of(margin), 0.1, self.training)


class CallsCount(Right):
    calls = 0

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        self.calls += 1
        return loss, metrics if self.calls == 1 else {}


class ForgetsAtTheFifth(Right):
    calls = 0

    def of(self, margin: Tensor) -> Tensor:
        self.calls += 1
        return super().of(margin) * (1 + self.calls // 5)


# state


class Scaled(Right):
    """Its loss times `scale()`, of a buffer `count`."""

    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__(beta=beta)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def scale(self) -> Any:
        return 1 + self.count

    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) * self.scale()

    def on_step_end(self, step: int, observed: Any) -> None:
        self.count = self.count + 1


class CountsInAnAttribute(Right):
    steps = 0

    def on_step_end(self, step: int, observed: Any) -> None:
        self.steps += 1

    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) * (1 + self.steps)


class CountsBeginnings(CountsInAnAttribute):
    def on_step_begin(self, step: int) -> None:
        self.steps += 1

    def on_step_end(self, step: int, observed: Any) -> None:
        pass


class KeepsItsMeanInAnAttribute(Right):
    mean = 0.0

    def of(self, margin: Tensor) -> Tensor:
        self.observe("margin", margin.sum())
        return super().of(margin - self.mean)

    def on_step_end(self, step: int, observed: Any) -> None:
        self.mean = 0.9 * self.mean + 0.1 * float(observed["margin"])


class MovesInEvaluation(Scaled):
    def of(self, margin: Tensor) -> Tensor:
        self.count = 0.9 * self.count + 0.1 * super().of(margin).detach().mean().double()
        return Right.of(self, margin)


class RegistersInEvaluation(Right):
    def of(self, margin: Tensor) -> Tensor:
        if not self.training and not hasattr(self, "seen"):
            self.register_buffer("seen", margin.detach().mean())
        return super().of(margin)


class ReadsTheFirst(Scaled):
    """A copy reads the buffer of the loss that it was copied from."""

    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__(beta=beta)
        self.scale = lambda: 1 + self.count  # type: ignore[method-assign]


class NotesThatItWasResumed(Scaled):
    def on_step_begin(self, step: int) -> None:
        if step == 3 and not hasattr(self, "began"):
            self.register_buffer("resumed", torch.ones(()))
        self.began = True


class ForgetsWhatItOnlyKeeps(Scaled):
    steps = 0

    def scale(self) -> Any:
        return 1.0

    def on_step_end(self, step: int, observed: Any) -> None:
        self.steps += 1
        self.count = torch.tensor(float(self.steps), dtype=torch.float64)


class CachesWhatItLearns(Right):
    cached: Tensor | None = None

    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__(beta=beta)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def on_step_begin(self, step: int) -> None:
        self.cached = self.scale.detach().clone() if self.cached is None else self.cached

    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin * (1 if self.cached is None else self.cached)) + self.scale.square().to(margin)


class StartsAgain(Scaled):
    def on_train_begin(self, total_steps: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)


RUNNING: Cases = {
    "no_host_sync": SYNCS,
    "inputs_unchanged": [
        (PutsOthersInTheirPlace, "another tensor in the place of `outputs.per_token_logps`"),
        (ChangesTheMask, "`batch.mask`"),
        (ScalesTheAdvantages, "`batch.advantages` in place, by up to"),
        (WritesPastTheVersion, "`outputs.per_token_logps` in place, by up to"),
        (WritesWhatWasThere, "`batch.mask` in place, by up to 0"),
        (CountsInTheDenominators, "`denominators.tokens` in place, by up to 1"),
        (AddsAField, "adds ['outputs.extra']"),
        (AddsAColumn, "adds [\"batch.columns['extra']\"]"),
        (ChangesWhatBackwardNeeds, "an operation in place: "),
        (SortsAColumn, "changes a data-set column in place"),
    ],
    "same_input_same_output": [
        (RandomInEvaluation, "in evaluation"),
        (Random, "'the loss' of call 2"),
        (RandomMetric, "'noise' of call 2"),
        (DropsOut, "'the loss' of call "),
        (CallsCount, "the metrics ['margin'] are there in one of two calls only"),
        (ForgetsAtTheFifth, "'the loss' of call 5"),
    ],
    "state": [
        (CountsInAnAttribute, "resumed from its state_dict"),
        (CountsBeginnings, "resumed from its state_dict"),
        (KeepsItsMeanInAnAttribute, "resumed from its state_dict"),
        (MovesInEvaluation, "the state 'count' after an evaluation"),
        (RegistersInEvaluation, "after an evaluation the state has other entries: ['seen']"),
        (ReadsTheFirst, "deep-copied at step 3"),
        (NotesThatItWasResumed, "three steps after resuming the state has other entries: ['resumed']"),
        (ForgetsWhatItOnlyKeeps, "the state 'count' three steps after resuming"),
        (CachesWhatItLearns, "resumed from its state_dict"),
        (StartsAgain, "resumed from its state_dict"),
    ],
}
