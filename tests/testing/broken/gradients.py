"""Mistakes in gradients: wrong, missing, of the wrong sign, at masked positions, lost in half precision."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl_custom_losses import ModelOutputs, PolicyBatch, PreferenceBatch, PreferenceLoss

from .base import Cases, Right, RightOnLogits, RightPolicy, composed, precise, scored


class _Scaled(torch.autograd.Function):
    """Values as they are, gradients times a factor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Any) -> Tensor:
        ctx.factor = factor
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None


# gradient


class DetachesAHalf(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        chosen, rejected = model_outputs.mean_logps.chunk(2)
        return self.of(chosen - rejected.detach()), {}


class WrongGradient(Right):
    stop_gradient = True

    def of(self, margin: Tensor) -> Tensor:
        return _Scaled.apply(super().of(margin), 2)


class SlightlyWrongGradient(Right):
    def of(self, margin: Tensor) -> Tensor:
        return _Scaled.apply(super().of(margin), 1 + 1e-4)


class WrongGradientOfLargeMargins(Right):
    def of(self, margin: Tensor) -> Tensor:
        return _Scaled.apply(super().of(margin), torch.where(margin.detach() > 1.25, 2, 1))


class WrongGradientOfLogits(RightOnLogits):
    def of(self, logits: Tensor, outputs: ModelOutputs) -> Tensor:
        return super().of(_Scaled.apply(logits, 2), outputs) - outputs.logps


class WrongGradientOfStates(Right):
    requires = frozenset({"pooled_hidden"})

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        states = _Scaled.apply(model_outputs.pooled_hidden, 2)
        return super().forward(batch, model_outputs)[0] + states.square().sum(1).chunk(2)[0], {}


class WrongGradientOfEntropies(RightPolicy):
    requires = frozenset({"entropies"})

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return super().forward(batch, model_outputs)[0] - 0.1 * model_outputs.entropies.detach(), {}


class Rough(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) + torch.sin(1e8 * margin)


class DetachesInTurns(Right):
    stop_gradient = True
    calls = 0

    def of(self, margin: Tensor) -> Tensor:
        self.calls += 1
        for _ in range(self.calls):
            margin = margin + 0 * margin.detach()
        return super().of(margin)


# gradient_reaches_the_policy


class TakesTheReferenceForThePolicy(Right):
    requires = frozenset({"ref_logps"})

    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__(beta=beta)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        chosen, rejected = model_outputs.ref_logps.chunk(2)
        return self.of(self.scale * (chosen - rejected)), {}


class TrainsItsScorer(Right):
    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__(beta=beta)
        self.scorer = nn.Linear(1, 1).eval()

    def of(self, margin: Tensor) -> Tensor:
        score = self.scorer(margin.unsqueeze(1).to(self.scorer.weight)).squeeze(1)
        return super().of(margin) + score.to(margin.dtype)


class DoesNotLearn(Right):
    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__(beta=beta)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin * self.scale.detach())


# direction


