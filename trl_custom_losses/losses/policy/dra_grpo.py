"""DRA-GRPO: a reward counts less, the more of its prompt's responses say the same."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ...base import Metrics
from ...hyperparameters import check_choice
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PolicyBatch, Rollout
from .group_advantages import SimilarityAdvantageLoss, weighted_rewards
from .similarity import sums_within

NegativeRewards = Literal["divide", "multiply"]


@LossFunctionRegistry.register("dra_grpo")
class DRAGRPOLoss(SimilarityAdvantageLoss):
    """DRA-GRPO: GRPO on rewards divided by how redundant a response is among those to its prompt.

    R_i = 1 + sum_{j != i} max(cos(e_i, e_j), 0) over responses j to i's prompt;  r'_i = r_i / R_i
    A_i = (r'_i - mean r') / (std r' + 1e-4) over the responses to i's prompt,  then as grpo

    The 1 is a response's similarity to itself, so that R_i >= 1, also for a response without a scored token. Responses
    that no function scored get advantage 0 and still make others redundant. Logs `redundancy`, the mean of R_i.

    Deviates from the authors' code, which sums over whatever responses its process holds, of any prompt and without
    the others' part of a prompt that is split, which keeps negative cosines, so that R_i may be 0 or negative, and
    which embeds texts with a sentence encoder (give one as `embedding`).

    Rewards of one sign are what this is made for. Dividing brings a negative reward closer to 0, so that of wrong
    responses those that are repeated are punished least; `negative_rewards: multiply` makes it the other way round.
    Equal rewards no longer give advantage 0: their differences in redundancy do, scaled to size 1 by `scale_rewards:
    group`.

    Args:
        negative_rewards: What happens to r_i < 0: "divide", as in the paper, or "multiply", so that redundancy lowers
            every reward.
        embedding, max_ngram, scale_rewards: See `SimilarityAdvantageLoss`.
        epsilon, epsilon_high, delta, importance_sampling_level: As for `grpo`.

    Errors: An embedding that cannot be imported; `multi_objective_aggregation='normalize_then_sum'`.

    Source: Chen et al. 2025, arXiv:2505.09655.
    """

    def __init__(self, *, negative_rewards: NegativeRewards = "divide", **options: Any) -> None:
        super().__init__(**options)
        self.negative_rewards = check_choice("negative_rewards", negative_rewards, NegativeRewards)

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        prompts = rollout.group_ids.cpu()
        redundancy = 1 + sums_within(self.similarities(rollout), prompts)
        rewards = weighted_rewards(rollout)
        adjusted = rewards / redundancy
        if self.negative_rewards == "multiply":
            adjusted = torch.where(rewards < 0, rewards * redundancy, adjusted)
        advantages = self.advantages(rollout, adjusted, prompts)
        return {"advantages": advantages, "redundancy": redundancy[rollout.local].to(advantages)}

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        loss, metrics = super().forward(batch, model_outputs)
        return loss, {**metrics, "redundancy": batch["redundancy"]}
