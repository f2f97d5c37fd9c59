"""PCGrad: gradients projected against each other one after another."""

from __future__ import annotations

import torch
from torch import Tensor

from .aggregator import Aggregator


class PCGrad(Aggregator):
    """PCGrad: the sum of the gradients, each having lost its conflict with every other in random order.

    g_i <- g_i - min(<g_i, g_j>, 0) / |g_j|^2 g_j  for the other original gradients g_j in turn

    With three or more objectives a projection may bring back a conflict that an earlier one took out. Without conflict
    the weights are ones. The order of each g_i is drawn anew at every step, from the step's number.

    Source: Yu et al. 2020, arXiv:2001.06782.
    """

    def weights(self, gramian: Tensor, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        weights = torch.zeros(len(gramian), dtype=gramian.dtype)
        for i in range(len(gramian)):
            projected = torch.zeros_like(weights)
            projected[i] = 1
            for j in torch.randperm(len(gramian), generator=generator).tolist():
                product = gramian[j] @ projected
                if j != i and product < 0 and gramian[j, j] > 0:
                    projected[j] -= product / gramian[j, j]
            weights += projected
        return weights
