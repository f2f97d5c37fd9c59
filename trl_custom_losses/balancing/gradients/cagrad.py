"""CAGrad: near the mean gradient, the direction that is best for the objective that gains least."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...hyperparameters import check_range
from .aggregator import Aggregator
from .solvers import face_minimiser, nonnegative_qp, ridged, simplex_qp

_PRECISION = 1e-11
_NO_RADIUS = 1e-14  # lengths that count as zero; the trace is 1
_STATIONARY = 1e-4


class CAGrad(Aggregator):
    """Conflict-averse gradient: max_d min_i <g_i, d> in the ball |d - g_0| <= c |g_0| around the mean gradient g_0.

    w = m (1/m + c |g_0| / |g_a| a),  g_a = J^T a
    a = argmin <g_a, g_0> + c |g_0| |g_a|  over a >= 0 with sum 1

    c = 0 gives ones, the plain sum; a large c the direction of MGDA. Weights are up to 1 + c even without conflict.

    Where g_a is zero the published formula is not defined, and every d of the ball without a negative <g_i, d> is
    optimal: the one nearest to g_0 is taken.

    Args:
        c: Radius of the ball relative to the mean gradient, >= 0. The paper's claim of convergence to a minimum of the
            mean loss is for c < 1.

    Source: Liu et al. 2021, arXiv:2110.14048, times m. The authors' code also divides by 1 + c or 1 + c^2, depending on
    the experiment; that is left to the learning rate.
    """

    def __init__(self, *, c: float = 0.5) -> None:
        self.c = check_range("c", c, at_least=0, below=math.inf)

    def weights(self, gramian: Tensor, step: int) -> Tensor:
        ones = torch.ones(len(gramian), dtype=gramian.dtype)
        mean = ones / len(gramian)
        radius = self.c * (mean @ gramian @ mean).clamp(min=0).sqrt()
        if radius <= _NO_RADIUS:
            return ones
        point = _conflict_averse_point(ridged(gramian), mean, radius)
        length = (point @ gramian @ point).clamp(min=0).sqrt()
        if length > _STATIONARY:
            change = radius / length * point
        else:
            change = nonnegative_qp(ridged(gramian), gramian @ mean)
            length = (change @ gramian @ change).clamp(min=0).sqrt()
            change = change * (radius / length).clamp(max=1)
        return len(gramian) * (mean + change)


def _conflict_averse_point(hessian: Tensor, mean: Tensor, radius: Tensor) -> Tensor:
    """argmin of a^T H b + radius sqrt(a^T H a) over the simplex, b being the mean; any shorter g_a if that is ~0.

    sqrt(q) is the minimum of (q / t + t) / 2 over t. For fixed t the minimiser a solves a quadratic program with linear
    term k H b, k = t / radius; the best t is |g_a|. That is one equation in k with one root, since all is jointly
    convex. While a stays on a face, |g_a|^2 is `constant` + k^2 `slope`, so the face's root is explicit: it is the
    answer if a(root) is on that face. Each face's root is tried once, bisection leads on to the next face.
    """
    linear = hessian @ mean
    low, high = float(_STATIONARY / radius), float(2 * hessian.diagonal().max().sqrt() / radius)
    k, tried = low, set()
    while high - low > _PRECISION * high:
        point = simplex_qp(hessian, k * linear)
        free = point > 0
        change = face_minimiser(hessian, linear, free, total=0.0)
        start = point - k * change
        constant, slope = start @ hessian @ start, change @ hessian @ change
        if constant + k**2 * slope > (k * radius) ** 2:
            low = max(low, k)
        elif k == low:
            return point  # already at the least length that counts
        else:
            high = min(high, k)
        root = float((constant / (radius**2 - slope)).sqrt())  # not a number if the face has none
        if abs(root - k) <= _PRECISION * k:
            return point
        if not low < root < high or (face := tuple(free.tolist())) in tried:
            k = (low + high) / 2
        else:
            k = root
            tried.add(face)
    return point
