"""Losses with one mistake each, under the check that must find it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl_custom_losses import ModelOutputs, PolicyBatch, PolicyLoss, PreferenceBatch, PreferenceLoss, Rollout


def right_margin(outputs: ModelOutputs) -> Tensor:
    chosen, rejected = outputs.mean_logps.chunk(2)
    return chosen - rejected


class Right(PreferenceLoss):
    """Nothing is wrong with it; the others differ from it, or from `RightPolicy`, in one place."""

    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        margin = right_margin(model_outputs)
        return -F.logsigmoid(self.beta * margin), {"margin": margin.detach()}


class RightPolicy(PolicyLoss):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return -batch.advantages * model_outputs.per_token_logps, {}


# declared_needs


class ReadsTheReference(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        chosen, rejected = model_outputs.log_ratios.chunk(2)
        return -F.logsigmoid(chosen - rejected), {}


class ReadsAColumn(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return super().forward(batch, model_outputs)[0] * batch.columns["score"], {}


class ReadsGroups(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return super().forward(batch, model_outputs)[0] * (batch.group_ids >= 0).unsqueeze(1), {}


# returns


class ReturnsNoMetrics(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return super().forward(batch, model_outputs)[0]


class ReturnsOneRowTooMany(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return torch.cat((loss, loss[:1])), metrics


class ComputesInFloat32(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, _ = super().forward(batch, model_outputs)
        return loss.float(), {}


class SurrogatePerSequence(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return -batch.advantages.squeeze(1) * model_outputs.logps, {}


# metrics


class MetricWithGradient(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return super().forward(batch, model_outputs)[0], {"margin": right_margin(model_outputs)}


class MetricIsNaN(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        margin = right_margin(model_outputs).detach()
        return super().forward(batch, model_outputs)[0], {"root": (-margin.abs()).sqrt()}


# needs_are_used


class RequiresLogitsForNothing(Right):
    requires = frozenset({"logits"})


class HasAColumnForNothing(Right):
    columns = ("score",)


# no_host_sync


class ReadsANumber(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, _ = super().forward(batch, model_outputs)
        return loss, {"largest": loss.new_tensor(loss.max().item())}


class Branches(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        if loss.mean() > 100:
            loss = loss / 2
        return loss, metrics


class PrintsATensor(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        str(loss)
        return loss, metrics


class PrintsAWord(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        print("here")
        return super().forward(batch, model_outputs)


class IndexesWithAMask(RightPolicy):
    reduction = "token_mean"

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        loss, _ = super().forward(batch, model_outputs)
        return loss, {"scored": loss.detach()[batch.mask > 0].mean()}


class MovesToTheHost(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss, {"margin": metrics["margin"].to("cpu")}


class MakesItsTensorsOnTheHost(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss * torch.ones(loss.size(0)), metrics


# inputs_unchanged


class ChangesTheMask(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        result = super().forward(batch, model_outputs)
        batch.mask[:, 0] = 0
        return result


class ScalesTheAdvantages(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        batch.advantages *= 2
        return super().forward(batch, model_outputs)


# same_input_same_output


class Random(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss * torch.rand_like(loss), metrics


# state


class CountsInAnAttribute(Right):
    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__(beta=beta)
        self.steps = 0

    def on_step_end(self, step: int, observed: Any) -> None:
        self.steps += 1

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss * (1 + self.steps), metrics


class MovesInEvaluation(Right):
    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__(beta=beta)
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        self.mean = 0.9 * self.mean + 0.1 * loss.detach().mean().double()
        return loss, metrics


# gradient


class DetachesAHalf(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        chosen, rejected = model_outputs.mean_logps.chunk(2)
        return -F.logsigmoid(self.beta * (chosen - rejected.detach())), {}


class WrongGradient(Right):
    stop_gradient = True

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss = super().forward(batch, model_outputs)[0]
        return _Doubled.apply(loss), {}


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


# gradient_reaches_the_policy


class TakesTheReferenceForThePolicy(Right):
    requires = frozenset({"ref_logps"})

    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__(beta=beta)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        chosen, rejected = model_outputs.ref_logps.chunk(2)
        return -F.logsigmoid(self.scale * (chosen - rejected)), {}


class TrainsItsScorer(Right):
    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__(beta=beta)
        self.scorer = nn.Linear(1, 1).eval()

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        score = self.scorer(model_outputs.mean_logps.unsqueeze(1).to(self.scorer.weight)).squeeze(1)
        return loss + score.chunk(2)[0].to(loss.dtype), metrics


# direction


class WrongSign(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return -F.logsigmoid(-self.beta * right_margin(model_outputs)), {}


class WrongSignOfTheAdvantage(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return batch.advantages * model_outputs.per_token_logps, {}


# masked_positions


class UnmaskedLogits(PreferenceLoss):
    requires = frozenset({"logits"})

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return torch.logsumexp(model_outputs.logits, -1).mean(1), {}


# half_precision


class StaysInHalfPrecision(PreferenceLoss):
    requires = frozenset({"logits"})
    reduction = "token_mean"

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return model_outputs.logits.masked_fill(model_outputs.mask.unsqueeze(-1) == 0, 0).square().mean(-1), {}


# padding


class MeanOverPositions(PreferenceLoss):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return -model_outputs.per_token_logps.mean(1), {}


# permutation


class WeighsByPosition(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss * torch.arange(1, loss.size(0) + 1, device=loss.device), metrics


# micro_batches


class AveragesItself(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss.mean(), metrics


# batch_coupling


class SubtractsTheBatchMean(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        margin = right_margin(model_outputs)
        return -F.logsigmoid(self.beta * (margin - margin.mean())), {}


class SaysThatItIsCoupled(Right):
    batch_coupled = True


# ranks


class MultipliesByTheRanks(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss * batch.ranks.count, metrics


class CollectiveOnOneRank(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        if batch.ranks.index == 0:
            metrics["everywhere"] = batch.ranks.sum(loss.detach().sum())
        return loss, metrics


# prepare_returns and prepare_on_ranks


class PreparesThisRankAlone(RightPolicy):
    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        own = rollout.rewards[rollout.local].nansum(1)
        return {"advantages": own - own.mean()}


class PreparesOneNumber(RightPolicy):
    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        return {"baseline": rollout.rewards.nanmean()}

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return super().forward(batch, model_outputs)[0], {}


# composition


class SharesItsState(RightPolicy):
    calls: list[int] = []

    def __init__(self) -> None:
        super().__init__()
        self.number = len(self.calls)
        self.calls.append(1)

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss * (1 + self.number % 2), metrics


# empty_completions


class DividesByTheTokens(PreferenceLoss):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return -(model_outputs.logps / model_outputs.mask.sum(1)), {}


# single_tokens


class SpreadOverTokens(PolicyLoss):
    surrogate = False
    reduction = "sequence_mean"

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        values, mask = model_outputs.per_token_logps, model_outputs.mask
        mean = (values.sum(1) / model_outputs.lengths).unsqueeze(1)
        squares = ((values - mean) ** 2).masked_fill(mask == 0, 0).sum(1)
        return squares / (model_outputs.mask.sum(1) - 1), {}


# extreme_log_ratios


class UnboundedRatio(RightPolicy):
    requires = frozenset({"old_per_token_logps"})

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        ratio = torch.exp(model_outputs.per_token_logps - model_outputs.old_per_token_logps)
        return -torch.min(ratio, ratio.clamp(0.8, 1.2)) * batch.advantages, {}


# hyperparameters


class NoAnnotation(Right):
    def __init__(self, *, beta=1.0) -> None:
        super().__init__()
        self.beta = beta


class DividesByBeta(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        margin = right_margin(model_outputs)
        return (margin - torch.ones_like(margin) / self.beta) ** 2, {}


# schedules


class KeepsAFunctionOfBeta(Right):
    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__(beta=beta)
        self.scale = lambda values: beta * values

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return -F.logsigmoid(self.scale(right_margin(model_outputs))), {}


#: By check, losses that it must find, and words that its message must have.
BROKEN: dict[str, list[tuple[type, str]]] = {
    "prepare_returns": [(PreparesOneNumber, "the shape (); the first dimension")],
    "declared_needs": [
        (ReadsTheReference, "ref_"),
        (ReadsAColumn, "'score' is in neither `columns`"),
        (ReadsGroups, "group_ids"),
    ],
    "returns": [
        (ReturnsNoMetrics, "a tensor and a dict of metrics"),
        (ReturnsOneRowTooMany, "found 5"),
        (ComputesInFloat32, "for torch.float64 log-probabilities the loss is torch.float32"),
        (SurrogatePerSequence, "surrogate = False"),
    ],
    "metrics": [(MetricWithGradient, "'margin' carries a gradient"), (MetricIsNaN, "'root'[0] is nan; 4 of 4")],
    "needs_are_used": [(RequiresLogitsForNothing, "`logits`"), (HasAColumnForNothing, "the column 'score'")],
    "no_host_sync": [
        (ReadsANumber, "`item` waits for the device (at "),
        (Branches, "if loss.mean() > 100"),
        (PrintsATensor, "printing a tensor"),
        (PrintsAWord, "prints 'here'"),
        (IndexesWithAMask, "indexing with a mask"),
        (MovesToTheHost, "to('cpu')"),
        (MakesItsTensorsOnTheHost, "device"),
    ],
    "inputs_unchanged": [
        (ChangesTheMask, "`batch.mask`"),
        (ScalesTheAdvantages, "`batch.advantages` in place, by up to"),
    ],
    "same_input_same_output": [(Random, "the second call")],
    "state": [(CountsInAnAttribute, "resumed from its state_dict"), (MovesInEvaluation, "after an evaluation")],
    "gradient": [(DetachesAHalf, "the difference quotient is"), (WrongGradient, ", 100 %)")],
    "gradient_reaches_the_policy": [
        (TakesTheReferenceForThePolicy, "no gradient reaches the policy"),
        (TrainsItsScorer, "the frozen parameter 'scorer.weight' gets a gradient"),
    ],
    "direction": [(WrongSign, "it should fall"), (WrongSignOfTheAdvantage, "where the advantage is positive")],
    "masked_positions": [(UnmaskedLogits, "masked positions")],
    "half_precision": [(StaysInHalfPrecision, "torch.bfloat16")],
    "padding": [(MeanOverPositions, "with 1 more padded positions")],
    "permutation": [(WeighsByPosition, "in another order")],
    "micro_batches": [(AveragesItself, "summed over 2 micro-batches")],
    "batch_coupling": [
        (SubtractsTheBatchMean, "declares `batch_coupled = False`"),
        (SaysThatItIsCoupled, "declares `batch_coupled = True`"),
    ],
    "ranks": [(MultipliesByTheRanks, "averaged over two ranks"), (CollectiveOnOneRank, "not all of them take part")],
    "prepare_on_ranks": [(PreparesThisRankAlone, "prepared on two ranks")],
    "composition": [(SharesItsState, "half of it is")],
    "empty_completions": [(DividesByTheTokens, "is nan")],
    "single_tokens": [(SpreadOverTokens, "is nan")],
    "extreme_log_ratios": [(UnboundedRatio, "advantage")],
    "hyperparameters": [(NoAnnotation, "'beta' has no type annotation"), (DividesByBeta, "beta = 0.0 is accepted")],
    "schedules": [(KeepsAFunctionOfBeta, "'beta' moved by a schedule")],
}
