"""Gradients of losses with respect to the tensors through which they reach the model, and the angles between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradients_of(loss: Tensor, anchors: Sequence[Tensor], mask: Tensor | None = None) -> list[Tensor]:
    """Gradients of `loss`, 0 where it does not depend on an anchor; the graph stays.

    Args:
        loss: Scalar.
        anchors: Tensors that it was computed from.
        mask: 0 where a gradient of an anchor of its shape does not reach the model and so does not count, however
            the loss treats such positions.
    """
    found: Sequence[Tensor | None] = [None] * len(anchors)
    if loss.requires_grad and anchors:
        found = torch.autograd.grad(loss, anchors, retain_graph=True, allow_unused=True)
    gradients = [torch.zeros_like(a) if g is None else g for a, g in zip(anchors, found, strict=True)]
    if mask is None:
        return gradients
    return [g.masked_fill(mask == 0, 0) if g.shape == mask.shape else g for g in gradients]


def gramian_of(losses: Sequence[Tensor], anchors: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Inner products between the gradients of `losses` with respect to `anchors`, (m, m); the graph stays.

    Args:
        losses: Scalars.
        anchors, mask: See `gradients_of`.
    """
    rows = [gradients_of(loss, anchors, mask) for loss in losses]
    products = []
    for parts in zip(*rows, strict=True):  # one anchor, all losses
        flat = torch.stack([part.flatten() for part in parts])
        products.append(flat @ flat.T)
    return torch.stack(products).sum(0)
