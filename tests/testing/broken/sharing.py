"""Losses that are wrong on several ranks, with advantages for each token, or beside another loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trl_custom_losses import ModelOutputs, PolicyBatch, PreferenceBatch, Ranks, Rollout

from .base import Cases, Right, RightPolicy, composed, right_margin
from .gradients import _Scaled
from .invariances import AveragesItself, LocalMean

# ranks


class OnRanks(Right):
    """Its loss times what `factor` makes of the ranks."""

    def factor(self, ranks: Ranks, loss: Tensor) -> Any:
        return ranks.count

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss * self.factor(batch.ranks, loss.detach()), metrics


class MultipliesByTheRanks(OnRanks):
    pass


class CollectiveOnOneRank(OnRanks):
    def factor(self, ranks: Ranks, loss: Tensor) -> Any:
        if ranks.index == 0:
            ranks.sum(loss.sum())
        return 1


class CollectiveMoreOnOneRank(OnRanks):
    def factor(self, ranks: Ranks, loss: Tensor) -> Any:
        for _ in range(1 + ranks.index):
            ranks.gather(loss.sum().unsqueeze(0))
        return 1


class OtherShapeOnOneRank(OnRanks):
    def factor(self, ranks: Ranks, loss: Tensor) -> Any:
        ranks.sum(loss.new_zeros(1 + ranks.index))
        return 1


class RaisesOnOneRank(OnRanks):
    def factor(self, ranks: Ranks, loss: Tensor) -> Any:
        if ranks.index == 1:
            raise ValueError("rank 1 does not go on")
        ranks.sum(loss.sum())
        return 1


class SumsOverRanks(OnRanks):
    def factor(self, ranks: Ranks, loss: Tensor) -> Any:
        return ranks.sum(torch.ones_like(loss[0]))


class GathersOverRanks(OnRanks):
    def factor(self, ranks: Ranks, loss: Tensor) -> Any:
        return len(ranks.gather(loss.new_ones(1)))


class CoupledOnRanks(OnRanks):
    batch_coupled = True

    def of(self, margin: Tensor) -> Tensor:
        return super().of(margin - margin.mean())


class LocalOnRanks(LocalMean):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = super().forward(batch, model_outputs)
        return loss * batch.ranks.count, metrics


class GradientOverRanks(Right):
    """Counts on a gradient through `gather`, which carries none from rank to rank."""

    batch_coupled = True

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        margin = right_margin(model_outputs)
        return self.of(margin - batch.ranks.gather(margin).mean()), {}


# prepare_on_ranks


class PreparesThisRankAlone(RightPolicy):
    def prepare(self, rollout: Rollout) -> Any:
        own = rollout.rewards[rollout.local].nansum(1)
        return {"advantages": own - own.mean()}


class PreparesMoreOnOneProcess(RightPolicy):
    def prepare(self, rollout: Rollout) -> Any:
        own = rollout.advantages[rollout.local]
        return {"advantages": own} | ({"first": own} if rollout.ranks.count == 1 else {})


class PreparesNothingOnRanks(RightPolicy):
    def prepare(self, rollout: Rollout) -> Any:
        return {"advantages": rollout.advantages[rollout.local]} if rollout.ranks.count == 1 else {}


class PreparesWithOneRank(RightPolicy):
    def prepare(self, rollout: Rollout) -> Any:
        own = rollout.advantages[rollout.local]
        if rollout.ranks.index == 0:
            rollout.gather(own)
        return {"advantages": own}


class PreparesTokensOfThisRank(RightPolicy):
    def prepare(self, rollout: Rollout) -> Any:
        share = rollout.mask / rollout.mask.sum()
        return {"advantages": rollout.advantages[rollout.local].unsqueeze(1) * share}


# token_advantages


class SqueezesTheAdvantages(RightPolicy):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        weights = torch.linspace(0.5, 1, batch.advantages.size(1), device=batch.mask.device)
        return -(weights * batch.advantages)[:, -1:] * model_outputs.per_token_logps, {}


class AddsTheAdvantagesUp(RightPolicy):
    """Where they are given for each token, the gradient is as many times too large."""

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        values = model_outputs.per_token_logps
        return -batch.advantages.sum(1, keepdim=True) * (values - values.detach()), {}


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


class SharesItsGradient(SharesItsState):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        loss, metrics = RightPolicy.forward(self, batch, model_outputs)
        return _Scaled.apply(loss, 1 + self.number % 2), metrics


class PreparesAKeyOnOneRank(RightPolicy):
    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        own = rollout.advantages[rollout.local]
        return {"advantages": own} | ({"extra": own} if rollout.ranks.index == 1 else {})


class PreparesTheRowsOfAllRanks(RightPolicy):
    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        return {"advantages": rollout.advantages}


class GathersUnequalWidths(RightPolicy):
    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        return {"advantages": rollout.advantages[rollout.local] * rollout.gather(rollout.mask).sum()}


SHARING: Cases = {
    "ranks": [
        (MultipliesByTheRanks, "averaged over two ranks"),
        (CollectiveOnOneRank, "not all of them take part"),
        (CollectiveMoreOnOneRank, "not all of them take part"),
        (OtherShapeOnOneRank, "they exchange the shapes [(1,), (2,)]"),
        (RaisesOnOneRank, "ValueError: rank 1 does not go on"),
        (SumsOverRanks, "averaged over two ranks"),
        (GathersOverRanks, "averaged over two ranks"),
        (AveragesItself, "averaged over two ranks"),  # whose micro-batches are not equal
        (CoupledOnRanks, "averaged over two ranks"),
        (LocalOnRanks, "averaged over two ranks"),
        (GradientOverRanks, "the gradient (rows 'logps') averaged over two ranks"),
        (composed(CoupledOnRanks(), Right()), "averaged over two ranks"),
    ],
    "prepare_on_ranks": [
        (PreparesThisRankAlone, "'advantages' prepared on two ranks"),
        (PreparesMoreOnOneProcess, "['first'] are prepared in one of two cases only"),
        (PreparesNothingOnRanks, "['advantages'] are prepared in one of two cases only"),
        (PreparesWithOneRank, "not all of them take part"),
        (PreparesTokensOfThisRank, "'advantages' prepared on two ranks"),
        (PreparesAKeyOnOneRank, "'extra' is prepared on some of two ranks only"),
        (PreparesTheRowsOfAllRanks, "on a rank with 3 completions, 'advantages' has the shape (6,)"),
        (GathersUnequalWidths, "they exchange the shapes"),
    ],
    "token_advantages": [
        (SqueezesTheAdvantages, "the loss with advantages (B, T)"),
        (AddsTheAdvantagesUp, "the gradient (rows 'logps') with advantages (B, T)"),
    ],
    "composition": [
        (SharesItsState, "0.75 times the loss minus 0.25 times the loss"),
        (SharesItsGradient, "the gradient (rows 'logps') in a composition"),
    ],
}
