"""Inner products between the gradients of losses, with respect to the tensors through which they reach the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..base import Loss
from ..types import ModelOutputs, PolicyBatch, PreferenceBatch

#: What a watched loss observes: products of its components' gradients, before and with their weights.
WATCHED, WATCHED_WEIGHTED = "watched gradients", "watched weighted gradients"

#: Values of a gradient in half precision that are widened at a time.
_WIDENED = 2**20
#: Values that a GPU's `dot` takes at a time, fewer than 2^31.
_LONGEST = 2**30


def gramian_of(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Inner products between the gradients of m losses, (m, m), in float32 or better.

    Args:
        gradients: Of each loss, with respect to the same tensors; None for 0, but not for all of them.
    """
    size, products = len(gradients), []
    for parts in zip(*gradients, strict=True):  # one tensor, all losses
        flat = {index: part.flatten() for index, part in enumerate(parts) if part is not None}
        if not flat:
            continue
        # Pair by pair: a matrix product needs a copy of all, and rounds to less where TF32 or autocast is on.
        found = {(i, j): _dot(flat[i], flat[j]) for i in flat for j in flat if i <= j}
        nothing = next(iter(found.values())).new_zeros(())
        every = itertools.product(range(size), repeat=2)
        products.append(torch.stack([found.get((min(pair), max(pair)), nothing) for pair in every]).view(size, size))
    return torch.stack(products).sum(0)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Inner product of two gradients of one type, (n,), which half precision would round and let overflow."""
    precise = first.dtype in (torch.float32, torch.float64)
    size = _LONGEST if precise else _WIDENED
    if precise and first.numel() <= size:
        return torch.dot(first, second)
    pieces = zip(first.split(size), second.split(size), strict=True)
    exact = first.dtype if precise else torch.float32
    return torch.stack([torch.dot(a.to(exact), b.to(exact)) for a, b in pieces]).sum()


def step_gramian(
    contributions: Collection[Tensor], batch: PreferenceBatch | PolicyBatch, outputs: ModelOutputs
) -> Tensor:
    """What a micro-batch adds to the optimizer step's inner products between m gradients, (m, m).

    Micro-batches and ranks hold different rows, so that theirs add up to the step's.

    Args:
        contributions: The micro-batch's share of each loss, m scalars.
        batch: Its denominators tell what becomes of the contributions.
        outputs: That they were computed from, with at least one anchor.
    """
    gradients: list[list[Tensor | None]] = [outputs.slopes(part) for part in contributions]
    if all(gradient is None for each in gradients for gradient in each):
        gradients = [outputs.gradients(part) for part in contributions]
    return gramian_of(gradients) * batch.denominators.step_fraction**2


def cosines(names: Sequence[str], gramian: Tensor) -> dict[str, float]:
    """Cosine between each two gradients, by metric name; none for a gradient of length 0.

    Args:
        names: Of the m gradients.
        gramian: (m, m), on the host.
    """
    found = {}
    for (i, first), (j, second) in itertools.combinations(enumerate(names), 2):
        lengths = math.sqrt(gramian[i, i]) * math.sqrt(gramian[j, j])
        if lengths > 0 and math.isfinite(lengths):
            found[f"grad_cosine/{first}/{second}"] = float(gramian[i, j]) / lengths
    return found


def watch_parts(loss: Loss, gramian: Tensor | None, weights: Sequence[float | Tensor]) -> None:
    """Let a composition observe its parts' gradients, if it is watched.

    Args:
        loss: The composition.
        gramian: The micro-batch's, of the parts before their weights, (m, m); None where there is nothing to see.
        weights: Of the parts in this micro-batch, m of them.
    """
    if gramian is None or not loss.watching:
        return
    scale = torch.stack([w if isinstance(w, Tensor) else gramian.new_full((), w) for w in weights])
    loss.observe(WATCHED, gramian)
    loss.observe(WATCHED_WEIGHTED, torch.outer(scale, scale) * gramian)


def watch_whole(loss: Loss, contribution: Tensor, batch: PreferenceBatch | PolicyBatch, outputs: ModelOutputs) -> None:
    """Let a trainer's loss observe its gradient, if it is watched and is no composition that observes its parts'.

    What is around a composition may change its gradient, as `clipped_loss` does.

    Args:
        loss: The trainer's.
        contribution: Its share of the micro-batch, a scalar.
        batch, outputs: That it was computed on.
    """
    if loss.watching and outputs.anchors() and not loss.watches_parts:
        loss.observe(WATCHED, step_gramian([contribution], batch, outputs))


def watched_metrics(loss: Loss, observed: Mapping[str, Tensor]) -> dict[str, float]:
    """Norms and cosines of gradients over an optimizer step, by metric name.

    Args:
        loss: That observed them.
        observed: Sums over micro-batches and ranks, on the host; those of `WATCHED` and `WATCHED_WEIGHTED` count.
    """
    if WATCHED not in observed:
        return {}
    gramian = observed[WATCHED]
    names = [name for name, _ in loss.components()] if loss.watches_parts else [loss.name]
    found = {f"grad_norm/{name}": _root(square) for name, square in zip(names, gramian.diagonal(), strict=True)}
    if WATCHED_WEIGHTED in observed:
        weighted = observed[WATCHED_WEIGHTED]
        for name, square in zip(names, weighted.diagonal(), strict=True):
            found[f"grad_norm_weighted/{name}"] = _root(square)
        found["grad_norm/total"] = _root(weighted.sum())
    return found | cosines(names, gramian)


def _root(square: Tensor) -> float:
    # Rounding can leave the square of a sum that cancels slightly below 0; NaN stays NaN.
    return math.sqrt(value) if not (value := float(square)) < 0 else 0.0
