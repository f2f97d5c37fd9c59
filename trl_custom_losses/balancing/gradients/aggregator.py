"""What the gradient aggregators share: a Gramian of known scale, made positive semi-definite."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Aggregator(ABC):
    """Weights of m objectives from the Gramian G = J J^T; the rows of J are the gradients of their losses.

    Methods see G divided by its trace, so that weights do not depend on the scale of the losses and tolerances are
    relative. No threshold on the trace decides that gradients are zero: in long trainings they become very small.
    """

    def __call__(self, gramian: Tensor, step: int) -> Tensor:
        """The objectives' weights at this step.

        Args:
            gramian: (m, m) inner products of the gradients, of any float type and on any device.
            step: Number of the optimizer step. Randomness depends on nothing else, hence is the same on every rank
                and after a resume.

        Returns:
            (m,) float64 on the CPU. Ones, the plain sum, where the Gramian is zero or not finite.
        """
        if gramian.dim() != 2 or gramian.size(0) != gramian.size(1):
            raise ValueError(f"a Gramian is a square matrix, found shape {tuple(gramian.shape)}")
        normalised = _normalised(gramian.detach().to("cpu", torch.float64))
        if normalised is None:
            return torch.ones(gramian.size(0), dtype=torch.float64)
        return self.weights(normalised, step)

    @abstractmethod
    def weights(self, gramian: Tensor, step: int) -> Tensor:
        """The weights for a positive semi-definite Gramian of trace 1, (m, m) float64."""


def _normalised(gramian: Tensor) -> Tensor | None:
    """The Gramian with trace 1 and no negative eigenvalue; None if it is zero or not finite."""
    largest = gramian.abs().max()  # of the entries first, since the trace could overflow
    if not (torch.isfinite(largest) and gramian.trace() > 0):
        return None
    gramian = gramian / largest
    gramian = (gramian + gramian.T) / 2
    gramian = gramian / gramian.trace()
    # Products summed in low precision can make G slightly indefinite, by an error relative to the two gradients' norms:
    # it is measured between unit gradients and taken out by lengthening each gradient in proportion.
    squares = gramian.diagonal().clamp(min=0)
    inverse = torch.where(squares > 0, squares.rsqrt(), 0.0)
    lowest = torch.linalg.eigvalsh(inverse[:, None] * gramian * inverse)[0]
    return gramian + torch.diag(squares * (-lowest).clamp(min=0))
