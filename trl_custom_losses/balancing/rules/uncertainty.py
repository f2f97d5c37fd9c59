"""Uncertainty weighting: weights that are trained with the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...hyperparameters import check_range
from .rule import check_objectives


class UncertaintyWeights(nn.Module):
    """Weights 1 / sigma^2, learned as log variances; what a large variance saves, its logarithm costs.

    loss = sum_k exp(-s_k) L_k + s_k,  s_k = log sigma_k^2 = -log weight_k

    For a loss L > 0 that stays, s = log L is best, hence the weight 1 / L: every objective is brought to the same
    magnitude. This is twice 0.5 exp(-s) L + 0.5 s, the paper's form for regression, so that a weight of 1 is s = 0 and
    leaves a loss as it is. The paper's form for classification, exp(-s) L + 0.5 s, has its best weight at half of
    that. It is not the variant log(1 + c^2) of Liebel and Koerner (arXiv:1805.06334).

    Deviation: s is held at log(loss_floor) or above, that is weights at 1 / loss_floor or below (`hold`, after each
    step). A loss of 0 or below, such as that of a policy surrogate, asks for a weight without end and ends there; this
    rule is for losses that are positive.

    The log variances need an optimizer group of their own: weight decay 0, and `learning_rate`, since that of a
    language model would not move them.

    Args:
        names: The objectives' names.
        initial_weights: w_k to start from, > 0 and at most 1 / loss_floor: s_k = -log w_k.
        learning_rate: Of the log variances, > 0. With Adam, 0.01 changes a weight by at most about 1 % a step.
        loss_floor: Smaller losses do not raise a weight any further, > 0.

    Source: Kendall et al. 2018, arXiv:1705.07115; a co-author's code (yaringal/multi-task-learning-example).
    """

    def __init__(
        self,
        *,
        names: Sequence[str],
        initial_weights: Sequence[float],
        learning_rate: float = 1e-2,
        loss_floor: float = 1e-3,
    ) -> None:
        super().__init__()
        self.learning_rate = check_range("learning_rate", learning_rate, above=0)
        self.loss_floor = check_range("loss_floor", loss_floor, above=0)
        check_objectives(names, initial_weights, above=0, at_most=1 / loss_floor)
        self.names = tuple(names)
        self.log_variances = nn.Parameter(torch.tensor([-math.log(w) for w in initial_weights], dtype=torch.float32))

    @property
    def weights(self) -> list[float]:
        """The current weights, in the order of `names`. Waits for the device: for logs, not for every step."""
        return self.tensor_weights().tolist()

    def tensor_weights(self) -> Tensor:
        """(K,), the current weights without gradient."""
        return torch.exp(-self.log_variances.detach())

    def forward(self, losses: Tensor, share: float | Tensor = 1.0) -> Tensor:
        """The total loss, with gradients to the losses and to the log variances.

        It is linear in the losses, so that contributions of micro-batches and ranks add up to the step's.

        Args:
            losses: (K,), each objective's loss or a micro-batch's contribution to it, in the order of `names`.
            share: The part of the optimizer step that `losses` stand for, 1 / micro-batches for contributions that
                are summed. Log variances count with it, so that they count once a step.

        Returns:
            The total loss, a scalar.
        """
        return (torch.exp(-self.log_variances) * losses + self.log_variances * share).sum()

    @torch.no_grad()
    def hold(self) -> None:
        """Bring log variances that the optimizer has moved too low back to the bound."""
        self.log_variances.clamp_(min=math.log(self.loss_floor))

    def extra_repr(self) -> str:
        return f"names={self.names}, learning_rate={self.learning_rate:g}"
