"""Exact solvers of the small convex quadratic programs that aggregators pose, in float64.

Both are primal active-set methods. They go from the minimiser of one face (the variables that may be positive) to that
of another with a lower objective, never to the same face twice, and so end after finitely many steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDING = 16 * torch.finfo(torch.float64).eps
_RIDGE = 1e-9
_SMALLEST_SQUARE = 1e-30  # of a gradient, relative to the trace: zero gradients share their weight


def ridged(gramian: Tensor) -> Tensor:
    """A Gramian of trace 1 made definite by a tiny ridge, which shares weights evenly between equal gradients.

    It is relative to each gradient's own square, because short gradients decide where a convex hull is nearest to 0.
    """
    return gramian + torch.diag(_RIDGE * gramian.diagonal() + _SMALLEST_SQUARE)


def nonnegative_qp(hessian: Tensor, linear: Tensor) -> Tensor:
    """argmin of x^T H x / 2 + q^T x over x >= 0.

    Args:
        hessian: H, (m, m), symmetric positive definite.
        linear: q, (m,).
    """
    return _minimiser(hessian, linear, torch.zeros_like(linear), on_simplex=False)


def simplex_qp(hessian: Tensor, linear: Tensor) -> Tensor:
    """argmin of x^T H x / 2 + q^T x over x >= 0 with sum 1; see `nonnegative_qp`."""
    start = torch.zeros_like(linear)
    start[(hessian.diagonal() / 2 + linear).argmin()] = 1
    return _minimiser(hessian, linear, start, on_simplex=True)


def face_minimiser(hessian: Tensor, linear: Tensor, free: Tensor, total: float | None) -> Tensor:
    """Stationary point where the variables that are not free are 0 and the sum is `total`, or any if None."""
    face = hessian[free][:, free]
    right = -linear[free]
    if total is not None:
        border = torch.ones(len(face), 1, dtype=face.dtype)
        face = torch.cat([torch.cat([face, border], 1), torch.cat([border.T, border.new_zeros(1, 1)], 1)])
        right = torch.cat([right, right.new_tensor([total])])
    point = torch.zeros_like(linear)
    point[free] = torch.linalg.solve(face, right)[: int(free.sum())]
    return point


def _minimiser(hessian: Tensor, linear: Tensor, point: Tensor, *, on_simplex: bool) -> Tensor:
    total = 1.0 if on_simplex else None
    free = point > 0
    visited = {tuple(free.tolist())}
    while True:
        gradient = hessian @ point + linear
        error = _ROUNDING * (hessian.abs() @ point + linear.abs())
        if on_simplex:  # moving weight to a variable takes it from the free ones, which all have the same gradient
            gradient, error = gradient - gradient[free].mean(), error + error[free].max()
        entering = _entering(gradient + error, free, visited)
        if entering is None:
            return point
        free = free | entering
        visited.add(tuple(free.tolist()))
        target = face_minimiser(hessian, linear, free, total)
        while (leaving := free & (target <= 0)).any():
            # As far towards the target as no variable turns negative; the first to reach 0 is fixed there.
            reach = torch.where(leaving, torch.where(point > 0, point / (point - target), 0.0), torch.inf)
            point = point + reach.min() * (target - point)
            free = free & (reach > reach.min())
            point = torch.where(free, point, 0.0)
            target = face_minimiser(hessian, linear, free, total)
        point = target


def _entering(gradient: Tensor, free: Tensor, visited: set[tuple[bool, ...]]) -> Tensor | None:
    """The fixed variable, as a mask, whose growth lowers the objective fastest; None at the minimum.

    In exact arithmetic a face never comes again. With rounding it can, where the variable changes nothing.
    """
    for index in gradient.masked_fill(free, torch.inf).argsort().tolist():
        if free[index] or gradient[index] >= 0:
            return None
        entering = torch.zeros_like(free)
        entering[index] = True
        if tuple((free | entering).tolist()) not in visited:
            return entering
    return None
