"""Beta that holds the distance from the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ....state import host
from ....types import ModelOutputs, PreferenceBatch
from .strategy import LOWEST_BETA, BetaStrategy, total_and_count

if TYPE_CHECKING:
    from ..adaptive_dpo import AdaptiveDPOLoss


class KLControlled(BetaStrategy):
    """Raised while the policy is further from the reference than `target_kl`, lowered while it is nearer.

    beta <- beta (1 + clip(KL / target_kl - 1, -0.2, 0.2) n / horizon),  n = number of completions of the step

    KL is the mean over completions of the sum over tokens of exp(-d) - 1 + d, with d = log policy - log reference of
    the token: at least 0, and 0 only where the policy has not moved. It tells how far the policy has gone on the
    completions of the data. The policy did not sample these, so it is not an estimate of KL(policy || reference), it
    weighs tokens that have become unlikely heavily, and targets of on-policy work (6 nats) do not carry over: look at
    `adaptive_kl` of a run with a constant beta first.

    A completion in a pair of `rollout_pairs` is met twice, in its own row and in its partner's, and counts twice.

    A higher beta holds the policy back because margins, which it multiplies, saturate the loss sooner. A beta near 0
    would keep the policy from ever reaching the target, hence the floor of 0.001. A step at most halves beta, where
    the authors' controller would make it negative from n = 5 horizon on.

    Source: Ziegler et al. 2019, arXiv:1909.08593.
    """

    reads = ("target_kl", "horizon")
    requires = frozenset({"ref_per_token_logps"})

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", host(1.0))

    def begin_step(self, loss: AdaptiveDPOLoss, step: int) -> float:
        return max(loss.initial_beta * self.factor.item(), LOWEST_BETA)

    def followed(self, batch: PreferenceBatch, outputs: ModelOutputs) -> Tensor:
        return total_and_count(outputs.token_kl.sum(dim=1), batch)

    def end_step(self, loss: AdaptiveDPOLoss, total: float, count: float) -> Mapping[str, float] | None:
        kl = total / count if count else math.nan
        if not math.isfinite(kl):
            return None
        error = min(max(kl / loss.target_kl - 1, -0.2), 0.2)
        self.factor.mul_(max(1 + error * count / loss.horizon, 0.5))
        self.factor.clamp_(min=LOWEST_BETA / loss.initial_beta)  # at the floor it does not sink any further
        return {"adaptive_kl": kl}
