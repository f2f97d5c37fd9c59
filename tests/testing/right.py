"""Losses without a mistake, each near one that a check looks for: all of them pass every check."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl_custom_losses import (
    LossConfigError,
    Metric,
    ModelOutputs,
    PolicyBatch,
    PolicyLoss,
    PreferenceBatch,
    PreferenceLoss,
    Rollout,
)
from trl_custom_losses.state import HostState, host_zeros

from .broken.base import Right, RightOnLogits, RightPolicy, composed, right_margin
from .broken.invariances import LocalMean


class KTO(Right):
    """Compares each completion with the batch's mean log-ratio, through which no gradient goes."""

    requires = frozenset({"ref_logps"})
    batch_coupled = True
    stop_gradient = True

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        ratios = model_outputs.log_ratios
        chosen, rejected = (ratios - ratios.detach().mean().clamp(min=0)).chunk(2)
        return torch.cat((1 - torch.sigmoid(chosen), 1 - torch.sigmoid(-rejected))), {}


class BaselineOfAllRanks(Right):
    batch_coupled = True
    stop_gradient = True

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        margin = right_margin(model_outputs)
        mean = batch.ranks.gather(margin.detach()).mean()
        count = batch.ranks.sum(torch.ones_like(mean))
        return self.of(margin - mean), {"count": count}


class StandardisesTheBatch(Right):
    batch_coupled = True
    minimum_batch = 2

    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin + 0.1 * (margin - margin.mean()) / (1 + margin.var()).sqrt())


class NearTheReference(Right):
    """IPO with a small target: beyond it, as far from the reference as random data is, it rises."""

    requires = frozenset({"ref_logps"})

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        chosen, rejected = model_outputs.log_ratios.chunk(2)
        return (chosen - rejected - 0.01).square(), {}


class FarFromTheReference(Right):
    """The reference matters only to log-ratios above 2."""

    requires = frozenset({"ref_logps"})

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        excess = F.relu(model_outputs.log_ratios - 2).chunk(2)[1]
        return super().forward(batch, model_outputs)[0] + excess, {}


class BelowTheReference(Right):
    requires = frozenset({"ref_logps"})

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        lack = F.relu(-2 - model_outputs.log_ratios).chunk(2)[0]
        return super().forward(batch, model_outputs)[0] + lack, {}


class ReferenceInAMetric(Right):
    requires = frozenset({"ref_logps"})

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, _ = super().forward(batch, model_outputs)
        return loss, {"log_ratio": Metric(model_outputs.log_ratios.detach(), reduce="max")}


class ReferenceInTheGradient(RightPolicy):
    """The value is 0 wherever the policy is; the reference weighs its gradient."""

    requires = frozenset({"ref_per_token_logps"})
    stop_gradient = True

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        values = model_outputs.per_token_logps
        weights = batch.advantages * torch.sigmoid(model_outputs.ref_per_token_logps)
        return -weights * (values - values.detach()), {}


class LogitsDPO(RightOnLogits):
    prefers_chosen = True

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        logps = model_outputs.logits.float() if model_outputs.logits.dtype.itemsize == 2 else model_outputs.logits
        logps = logps.log_softmax(-1).gather(-1, batch.input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        chosen, rejected = logps.masked_fill(model_outputs.mask == 0, 0).sum(1).chunk(2)
        return -F.logsigmoid(chosen - rejected), {}


class LogitsTimesMask(RightOnLogits):
    """Logits are finite, so that a product with 0 takes them away."""

    def of(self, logits: Tensor, outputs: ModelOutputs) -> Tensor:
        return (logits.logsumexp(-1) * outputs.mask).sum(1)


class ScoresStates(Right):
    """A layer of its own, in float32, on the policy's states."""

    requires = frozenset({"pooled_hidden"})
    prefers_chosen = False

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        scores = self.layer(model_outputs.pooled_hidden).squeeze(1)
        chosen, rejected = scores.chunk(2)
        return self.of(chosen - rejected), {}


class LearnsItsScale(Right):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin * self.log_scale.exp()) + self.log_scale.square().to(margin)


