"""UPGrad: the sum of the gradients after each is projected where it raises no loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ...hyperparameters import check_range
from .aggregator import Aggregator
from .solvers import nonnegative_qp


class UPGrad(Aggregator):
    """UPGrad: each gradient is replaced by the nearest vector with no negative inner product with any gradient.

    w = sum_i argmin_v v^T (G + reg_eps I) v  over v >= e_i,  tr G = 1

    To first order no loss rises. Without conflict the weights are ones exactly, and a gradient that shrinks takes its
    influence with it. Weights are at least 1.

    Args:
        reg_eps: Ridge relative to the trace, > 0 and < 1. It leaves conflicts of its own order, and caps the weight
            that a short gradient gets from one conflict at 1 / (2 sqrt(reg_eps)), by default 500: the Gramian is an
            estimate, and a larger weight would bet on it.

    Source: Quinton and Rey 2024, arXiv:2406.16232. The authors' library, TorchJD, takes the mean of the projections:
    this is m times that. Its ridge is 1e-4, and it also takes gradients whose Gramian has a trace below 1e-4 for
    zero, which turns the method off; this does not.
    """

    def __init__(self, *, reg_eps: float = 1e-6) -> None:
        self.reg_eps = check_range("reg_eps", reg_eps, above=0, below=1)

    def weights(self, gramian: Tensor, step: int) -> Tensor:
        if (gramian >= 0).all():  # no conflict
            return torch.ones(len(gramian), dtype=gramian.dtype)
        identity = torch.eye(len(gramian), dtype=gramian.dtype)
        regular = gramian + self.reg_eps * identity
        # With v = e_i + x the constraint becomes x >= 0 and the linear term row i.
        return torch.stack([unit + nonnegative_qp(regular, regular @ unit) for unit in identity]).sum(0)