class WrongSign(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(-margin)


class NoDirection(Right):
    requires = frozenset({"ref_logps"})

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        chosen, rejected = model_outputs.log_ratios.chunk(2)
        return (chosen - rejected).square(), {}


class WrongSignOfLogits(PreferenceLoss):
    requires = frozenset({"logits"})

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        logps = model_outputs.logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        chosen, rejected = logps.masked_fill(model_outputs.mask == 0, 0).sum(1).chunk(2)
        return -F.logsigmoid(rejected - chosen), {}


class WrongSignOfTheAdvantage(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return batch.advantages * model_outputs.per_token_logps, {}


class IgnoresTheAdvantage(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return -model_outputs.per_token_logps, {}


# masked_positions


class UnmaskedLogits(PreferenceLoss):
    requires = frozenset({"logits"})

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return torch.logsumexp(model_outputs.logits, -1).mean(1), {}


class UnmaskedInTheValue(RightOnLogits):
    def of(self, logits: Tensor, outputs: ModelOutputs) -> Tensor:
        return super().of(logits, outputs) + logits.detach().mean((1, 2))


class UnmaskedSmallLogits(RightOnLogits):
    def of(self, logits: Tensor, outputs: ModelOutputs) -> Tensor:
        return super().of(logits, outputs) + logits.detach().masked_fill(logits.abs() > 100, 0).mean((1, 2))


class ExponentialTimesMask(RightOnLogits):
    def of(self, logits: Tensor, outputs: ModelOutputs) -> Tensor:
        return (logits.exp().mean(-1) * outputs.mask).sum(1)


class UnmaskedInTheGradient(RightOnLogits):
    def of(self, logits: Tensor, outputs: ModelOutputs) -> Tensor:
        return super().of(logits, outputs) + (logits - logits.detach()).mean((1, 2))


class UnmaskedInTheWeight(RightOnLogits):
    """What stands at masked positions scales the gradient of scored ones, and not the value."""

    def of(self, logits: Tensor, outputs: ModelOutputs) -> Tensor:
        ours, weight = scored(logits, outputs), logits.detach().mean((1, 2))
        return super().of(logits, outputs) + weight * (ours - ours.detach()).sum((1, 2))


# half_precision


class StaysInHalfPrecision(RightOnLogits):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return scored(model_outputs.logits, model_outputs).square().mean(-1).sum(1), {}


class ExponentiatesInHalfPrecision(RightOnLogits):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return precise(scored(model_outputs.logits, model_outputs).logsumexp(-1)).sum(1), {}


class WeighsInHalfPrecision(RightOnLogits):
    """Its weights are exact for two pairs, not for three."""

    reduction = "sequence_sum"

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss * precise(model_outputs.logits.new_ones(()) / batch.num_pairs), metrics


class GradientOverflowsInFloat16(RightOnLogits):
    def of(self, logits: Tensor, outputs: ModelOutputs) -> Tensor:
        return 1e8 * scored(logits.half().to(logits.dtype), outputs).mean(-1).sum(1)


GRADIENTS: Cases = {
    "gradient": [
        (DetachesAHalf, "the difference quotient is"),
        (WrongGradient, ", 100 %)"),
        (SlightlyWrongGradient, ", 0.01 %)"),
        (WrongGradientOfLargeMargins, ", 100 %)"),
        (WrongGradientOfLogits, "with respect to `logits`"),
        (WrongGradientOfStates, "with respect to `pooled_hidden`"),
        (WrongGradientOfEntropies, "with respect to `entropies`"),
        (Rough, "it jumps"),
        (DetachesInTurns, "takes another way through its code"),
    ],
    "gradient_reaches_the_policy": [
        (TakesTheReferenceForThePolicy, "no gradient reaches the policy"),
        (TrainsItsScorer, "the frozen parameter 'scorer.weight' gets a gradient"),
        (DoesNotLearn, "own parameter 'scale' is not part of the loss"),
    ],
    "direction": [
        (WrongSign, "it should fall"),
        (NoDirection, "changes by +0 a nat"),
        (WrongSignOfLogits, "it should fall"),
        (WrongSignOfTheAdvantage, "where the advantage is positive"),
        (IgnoresTheAdvantage, "where the advantage is positive"),
        (composed(Right(), WrongSign()), "the loss of 'part_1'"),
    ],
    "masked_positions": [
        (UnmaskedLogits, "masked positions"),
        (UnmaskedInTheValue, "with -7.0 at masked positions, and"),
        (UnmaskedSmallLogits, "with -7.0 at masked positions, and"),
        (ExponentialTimesMask, "with 100000.0 at masked positions, and"),
        (UnmaskedInTheGradient, "masked positions of `logits` get a gradient"),
        (UnmaskedInTheWeight, "scored positions of `logits`, with -7.0"),
    ],
    "half_precision": [
        (StaysInHalfPrecision, "torch.bfloat16"),
        (ExponentiatesInHalfPrecision, "in float32 the same numbers give"),
        (WeighsInHalfPrecision, "in float32 the same numbers give"),
        (GradientOverflowsInFloat16, "the bfloat16 gradient with respect to `logits`"),
    ],
}
