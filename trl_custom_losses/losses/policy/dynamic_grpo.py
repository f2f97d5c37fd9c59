"""GRPO whose groups are found among the responses."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ...base import Metrics
from ...hyperparameters import check_choice, check_range
from ...registry import LossFunctionRegistry
from ...types import ModelOutputs, PolicyBatch, Rollout
from .group_advantages import SimilarityAdvantageLoss, weighted_rewards

Scope = Literal["batch", "prompt"]

_STATISTICS = ("num_dynamic_groups", "avg_group_size", "frac_singleton_groups")


@LossFunctionRegistry.register("dynamic_grpo")
class DynamicGRPOLoss(SimilarityAdvantageLoss):
    """GRPO with advantages against groups of similar responses, found anew in every generation batch.

    A_i = (r_i - mean_{g(i)} r) / (std_{g(i)} r + 1e-4),  then as grpo;  r = weighted sum of a response's rewards

    Groups are formed over all ranks, one after the other. Its leader is, of the responses without a group, the one
    most of these are similar to, that is with a cosine of at least the threshold; then the one whose similarities to
    them sum to most; then the first of the generation batch. The leader takes the most similar of them along, the
    first where two are equally similar, up to the largest size. Similarities are rounded to 5 decimals before, so that
    floating-point noise decides nothing. So each response is in exactly one group, groups do not depend on how ranks
    split the batch, nor, but for ties, on the order of the batch.

    A response that is alone in its group, or whose fellows were all not scored, is compared with its prompt's
    responses, as in GRPO; a response that was not scored gets advantage 0. A response without a scored token
    (truncated ones, where those are masked) is similar to none. Logs `num_dynamic_groups`, `avg_group_size` and
    `frac_singleton_groups` of the generation batch.

    Deviates from the tutorial, which puts a response into every group whose leader it resembles, takes the first
    responses and not the most similar ones when a group is full, and never uses the groups it has found. Hidden states
    of language models point in similar directions: watch `avg_group_size` and choose the threshold by it.

    Args:
        similarity_threshold: Cosine from which on two responses are similar, in [-1, 1].
        max_group_size: Most responses in a group, >= 1; at 1 it is GRPO.
        scope: "batch" groups responses to any prompts of the generation batch, "prompt" those to one prompt.
        embedding, max_ngram, scale_rewards: See `SimilarityAdvantageLoss`.
        epsilon, epsilon_high, delta, importance_sampling_level: As for `grpo`.

    Errors: An embedding that cannot be imported; `multi_objective_aggregation='normalize_then_sum'`.

    Source: After the dynamic grouping of NeMo RL's tutorial on custom losses, on GRPO, Shao et al. 2024,
    arXiv:2402.03300.
    """

    def __init__(
        self,
        *,
        similarity_threshold: float = 0.8,
        max_group_size: int = 10,
        scope: Scope = "batch",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.similarity_threshold = check_range("similarity_threshold", similarity_threshold, at_least=-1, at_most=1)
        self.max_group_size = int(check_range("max_group_size", max_group_size, at_least=1))
        self.scope = check_choice("scope", scope, Scope)

    def groups(self, rollout: Rollout) -> Tensor:
        """The group of each response of the generation batch, numbered from 0, (N,), on the host."""
        prompts = rollout.group_ids.cpu()
        similarity = self.similarities(rollout)
        near = similarity >= self.similarity_threshold
        if self.scope == "prompt":
            near &= prompts.unsqueeze(0) == prompts.unsqueeze(1)
        return form_groups(similarity, near, self.max_group_size)

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        groups = self.groups(rollout)
        advantages = self.advantages(rollout, weighted_rewards(rollout), groups)
        sizes = groups.bincount()
        number = float(sizes.numel())
        found = (number, groups.numel() / number, (sizes == 1).sum().item() / number)
        # A row each, so that averages over micro-batches are right however the batch is split.
        statistics = {name: torch.full_like(advantages, value) for name, value in zip(_STATISTICS, found, strict=True)}
        return {"advantages": advantages, **statistics}

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
        loss, metrics = super().forward(batch, model_outputs)
        return loss, {**metrics, **{name: batch[name] for name in _STATISTICS}}


def form_groups(similarity: Tensor, near: Tensor, largest: int) -> Tensor:
    """Put each response into one group of responses that are near its leader; see `DynamicGRPOLoss` for the rule.

    Args:
        similarity: (N, N), symmetric.
        near: Whether two responses may be in a group, (N, N), symmetric.
        largest: Most responses in a group.

    Returns:
        Group numbers from 0, (N,).
    """
    near = near.clone().fill_diagonal_(False)
    units = (similarity * 1e5).round().long() * near  # sums of whole numbers do not depend on their order
    groups = torch.full((near.size(0),), -1)
    links, closeness = near.sum(1), units.sum(1)
    for number in range(near.size(0)):
        free = groups < 0
        if not free.any():
            break
        most = free & (links == links[free].max())
        leader = int(torch.where(most & (closeness == closeness[most].max()))[0][0])
        others = torch.where(near[leader] & free)[0]
        nearest = units[leader, others].argsort(descending=True, stable=True)
        members = torch.cat((torch.tensor([leader]), others[nearest[: largest - 1]]))
        groups[members] = number
        links -= near[members].sum(0)
        closeness -= units[members].sum(0)
    return groups
