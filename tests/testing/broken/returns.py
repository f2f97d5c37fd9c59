"""Mistakes in what a loss needs, prepares and returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trl_custom_losses import Metric, ModelOutputs, PolicyBatch, PreferenceBatch, Rollout
from trl_custom_losses.reductions import FixedLengthMean

from .base import Cases, Right, RightPolicy, right_margin

# prepare_returns


class PreparesOneNumber(RightPolicy):
    def prepare(self, rollout: Rollout) -> Any:
        return {"baseline": rollout.rewards.nanmean()}


class PreparesTooFew(RightPolicy):
    def prepare(self, rollout: Rollout) -> Any:
        return {"advantages": rollout.advantages[rollout.local][1:]}


class PreparesAList(RightPolicy):
    def prepare(self, rollout: Rollout) -> Any:
        return [rollout.advantages[rollout.local]]


class PreparesAFloat(RightPolicy):
    def prepare(self, rollout: Rollout) -> Any:
        return {"baseline": 0.5}


class PreparesAGradient(RightPolicy):
    def prepare(self, rollout: Rollout) -> Any:
        return {"advantages": rollout.advantages[rollout.local].clone().requires_grad_()}


class PreparesNoise(RightPolicy):
    def prepare(self, rollout: Rollout) -> Any:
        return {"advantages": torch.rand_like(rollout.advantages[rollout.local])}


class PreparesOnceMore(RightPolicy):
    calls = 0

    def prepare(self, rollout: Rollout) -> Any:
        self.calls += 1
        own = rollout.advantages[rollout.local]
        return {"advantages": own} | ({"first": own} if self.calls == 1 else {})


class SumsUnscoredRewards(RightPolicy):
    def prepare(self, rollout: Rollout) -> Any:
        return {"advantages": rollout.rewards.sum(1)[rollout.local]}


class CannotPrepare(RightPolicy):
    def prepare(self, rollout: Rollout) -> Any:
        return {"advantages": rollout.rewards.reshape(-1, 7)[rollout.local]}


# declared_needs


class ReadsTheReference(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        chosen, rejected = model_outputs.log_ratios.chunk(2)
        return self.of(chosen - rejected), {}


class ReadsAColumn(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return super().forward(batch, model_outputs)[0] * batch.columns["score"], {}


class ReadsGroups(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return super().forward(batch, model_outputs)[0] * (batch.group_ids >= 0).unsqueeze(1), {}


class ReadsRewards(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return super().forward(batch, model_outputs)[0] + batch.rewards.nanmean(), {}


class HasATypo(Right):
    def of(self, margin: Tensor) -> Tensor:
        return -self.beta * margn  # type: ignore[name-defined]  # noqa: F821


class FailsWithinTorch(Right):
    def of(self, margin: Tensor) -> Tensor:
        return torch.nn.functional.softmax(margin, dim=3)


# returns


class ReturnsNoMetrics(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return super().forward(batch, model_outputs)[0]


class ReturnsOneRowTooMany(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(torch.cat((margin, margin[:1])))


class ComputesInFloat32(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin).float()


class ComputesInFloat64(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin).double()


class MixesDtypes(Right):
    requires = frozenset({"pooled_hidden"})

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return (model_outputs.pooled_hidden @ torch.ones(3)).chunk(2)[0], {}


class SurrogatePerSequence(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return -batch.advantages.squeeze(1) * model_outputs.logps, {}


class Detached(Right):
    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin).detach()


class CompositeOfRows(Right):
    composite = True


class LossIsNaN(Right):
    def of(self, margin: Tensor) -> Tensor:
        return (-1 - margin.abs()).sqrt()


class DividesByTheMask(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return super().forward(batch, model_outputs)[0] / model_outputs.mask, {}


class DividesByNoLength(RightPolicy):
    reduction = FixedLengthMean(0)


class UnscoredRewards(RightPolicy):
    requires = frozenset({"rewards"})

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return -batch.rewards.sum(1, keepdim=True) * model_outputs.per_token_logps, {}


# metrics


class WithMetrics(Right):
    """Gives `found(margin)` as its metrics."""

    def found(self, margin: Tensor) -> Any:
        return {}

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return super().forward(batch, model_outputs)[0], self.found(right_margin(model_outputs))


class MetricWithGradient(WithMetrics):
    def found(self, margin: Tensor) -> Any:
        return {"margin": margin}


class WrappedMetricWithGradient(WithMetrics):
    def found(self, margin: Tensor) -> Any:
        return {"margin": Metric(margin, reduce="max")}


class MetricIsNaN(WithMetrics):
    def found(self, margin: Tensor) -> Any:
        return {"root": (-margin.detach().abs()).sqrt()}


class MetricIsInfinite(WithMetrics):
    def found(self, margin: Tensor) -> Any:
        return {"inverse": Metric(1 / (0 * margin.detach()))}


class MetricNamedByANumber(WithMetrics):
    def found(self, margin: Tensor) -> Any:
        return {3: margin.detach()}


class MetricWithoutAName(WithMetrics):
    def found(self, margin: Tensor) -> Any:
        return {"": margin.detach()}


class MetricIsAFloat(WithMetrics):
    def found(self, margin: Tensor) -> Any:
        return {"beta": self.beta}


class MetricOfAnotherShape(WithMetrics):
    def found(self, margin: Tensor) -> Any:
        return {"margin": margin.detach().new_ones(3, 7)}


# needs_are_used


class RequiresLogitsForNothing(Right):
    requires = frozenset({"logits"})


class RequiresTheReferenceForNothing(Right):
    requires = frozenset({"ref_logps"})


class RequiresGroupsForNothing(RightPolicy):
    requires = frozenset({"group_ids"})


class RequiresRewardsForNothing(RightPolicy):
    requires = frozenset({"rewards"})


class HasAColumnForNothing(Right):
    columns = ("score",)


class HasATextForNothing(Right):
    columns = ("answer",)
    column_examples = {"answer": ("one", "two")}


RETURNS: Cases = {
    "prepare_returns": [
        (PreparesOneNumber, "the shape (); the first dimension"),
        (PreparesTooFew, "the shape (3,); the first dimension"),
        (PreparesAList, "found list"),
        (PreparesAFloat, "'baseline' is 0.5 (float), not a tensor"),
        (PreparesAGradient, "'advantages' carries a gradient"),
        (PreparesNoise, "something else when it is called again"),
        (PreparesOnceMore, "something else when it is called again"),
        (SumsUnscoredRewards, "left a completion unscored (NaN),[0] is nan"),
        (CannotPrepare, "in `prepare`, the loss raises RuntimeError: shape '[-1, 7]'"),
    ],
    "declared_needs": [
        (ReadsTheReference, "ref_"),
        (ReadsAColumn, "'score' is in neither `columns`"),
        (ReadsGroups, "group_ids"),
        (ReadsRewards, "rewards"),
        (HasATypo, "return -self.beta * margn"),
        (FailsWithinTorch, "softmax(margin, dim=3)"),
    ],
    "returns": [
        (ReturnsNoMetrics, "a tensor and a dict of metrics"),
        (ReturnsOneRowTooMany, "found 5"),
        (ComputesInFloat32, "for torch.float64 log-probabilities the loss is torch.float32"),
        (ComputesInFloat64, "for torch.float32 log-probabilities the loss is torch.float64"),
        (MixesDtypes, "It is called with torch.float64 here"),
        (SurrogatePerSequence, "surrogate = False"),
        (Detached, "was detached"),
        (CompositeOfRows, "reduces itself to a scalar, found (4,)"),
        (LossIsNaN, "the loss[0] is nan"),
        (DividesByTheMask, "the loss[2, 4] is nan"),
        (DividesByNoLength, "the reduced loss is"),
        (UnscoredRewards, "left a completion unscored (NaN),[0, 0] is nan"),
    ],
    "metrics": [
        (MetricWithGradient, "'margin' carries a gradient"),
        (WrappedMetricWithGradient, "'margin' carries a gradient"),
        (MetricIsNaN, "'root'[0] is nan; 4 of 4"),
        (MetricIsInfinite, "'inverse'[0] is "),
        (MetricNamedByANumber, "found 3"),
        (MetricWithoutAName, "found ''"),
        (MetricIsAFloat, "'beta' is 1.0 (float), not a tensor"),
        (MetricOfAnotherShape, "(3, 7)"),
    ],
    "needs_are_used": [
        (RequiresLogitsForNothing, "`logits`"),
        (RequiresTheReferenceForNothing, "`ref_logps`"),
        (RequiresGroupsForNothing, "`group_ids`"),
        (RequiresRewardsForNothing, "`rewards`"),
        (HasAColumnForNothing, "the column 'score'"),
        (HasATextForNothing, "the column 'answer'"),
    ],
}
