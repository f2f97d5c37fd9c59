"""Losses that fail where there is nothing to score, or where numbers are far out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trl_custom_losses import ModelOutputs, PolicyBatch, PolicyLoss, PreferenceBatch, PreferenceLoss

from .base import Cases, Right, RightOnLogits, RightPolicy

# empty_completions


class DividesByTheTokens(PreferenceLoss):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return -(model_outputs.logps / model_outputs.mask.sum(1)), {}


class GuardsTheBatchAlone(PreferenceLoss):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        lengths = model_outputs.mask.sum(1)
        return -model_outputs.logps / torch.where(lengths.any(), lengths, 1), {}


class DividesByAllTokens(PreferenceLoss):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        return -model_outputs.logps / model_outputs.mask.sum(), {}


class RootOfNothing(RightOnLogits):
    """Which is 0, with an infinite slope."""

    def of(self, logits: Tensor, outputs: ModelOutputs) -> Tensor:
        return (logits * outputs.mask.unsqueeze(-1)).square().sum((1, 2)).sqrt()


class ReadsUnscoredLogits(RightOnLogits):
    def of(self, logits: Tensor, outputs: ModelOutputs) -> Tensor:
        return super().of(logits, outputs) + logits[:, 0].mean(-1)


# single_tokens


class SpreadOverTokens(PolicyLoss):
    surrogate = False
    reduction = "sequence_mean"

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        values, mask = model_outputs.per_token_logps, model_outputs.mask
        mean = (values.sum(1) / model_outputs.lengths).unsqueeze(1)
        squares = ((values - mean) ** 2).masked_fill(mask == 0, 0).sum(1)
        return squares / (model_outputs.mask.sum(1) - 1), {}


class DifferencesOfTokens(PreferenceLoss):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        both = model_outputs.mask[:, 1:] * model_outputs.mask[:, :-1]
        return (model_outputs.per_token_logps.diff(dim=1).square() * both).sum(1), {}


class RootOfDifferences(PreferenceLoss):
    """Finite, but not its gradient."""

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        values, mask = model_outputs.per_token_logps, model_outputs.mask
        mean = model_outputs.mean_logps.unsqueeze(1)
        return (values - mean).masked_fill(mask == 0, 0).square().sum(1).sqrt(), {}


# extreme_log_ratios


class LogOfSigmoid(Right):
    def of(self, margin: Tensor) -> Tensor:
        return -torch.log(torch.sigmoid(self.beta * margin))


class Overflows(PreferenceLoss):
    """Where both log-ratios have the given signs and are far out."""

    requires = frozenset({"ref_logps"})
    prefers_chosen = False

    def __init__(self, *, chosen: int = 1, rejected: int = 1) -> None:
        super().__init__()
        self.chosen, self.rejected = chosen, rejected

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        chosen, rejected = model_outputs.log_ratios.chunk(2)
        return torch.minimum(self.chosen * chosen, self.rejected * rejected).exp(), {}


class OverflowsInTheMiddle(Overflows):
    """At 80, but not at 10,000."""

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> Any:
        chosen, rejected = model_outputs.log_ratios.chunk(2)
        margin = chosen + rejected
        return margin.masked_fill(margin > 1000, 0).exp(), {}


class OverflowsOfPolicy(RightPolicy):
    """Where log-ratio and advantage have the given signs and are far out."""

    requires = frozenset({"old_per_token_logps"})

    def __init__(self, *, ratio: int = 1, advantage: int = 1) -> None:
        super().__init__()
        self.ratio, self.advantage = ratio, advantage

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        ratios = self.ratio * (model_outputs.per_token_logps - model_outputs.old_per_token_logps)
        far = torch.minimum(ratios, self.advantage * batch.advantages).exp()
        return super().forward(batch, model_outputs)[0] + far, {}


class OverflowsOfPolicyInTheMiddle(RightPolicy):
    requires = frozenset({"old_per_token_logps"})

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        ratios = model_outputs.per_token_logps - model_outputs.old_per_token_logps
        return super().forward(batch, model_outputs)[0] * (2 * ratios).masked_fill(ratios > 1000, 0).exp(), {}


class UnboundedRatio(RightPolicy):
    requires = frozenset({"old_per_token_logps"})

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> Any:
        ratio = torch.exp(model_outputs.per_token_logps - model_outputs.old_per_token_logps)
        return -torch.min(ratio, ratio.clamp(0.8, 1.2)) * batch.advantages, {}


_FAR = "10000"

NUMERICS: Cases = {
    "empty_completions": [
        (DividesByTheTokens, "where one completion is empty, the loss is nan"),
        (GuardsTheBatchAlone, "where one completion is empty, the loss is nan"),
        (DividesByAllTokens, "where all completions are empty, the loss is nan"),
        (RootOfNothing, "where one completion is empty, the gradient (rows 'logits')"),
        (ReadsUnscoredLogits, "positions that are not scored (rows 'logits') get a gradient"),
    ],
    "single_tokens": [
        (SpreadOverTokens, "the loss is nan"),
        (DifferencesOfTokens, "all gradients are 0"),
        (RootOfDifferences, "for completions of one token, the gradient (rows 'logps')"),
    ],
    "extreme_log_ratios": [
        (LogOfSigmoid, f"at log-ratios of -{_FAR} (chosen) and {_FAR} nats (rejected), the loss is inf"),
        *(
            (Overflows(chosen=c, rejected=r), f"at log-ratios of {c}{_FAR[1:]} (chosen) and {r}{_FAR[1:]} nats")
            for c in (-1, 1)
            for r in (-1, 1)
        ),
        (OverflowsInTheMiddle, "at log-ratios of 80 (chosen) and 80 nats (rejected)"),
        *(
            (OverflowsOfPolicy(ratio=r, advantage=a), f"a log-ratio of {r}{_FAR[1:]} nats and an advantage of {a}0000")
            for r in (-1, 1)
            for a in (-1, 1)
        ),
        (OverflowsOfPolicyInTheMiddle, "a log-ratio of 80 nats"),
        (UnboundedRatio, "the gradient (rows 'logps')"),
    ],
}
