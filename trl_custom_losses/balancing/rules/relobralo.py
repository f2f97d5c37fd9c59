"""ReLoBRaLo: losses balanced by how much of them is left, since the last step and, at random, since the first."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ...hyperparameters import check_range
from ...state import host, host_zeros
from .rule import WeightRule, balance, loss_ratio


class ReLoBRaLoWeights(WeightRule):
    """ReLoBRaLo, relative loss balancing with random lookback.

    balanced(t, t') = K softmax_k(L_k(t) / (tau L_k(t')))
    multiplier(t) = alpha (rho_t multiplier(t-1) + (1 - rho_t) balanced(t, 0)) + (1 - alpha) balanced(t, t-1)
    weight = initial weight * multiplier;  rho_t ~ Bernoulli(rho), one for all objectives

    With rho_t = 1 the multipliers remember, with rho_t = 0 they look back to the first losses. rho_t depends on `seed`
    and the number of the step alone, so that ranks agree and a resumed run draws what it would have drawn.

    Deviations: multipliers of step t weigh the losses of step t + 1; they start at 1, without the authors' warm-up of
    alpha over the first two steps; L(t) / L(t') is 1 + (L(t) - L(t')) / max(|L(t')|, loss_floor), within 0 and 10,
    which is the same for losses of at least `loss_floor` that grow less than tenfold, and safe for policy losses,
    negative or about 0.

    Args:
        names: The objectives' names.
        initial_weights: Their weights before their multipliers; with ones the weights are the paper's.
        alpha: Share of the past in each step, 0 to 1. The authors use 0.999; the default suits runs of hundreds of
            steps.
        tau: Temperature, > 0; lower sharpens. The authors use 0.1 and 1.
        rho: Probability to remember rather than to look back, 0 to 1. The authors use 0.99 and 1.
        seed: Of the draws.
        loss_floor: Smaller magnitudes of a loss count as this, > 0.

    Source: Bischof and Kraus 2021, arXiv:2110.09813; the authors' code (rbischof/relative_balancing).
    """

    first: Tensor
    previous: Tensor
    seen: Tensor
    multipliers: Tensor

    def __init__(
        self,
        *,
        names: Sequence[str],
        initial_weights: Sequence[float],
        alpha: float = 0.95,
        tau: float = 1.0,
        rho: float = 0.99,
        seed: int = 0,
        loss_floor: float = 1e-3,
    ) -> None:
        super().__init__(names=names, initial_weights=initial_weights)
        self.alpha = check_range("alpha", alpha, at_least=0, at_most=1)
        self.tau = check_range("tau", tau, above=0)
        self.rho = check_range("rho", rho, at_least=0, at_most=1)
        self.seed = seed
        self.loss_floor = check_range("loss_floor", loss_floor, above=0)
        self.register_buffer("first", host_zeros(len(names)))
        self.register_buffer("previous", host_zeros(len(names)))
        self.register_buffer("seen", host_zeros(len(names)))  # 1 once first and previous are filled
        self.register_buffer("multipliers", torch.ones_like(self.current))

    def remembers(self, step: int) -> bool:
        """rho_t of this step."""
        # Seeding with text hashes it, so that neighbouring steps and seeds have unrelated draws.
        return random.Random(f"{self.seed}:{step}").random() < self.rho

    def move(self, values: Tensor, usable: Tensor, step: int) -> Tensor:
        known = self.seen > 0
        active = usable & known
        # Those that stay out keep their multipliers; the others share what is left, so that the mean remains 1.
        level = self.multipliers[active].sum() / active.sum().clamp(min=1)
        past = self.multipliers if self.remembers(step) else level * self._balanced(values, self.first, active)
        moved = self.alpha * past + (1 - self.alpha) * level * self._balanced(values, self.previous, active)
        self.multipliers = torch.where(active, moved, self.multipliers)
        self.first = torch.where(known, self.first, values)
        self.previous = torch.where(usable, values, self.previous)
        self.seen = torch.maximum(self.seen, usable.to(self.seen))
        return host(self.initial_weights) * self.multipliers

    def _balanced(self, now: Tensor, before: Tensor, ready: Tensor) -> Tensor:
        return balance(loss_ratio(now, before, self.loss_floor) / self.tau, ready)
