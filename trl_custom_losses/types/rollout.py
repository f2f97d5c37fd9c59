"""A generation batch, as losses prepare it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fields import ExplainsMissingFields, optional
from .common import Ranks
from .outputs import ModelOutputs


@dataclass(kw_only=True, eq=False, repr=False)
class Rollout(ExplainsMissingFields):
    """One generation batch as `PolicyLoss.prepare` sees it, before it is shuffled and split into micro-batches.

    N counts the completions of all ranks, B those of this rank: `tensor[local]` takes a gathered tensor's own part.
    The functions are there in a trainer; each does its work when it is called, without gradient. `forward` and
    `encode` run the model and so are collectives where its weights are sharded: every rank calls them or none.

    Args:
        rewards: Raw rewards, (N, F), NaN = not scored.
        reward_weights: (F,).
        advantages: TRL's advantages, (N,).
        group_ids: Prompt index of each completion, (N,).
        completion_ids: This rank's completions, (B, T).
        mask: This rank's scored tokens, (B, T).
        columns: Declared data-set columns of this rank, (B,) or list of B.
        local: The slice of this rank's rows in a gathered tensor.
        ranks: The processes that train together.
        texts: The completions of this rank as text.
        forward: The policy's outputs on this rank's completions, from before the step: `per_token_logps` and what the
            loss names in `rollout_requires`. Computed once, however many losses ask.
        encode: Mean last hidden state of texts that answer this rank's prompts, one each, (B, H), float32.
    """

    rewards: Tensor
    reward_weights: Tensor
    advantages: Tensor
    group_ids: Tensor
    completion_ids: Tensor
    mask: Tensor
    columns: Mapping[str, Any]
    local: slice
    ranks: Ranks
    texts: Callable[[], list[str]] = optional()
    forward: Callable[[], ModelOutputs] = optional()
    encode: Callable[[list[str]], Tensor] = optional()

    def gather(self, tensor: Tensor) -> Tensor:
        """Collect a (B, ...) tensor over the ranks to (N, ...)."""
        return self.ranks.gather(tensor)

    def gather_padded(self, tensor: Tensor) -> Tensor:
        """As `gather` for (B, T) tensors whose T differs between ranks; filled with 0 on the right."""
        longest = self.gather(tensor.new_full((1,), tensor.size(1), dtype=torch.long)).amax().item()
        return self.gather(F.pad(tensor, (0, longest - tensor.size(1))))

    @staticmethod
    def scoped_result(component: str, prepared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name a component's tensors so that `PolicyBatch.scoped` finds them again."""
        return {f"{component}.{name}": value for name, value in prepared.items()}
