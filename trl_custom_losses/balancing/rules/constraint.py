"""nuPI: weights as Lagrange multipliers that hold objectives at a target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import LossConfigError
from ...hyperparameters import check_range, suggestion
from ...state import host, host_zeros
from .rule import WeightRule


class ConstraintWeights(WeightRule):
    """nuPI controller: a weight grows while its objective is above its target and shrinks, down to 0, below it.

    e_t = L_t - target;  xi_t = nu xi_(t-1) + (1 - nu) e_t,  xi_(-1) = e_0
    weight <- max(0, weight + eta (k_i e_t + k_p (xi_t - xi_(t-1))))

    Holds a KL divergence, a cost or a length at a target while the objectives without one, whose weights stay as they
    are, go on falling. The first step is plain dual ascent, eta k_i e_0; so is every step with `k_p: 0`. The
    proportional part damps the swings around the target that dual ascent is known for.

    Deviation: weights are at most 1e6. The paper's code restarts xi from 0 after the first step (cooper-org/cooper,
    issue 107); this follows the paper's recursion.

    Args:
        names: The objectives' names.
        initial_weights: Weights to start from, >= 0.
        targets: Upper bounds by objective's name, in units of its loss; at least one.
        eta: Step size, > 0. The default suits weights around 1 and deviations around 0.1 from the target; a length in
            tokens needs a far smaller one.
        k_i: Integral gain, >= 0.
        k_p: Proportional gain, >= 0.
        nu: Smoothing of the error in the proportional part, between -1 and 1; near 1 it ignores a step's noise.

    Errors: No target, a target for an unknown objective or that is not finite, or both gains 0.

    Source: Sohrabi et al. 2024, arXiv:2406.04558; the authors' code (cooper-org/cooper).
    """

    xi: Tensor
    started: Tensor

    def __init__(
        self,
        *,
        names: Sequence[str],
        initial_weights: Sequence[float],
        targets: Mapping[str, float],
        eta: float = 0.1,
        k_i: float = 1.0,
        k_p: float = 10.0,
        nu: float = 0.9,
    ) -> None:
        super().__init__(names=names, initial_weights=initial_weights)
        self.targets = _check_targets(targets, self.names)
        self.eta = check_range("eta", eta, above=0)
        self.k_i = check_range("k_i", k_i, at_least=0)
        self.k_p = check_range("k_p", k_p, at_least=0)
        if not (self.k_i or self.k_p):
            raise LossConfigError("hyperparameters 'k_i' and 'k_p': expected at least one above 0, found 0 and 0")
        self.nu = check_range("nu", nu, above=-1, below=1)
        self.register_buffer("xi", host_zeros(len(names)))
        self.register_buffer("started", host_zeros(len(names)))  # 1 once xi is filled

    def move(self, values: Tensor, usable: Tensor, step: int) -> Tensor:
        targets = host([self.targets.get(name, math.nan) for name in self.names])
        held = usable & ~targets.isnan()
        error = values - targets
        before = torch.where(self.started > 0, self.xi, error)
        change = (1 - self.nu) * (error - before)
        self.xi = torch.where(held, before + change, self.xi)
        self.started = torch.maximum(self.started, held.to(self.started))
        moved = self.current + self.eta * (self.k_i * error + self.k_p * change)
        return torch.where(held, moved.clamp(min=0.0), self.current)


def _check_targets(targets: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    known = f"the objectives are {', '.join(map(repr, names))}"
    if not targets:
        raise LossConfigError(f"hyperparameter 'targets': expected a target for at least one objective; {known}")
    for name, target in targets.items():
        if name not in names:
            raise LossConfigError(
                f"hyperparameter 'targets': no objective is named {name!r}{suggestion(str(name), names)}; {known}"
            )
        if isinstance(target, bool) or not isinstance(target, (int, float)) or not math.isfinite(target):
            raise LossConfigError(f"hyperparameter 'targets': expected a finite number for '{name}', found {target!r}")
    return {name: float(target) for name, target in targets.items()}
