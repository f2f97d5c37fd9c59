"""MGDA: the shortest vector of the gradients' convex hull."""

from __future__ import annotations

import torch
from torch import Tensor

from .aggregator import Aggregator
from .solvers import ridged, simplex_qp


class MGDA(Aggregator):
    """Multiple-gradient descent: all losses fall at least by the squared length of the step's direction.

    w = m argmin_a a^T G a  over a >= 0 with sum 1

    The shortest gradient decides: an objective whose gradient vanishes gets all the weight and stops the others. At a
    Pareto-stationary point the direction is zero. Weights sum to m.

    Source: Désidéri 2012, Comptes Rendus Mathématique 350(5-6); for training Sener and Koltun 2018, arXiv:1810.04650.
    Both take the convex combination, without the factor m. It is solved exactly, not by Frank-Wolfe steps, and the
    gradients are not normalised.
    """

    def weights(self, gramian: Tensor, step: int) -> Tensor:
        return len(gramian) * simplex_qp(ridged(gramian), torch.zeros(len(gramian), dtype=gramian.dtype))
