"""Advantages of rewards against the rewards of a group, and what losses share that make them from similarities."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import LossConfigError
from ...hyperparameters import check_choice, check_range
from ...types import Rollout
from .grpo import GRPOLoss
from .similarity import Similarities, check_embedding, similarities

ScaleRewards = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]

# TRL's, added to standard deviations.
_EPSILON = 1e-4


def weighted_rewards(rollout: Rollout) -> Tensor:
    """Each completion's rewards, weighted and summed, (N,), float64 on the host; NaN where no function scored it."""
    rewards = rollout.rewards.detach().cpu().double()
    total = (rewards * rollout.reward_weights.cpu().double()).nansum(dim=1)
    return total.masked_fill(rewards.isnan().all(dim=1), torch.nan)


def group_advantages(rewards: Tensor, groups: Tensor, prompts: Tensor, scale: ScaleRewards) -> Tensor:
    """Rewards minus their group's mean, over the standard deviation that `scale` names (unbiased, plus 1e-4).

    A NaN counts in no group and gets 0. The only scored member of a group is compared with its prompt's. Equal rewards
    give exactly 0.

    Args:
        rewards: (N,), float64.
        groups: Group of each, (N,).
        prompts: Prompt of each, (N,).
        scale: "group" (where a reward is compared with its prompt's, that is its group), "batch" or "none".

    Returns:
        (N,), as `rewards`.
    """
    centred, deviation, count = _within(rewards, groups)
    of_prompt, deviation_of_prompt, _ = _within(rewards, prompts)
    alone = count <= 1
    centred = torch.where(alone, of_prompt, centred)
    if scale == "group":
        centred = centred / (torch.where(alone, deviation_of_prompt, deviation) + _EPSILON)
    elif scale == "batch":
        centred = centred / (_within(rewards, torch.zeros_like(groups))[1] + _EPSILON)
    return centred.nan_to_num(nan=0.0)


def _within(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards minus their group's mean, the group's standard deviation and its number of scored members, each (N,)."""
    groups = groups.unique(return_inverse=True)[1]
    scored = ~rewards.isnan()

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(values).index_add_(0, groups, values.masked_fill(~scored, 0))[groups]

    count = total(torch.ones_like(rewards))
    # Against the lowest, so that of equal rewards nothing is left to round.
    lowest = torch.full_like(rewards, torch.inf).scatter_reduce(
        0, groups, rewards.masked_fill(~scored, torch.inf), "amin"
    )
    above = rewards - lowest[groups]
    centred = above - total(above) / count.clamp(min=1)
    variance = total(centred.square()) / (count - 1).clamp(min=1)
    return centred, variance.sqrt(), count


class SimilarityAdvantageLoss(GRPOLoss):
    """Base of GRPO losses whose advantages depend on how similar a generation batch's completions are.

    Args:
        embedding: What is compared: "hidden" (the policy's pooled last hidden states, one more forward pass a
            generation batch), "tokens" (bags of token n-grams, no model) or the import path of a function,
            `package.module:function`, from a list of B texts to vectors, (B, D).
        max_ngram: Length of the longest n-gram for "tokens", >= 1.
        scale_rewards: What advantages are divided by: the standard deviation of the "group" or the "batch", or "none";
            True and False are "group" and "none".
        multi_objective_aggregation: "sum_then_normalize" alone; there to refuse TRL's other choice.
        **options: As for `grpo`.
    """

    def __init__(
        self,
        *,
        embedding: str = "hidden",
        max_ngram: int = 2,
        scale_rewards: ScaleRewards | bool = "group",
        multi_objective_aggregation: Aggregation = "sum_then_normalize",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.embedding = check_embedding(embedding)
        self.max_ngram = int(check_range("max_ngram", max_ngram, at_least=1))
        named = {True: "group", False: "none"}.get(scale_rewards, scale_rewards)
        self.scale_rewards = check_choice("scale_rewards", named, ScaleRewards)
        check_choice("multi_objective_aggregation", multi_objective_aggregation, Aggregation)
        if multi_objective_aggregation != "sum_then_normalize":
            raise LossConfigError(
                "`multi_objective_aggregation='normalize_then_sum'` normalises each reward function within a prompt "
                "before they are summed, which this loss cannot: it compares weighted sums of rewards. Set it to "
                "'sum_then_normalize'"
            )
        self.multi_objective_aggregation = multi_objective_aggregation
        if embedding == "hidden":
            self.rollout_requires = frozenset({"pooled_hidden"})

    def similarities(self, rollout: Rollout) -> Similarities:
        """Cosine similarities between the completions of all ranks."""
        return similarities(rollout, self.embedding, self.max_ngram)

    def advantages(self, rollout: Rollout, rewards: Tensor, groups: Tensor) -> Tensor:
        """This rank's part of `group_advantages`, (B,), on the device.

        Args:
            rollout: The generation batch.
            rewards: (N,), float64 on the host.
            groups: (N,), on the host.
        """
        found = group_advantages(rewards, groups, rollout.group_ids.cpu(), self.scale_rewards)
        return found[rollout.local].to(rollout.advantages.device, rollout.advantages.dtype)
