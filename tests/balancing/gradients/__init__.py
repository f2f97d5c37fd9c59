"""Random gradients, and solvers that are slow but obviously right, for the tests of gradient aggregators."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

OPPOSED = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)


def random_jacobians(count: int, *, seed: int = 0, imbalance: float = 0.0, dimensions: int | None = None):
    """Gradients of 2 to 6 objectives in conflict, (m, n); their lengths differ by up to 10^imbalance."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        size = 2 + index % 5
        shape = (size, dimensions or size + 3)
        jacobian = torch.randn(shape, generator=generator, dtype=torch.float64)
        jacobian = jacobian - index % 3 * 0.6 * jacobian.mean(0)  # more conflict than independent directions have
        yield jacobian * 10 ** (imbalance * torch.rand(size, 1, generator=generator, dtype=torch.float64))


def gramian_of(jacobian: Tensor) -> Tensor:
    """Inner products of the rows, scaled to trace 1."""
    gramian = jacobian @ jacobian.T
    return gramian / gramian.trace()


def best_face(hessian: Tensor, linear: Tensor, *, simplex: bool = False) -> Tensor:
    """argmin of x^T H x / 2 + q^T x over x >= 0 (with sum 1): the best feasible one of all faces' minimisers."""
    size, best, best_value = len(linear), None, torch.inf
    for free in itertools.product([False, True], repeat=size):
        indices = [index for index in range(size) if free[index]]
        system = torch.zeros(len(indices) + simplex, len(indices) + simplex, dtype=torch.float64)
        system[: len(indices), : len(indices)] = hessian[indices][:, indices]
        right = torch.cat([-linear[indices], torch.ones(int(simplex), dtype=torch.float64)])
        if simplex:
            if not indices:
                continue
            system[-1, :-1] = system[:-1, -1] = 1
        point = torch.zeros(size, dtype=torch.float64)
        point[indices] = (torch.linalg.inv(system) @ right)[: len(indices)]
        value = float(point @ hessian @ point / 2 + linear @ point)
        if (point >= -1e-13).all() and value < best_value:
            best, best_value = point, value
    return best