class RunningMean(Right):
    """An exponential mean of the margins of all ranks, kept on the host."""

    stop_gradient = True

    def __init__(self) -> None:
        super().__init__()
        self.kept = HostState()
        self.kept.register_buffer("mean", host_zeros())

    def of(self, margin: Tensor) -> Tensor:
        self.observe("margin", torch.stack((margin.sum(), margin.new_tensor(float(margin.numel())))))
        return super().of(margin - self.kept.mean.item())

    def on_step_end(self, step: int, observed: Any) -> Any:
        total, count = observed["margin"]
        self.kept.mean.mul_(0.9).add_(0.1 * total / count)
        return {"mean": float(self.kept.mean)}


class AssignsThroughAMask(Right):
    """One number, for which nobody counts the places."""

    def of(self, margin: Tensor) -> Tensor:
        weights = torch.ones_like(margin)
        weights[margin < -100] = 0.5
        weights[margin > 100] = torch.zeros_like(weights[0])
        return super().of(margin) * weights


class Focal(Right):
    stop_gradient = True

    def of(self, margin: Tensor) -> Tensor:
        with torch.no_grad():
            weight = torch.sigmoid(-margin)
        return super().of(margin) * weight


class _Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return values * values * values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        return 3 * values.square() * gradient


class OwnBackward(Right):
    def of(self, margin: Tensor) -> Tensor:
        return _Cubed.apply(super().of(margin.clamp(-50, 50)))


class OwnBackwardBesideAStop(OwnBackward):
    stop_gradient = True

    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin) * torch.sigmoid(margin).detach()


class TextColumn(Right):
    columns = ("answer",)
    column_examples = {"answer": ("long answer", "short", "none")}

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss * loss.new_tensor([float(len(text)) for text in batch["answer"]]), metrics


class DistanceFromAHalf(Right):
    """One minus a value changes nothing."""

    columns = ("score",)

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss * (batch["score"] - 0.5).abs(), metrics


class TwoHalvesAlike(DistanceFromAHalf):
    """A half more or less changes nothing."""

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = Right.forward(self, batch, model_outputs)
        return loss * (2 * batch["score"] % 1), metrics


class UnmeasuredMetric(Right):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        kept = (metrics["margin"] > 1e9).to(loss.dtype)
        return loss, {"far": Metric(metrics["margin"], mask=kept), "none": loss.new_zeros(())}


class OptionalNumbers(Right):
    """Hyperparameters of several types, and one without a type that it checks itself."""

    def __init__(self, *, beta: float = 1.0, clip: float | None = None, flip: bool = False, kind="a") -> None:
        super().__init__(beta=beta)
        if kind not in ("a", "b"):
            raise LossConfigError(f"hyperparameter 'kind': expected 'a' or 'b', found {kind!r}")
        self.clip, self.flip, self.kind = clip, flip, kind

    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin if self.clip is None else margin.clamp(max=self.clip))


def refuses(batch: PreferenceBatch, outputs: ModelOutputs, *, beta: float = 0.5) -> Any:
    """A function says with a `ValueError` what it does not take."""
    if beta <= 0:
        raise ValueError(f"beta must be > 0, found {beta}")
    return -F.logsigmoid(right_margin(outputs) / beta), {}


class GSPO(RightPolicy):
    requires = frozenset({"old_per_token_logps"})
    reduction = "sequence_mean"

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        difference = model_outputs.per_token_logps - model_outputs.old_per_token_logps
        ratio = (difference.sum(1) / model_outputs.lengths).clamp(max=20).exp().unsqueeze(1)
        return -torch.min(ratio * batch.advantages, ratio.clamp(0.999, 1.001) * batch.advantages), {}


class CISPO(RightPolicy):
    requires = frozenset({"old_per_token_logps"})
    stop_gradient = True

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        difference = model_outputs.per_token_logps - model_outputs.old_per_token_logps
        weight = difference.detach().clamp(max=2).exp()
        return -weight * batch.advantages * model_outputs.per_token_logps, {}


