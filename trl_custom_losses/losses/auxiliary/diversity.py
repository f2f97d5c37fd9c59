"""Diversity: completions of one prompt move away from one another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base import Metrics, PolicyLoss
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PolicyBatch, Rollout
from ..policy.similarity import VectorSimilarities, nearest_within, state_distance


@LossFunctionRegistry.register("diversity")
class DiversityLoss(PolicyLoss):
    """Minus the distance of a completion's state to that of the nearest other completion of its prompt.

    loss_i = -d(h_i, n_i),  n_i = state of the completion nearest to i at rollout,  d = |h/|h| - n/|n||  in [0, 2)

    States are means of the last hidden state over completion tokens, compared by direction, so that the loss is
    bounded and cannot be lowered by making states large. The nearest is found once per generation batch, over all
    ranks, among the prompt's completions that have scored tokens (the first of equally near ones); it stays as it was
    then, without gradient, and the gradient flows through h_i. Its size fades out below d = 0.001: two equal
    completions have one state and cannot be told apart. A completion without another, or without a scored token,
    gives 0.

    Deviates from the tutorial, which compares whatever completions meet in a micro-batch, of any prompt.

    Source: After NeMo RL's tutorial on custom losses.
    """

    requires = frozenset({"pooled_hidden"})
    rollout_requires = frozenset({"pooled_hidden"})
    surrogate = False
    reduction = "sequence_mean"

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        own = F.normalize(rollout.forward().pooled_hidden, dim=1)
        states = rollout.gather(own)
        scored = rollout.gather((rollout.mask > 0).any(dim=1)).cpu()
        prompts = rollout.group_ids.cpu()
        # What is not scored is by itself.
        by_itself = prompts.max() + 1 + torch.arange(prompts.numel())
        nearest = nearest_within(VectorSimilarities(states), torch.where(scored, prompts, by_itself))
        nearest = nearest[rollout.local].to(states.device)
        return {"nearest": states[nearest.clamp(min=0)], "has_nearest": nearest >= 0}

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        distance = state_distance(model_outputs.pooled_hidden, batch["nearest"])
        return -distance.masked_fill(~batch["has_nearest"], 0), {}
