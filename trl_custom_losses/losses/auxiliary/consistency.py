"""Consistency: between similar pairs of a batch, or between two stochastic passes."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base import Metrics
from ...errors import LossConfigError
from ...hyperparameters import check_choice, check_range
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PreferenceBatch
from ..preference.log_ratio import LogRatioLoss

Mode = Literal["neighbours", "rdrop"]


@LossFunctionRegistry.register("consistency")
class ConsistencyLoss(LogRatioLoss):
    """Consistency: similar pairs get similar margins, or two passes with other dropout the same distributions.

    neighbours: loss = sum_{i != j} w_ij (m_i - m_j)^2 / sum_{i != j} w_ij,  w_ij = max(cos(h_i, h_j) - threshold, 0)
        m = beta (log_ratio_chosen - log_ratio_rejected),  h = mean hidden state of prompt and chosen completion
    rdrop: loss_t = (KL(p_t || q_t) + KL(q_t || p_t)) / 2,  p, q = next-token distributions of the two passes

    `neighbours` is this package's reading of the tutorial's "consistency between similar examples", which returns 0
    there. h gets no gradient. Partners are all pairs of the micro-batch on all ranks, so the value depends on how a
    batch is split; over micro-batches it is averaged. One pair per device compares with those of the other devices. A
    batch without neighbours gives 0. Logs `consistency_neighbours`, the mean number of partners with a weight: mean
    hidden states of language models are alike (cosines of 0.7 and more are common), so tune `threshold` by it.

    `rdrop` runs the policy a second time and so doubles the cost of its forward and backward pass; it also keeps the
    logits of both passes in memory. The trainer refuses a model without dropout, where the two passes are equal
    (`DPOConfig.disable_dropout` is True by default). It covers the chosen completions, all tokens of the optimizer step
    alike, as the authors' code does; both distributions get gradient. In evaluation, without dropout, it is 0.

    Args:
        mode: "neighbours" or "rdrop".
        threshold: Cosine from which pairs are neighbours, -1 to 1; at 1 there are none (neighbours only).
        beta: Scale of the margin, > 0, per nat (neighbours only).

    Source: neighbours: the source tutorial; rdrop: Liang et al. 2021, arXiv:2106.14448.
    """

    example = {"threshold": -0.5}  # the hidden states of random data are hardly alike

    prefers_chosen = False

    def __init__(self, *, mode: Mode = "neighbours", threshold: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.mode = check_choice("mode", mode, Mode)
        self.threshold = check_range("threshold", threshold, at_least=-1, at_most=1)
        if mode == "rdrop" and threshold != 0.5:
            raise LossConfigError("'threshold' has no effect in the mode 'rdrop': leave it out, or use 'neighbours'")
        if mode == "neighbours":
            self.requires = frozenset({"ref_logps", "sequence_hidden"})
            self.batch_coupled = True
            self.minimum_batch = 2
        else:
            self.requires = frozenset({"logits", "second_logits"})
            self.reduction = "token_mean"
            self.f_divergence = "independent"

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        if self.mode == "neighbours":
            return self._between_pairs(batch, model_outputs)
        rows = batch.num_pairs
        passes = (model_outputs.logits[:rows], model_outputs.second_logits[:rows])
        return symmetric_kl(*passes, model_outputs.mask[:rows]), {}

    def _between_pairs(self, batch: PreferenceBatch, outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        chosen, rejected = outputs.log_ratios.chunk(2)
        margins = self.beta * (chosen - rejected)
        hidden = F.normalize(outputs.sequence_hidden[: batch.num_pairs], dim=1)
        # One collective for both.
        gathered = batch.ranks.gather(torch.cat((hidden, margins.detach().unsqueeze(1)), dim=1))
        states, partners = gathered[:, :-1], gathered[:, -1]

        # Rounding may lift a cosine above 1, where a threshold of 1 would let it pass.
        cosines = (states @ states.T).clamp(max=1)
        weights = F.relu(cosines - self.threshold).fill_diagonal_(0)
        mine = weights[batch.ranks.index * batch.num_pairs :][: batch.num_pairs]
        total = weights.sum()
        total = total.masked_fill(total == 0, 1)
        # The mean over all ranks' pairs is the loss.
        values = partners.numel() * (mine * (margins.unsqueeze(1) - partners) ** 2).sum(1) / total
        neighbours = (mine > 0).sum(1).to(values.dtype)
        # The pair (i, j) stands in the sum as (j, i) too, where m_i is the partner and gets no gradient: hence twice.
        return 2 * values - values.detach(), {"consistency_neighbours": neighbours}


def symmetric_kl(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """Mean of the two KL divergences between the distributions of two passes, nats per token, (N, T).

    Args:
        first, second: Logits, (N, T, V).
        mask: 0 where a position does not count and gets no gradient, (N, T).
    """
    precise = torch.promote_types(first.dtype, torch.float32)
    hidden = (mask == 0).unsqueeze(-1)
    log_p, log_q = (F.log_softmax(x.to(precise).masked_fill(hidden, 0), dim=-1) for x in (first, second))
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2