class KinkWhereItStands(RightPolicy):
    """Its ratio is 1 everywhere, which is where it begins to clip falls of the ratio of first tokens."""

    stop_gradient = True

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        ratio = (model_outputs.per_token_logps - model_outputs.per_token_logps.detach()).exp()
        clipped = torch.where(batch.mask.cumsum(1) == 1, ratio.clamp(min=1), ratio)
        return -torch.min(ratio * batch.advantages, clipped * batch.advantages), {}


class CrossEntropyOfTransposed(PreferenceLoss):
    """Its gradient is laid out in another order than its input."""

    requires = frozenset({"logits"})
    reduction = "token_mean"
    prefers_chosen = False

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        logits = model_outputs.logits.float() if model_outputs.logits.dtype is torch.bfloat16 else model_outputs.logits
        logits = logits.masked_fill(model_outputs.mask.unsqueeze(-1) == 0, 0)
        return F.cross_entropy(logits.transpose(1, 2), batch.input_ids[:, 1:], reduction="none"), {}


class WeighsPairs(Right):
    """Two columns, one by the name of the README's example."""

    columns = ("weight", "difficulty")

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss * batch.columns["weight"] * (1 + batch.columns["difficulty"]), metrics


class NeedsTwoPairs(Right):
    """Does not run on fewer pairs than it declares."""

    batch_coupled = True
    minimum_batch = 2

    def of(self, margin: Tensor) -> Tensor:
        if margin.size(0) < 2:
            raise ValueError("needs two pairs")
        return super().of(margin / (1 + margin.std()))


class EntropyBonus(PolicyLoss):
    requires = frozenset({"entropies"})
    surrogate = False

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        return -model_outputs.entropies, {}


class KLTerm(PolicyLoss):
    requires = frozenset({"ref_per_token_logps"})
    surrogate = False

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        difference = (model_outputs.ref_per_token_logps - model_outputs.per_token_logps).clamp(max=20)
        return difference.expm1() - difference, {}


class RLOO(RightPolicy):
    """Advantages over the others of a group, of which unscored rewards are no part."""

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        rewards = (rollout.rewards * rollout.reward_weights).nansum(1)
        same = (rollout.group_ids.unsqueeze(1) == rollout.group_ids).to(rewards.dtype)
        counts = same.sum(1)
        others = (same @ rewards - rewards) / (counts - 1).clamp(min=1)
        return {"advantages": (rewards - others)[rollout.local], "group_size": counts.long()[rollout.local]}


class RewardsAtHand(RightPolicy):
    requires = frozenset({"rewards"})

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        weights = torch.sigmoid(batch.rewards.nan_to_num(0).sum(1, keepdim=True))
        return -weights * batch.advantages * model_outputs.per_token_logps, {}


class PreparesTokens(RightPolicy):
    """A weight for each token, as wide as this rank's longest completion."""

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        old = rollout.forward().per_token_logps
        longest = rollout.gather_padded(rollout.mask).sum(1).max()
        return {"weights": torch.sigmoid(old) * rollout.mask / longest}

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        weights = F.pad(batch["weights"], (0, 100))[:, : batch.mask.size(1)]
        return super().forward(batch, model_outputs)[0] * weights.clamp(min=0.01), {}


class ComparesGroups(RightPolicy):
    """A baseline of the completions of one prompt that are in the micro-batch."""

    requires = frozenset({"group_ids"})
    batch_coupled = True
    reduction = "sequence_mean"

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        same = (batch.group_ids.unsqueeze(1) == batch.group_ids).to(model_outputs.per_token_logps.dtype)
        mean = (same / same.sum(1, keepdim=True)) @ torch.sigmoid(model_outputs.mean_logps)
        return -batch.advantages * model_outputs.per_token_logps * (1 + mean.unsqueeze(1)), {}


#: Classes, functions and configs.
RIGHT: list[Any] = [
    *(found for found in list(vars().values()) if isinstance(found, type) and found.__module__ == __name__),
    refuses,
    Right,
    RightPolicy,
    RightOnLogits,
    LocalMean,
    composed(RightPolicy(), LocalMean(), RLOO()),
    composed(KTO(), Right(), RunningMean()),
]
RIGHT.remove(_Cubed)
