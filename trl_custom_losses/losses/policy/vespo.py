"""VESPO: sequence-level gamma weights in place of clipping."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...base import Metrics
from ...hyperparameters import check_range
from ...registry import LossFunctionRegistry
from ...types import Metric, ModelOutputs, PolicyBatch, masked_sum
from .importance import ImportanceWeightedLoss

# Bounds of a log-ratio in nats, those of the paper's implementation.
_LOWEST, _HIGHEST = math.log(1e-8), 20.0


@LossFunctionRegistry.register("vespo")
class VESPOLoss(ImportanceWeightedLoss):
    """VESPO: policy gradient weighted by a smooth function of the sequence's importance weight.

    W = prod_t w_t (times the vLLM ratios);  phi(W) = e^lambda W^k e^(-lambda W), detached, so phi(1) = 1
    loss_t = -phi(W) A logp_t,  k and lambda by the sign of A;  averaged over all tokens of the generation batch

    Logs TRL's `vespo/phi_seq_mean`.

    Args:
        vespo_k_pos, vespo_lambda_pos: k >= 0 and lambda > 0 where A >= 0.
        vespo_k_neg, vespo_lambda_neg: k >= 0 and lambda > 0 where A < 0.
        importance_sampling_level: Only for the trainer's KL correction; the weights here are the sequence's.

    Source: Shen et al. 2026, arXiv:2602.10693.
    """

    uses_importance_sampling_ratio = True
    stop_gradient = True

    def __init__(
        self,
        *,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.vespo_k_pos = check_range("vespo_k_pos", vespo_k_pos, at_least=0)
        self.vespo_k_neg = check_range("vespo_k_neg", vespo_k_neg, at_least=0)
        self.vespo_lambda_pos = check_range("vespo_lambda_pos", vespo_lambda_pos, above=0)
        self.vespo_lambda_neg = check_range("vespo_lambda_neg", vespo_lambda_neg, above=0)

    @torch.no_grad()
    def phi(self, batch: PolicyBatch, outputs: ModelOutputs) -> Tensor:
        """The weights phi(W), (B, 1), or (B, T) for advantages per token."""
        log_ratio = (outputs.per_token_logps - outputs.old_per_token_logps).clamp(-_HIGHEST, _HIGHEST)
        log_w = masked_sum(log_ratio, outputs.mask).unsqueeze(-1)
        if batch.has("importance_sampling_ratio"):
            log_correction = torch.log(batch.importance_sampling_ratio).clamp(_LOWEST, _HIGHEST)
            log_w = log_w + log_correction.sum(dim=-1, keepdim=True)
        log_w = log_w.clamp(_LOWEST, _HIGHEST)
        positive = batch.advantages >= 0
        number = log_w.new_full
        k = torch.where(positive, number((), self.vespo_k_pos), number((), self.vespo_k_neg))
        rate = torch.where(positive, number((), self.vespo_lambda_pos), number((), self.vespo_lambda_neg))
        return torch.exp(rate + k * log_w - rate * torch.exp(log_w)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        phi = self.phi(batch, model_outputs)
        loss = -phi * batch.advantages * model_outputs.per_token_logps
        return loss, {"vespo/phi_seq_mean": Metric(phi, per="micro_batch")}
