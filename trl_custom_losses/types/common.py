"""What the types share: families, what a loss may require, denominators, ranks, metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Family = Literal["preference", "policy"]

#: What a loss may name in `requires`.
REQUIREMENTS: dict[str, frozenset[str]] = {
    "preference": frozenset(
        {
            "ref_logps",
            "ref_per_token_logps",
            "entropies",
            "pooled_hidden",
            "sequence_hidden",
            "logits",
            "second_logits",
        }
    ),
    "policy": frozenset(
        {
            "ref_per_token_logps",
            "old_per_token_logps",
            "entropies",
            "pooled_hidden",
            "sequence_hidden",
            "logits",
            "rewards",
            "group_ids",
        }
    ),
}

#: What a policy loss may name in `rollout_requires`: what `Rollout.forward()` must hold beyond log-probabilities.
ROLLOUT_REQUIREMENTS = frozenset({"pooled_hidden", "ref_per_token_logps"})

#: (values (N, T), mask (N, T), sequence denominator, token denominator, denominators) -> scalar
TokenReduction = Callable[[Tensor, Tensor, "Tensor | float", "Tensor | float", "Denominators"], Tensor]


@dataclass(kw_only=True, eq=False)
class Denominators:
    """What sums over one micro-batch are divided by.

    The trainer scales them so that summing the gradients of all micro-batches and averaging them over ranks gives
    the mean over the whole optimizer step.

    Args:
        sequences: Number of pairs (preference) or sequences (policy).
        tokens: Number of scored tokens of all rows, counted as at least 1 before any scaling.
        chosen_tokens: The same of the chosen rows (preference only).
        micro_batches: What a value that is already a mean over the micro-batch is divided by.
        share: This micro-batch's share of the step's pairs or sequences, over accumulation and ranks, in (0, 1].
        step_fraction: What the trainer, and the averaging over ranks, still multiply a contribution by: the sum of
            `step_fraction * contribution` over all micro-batches and ranks is the loss of the optimizer step.
    """

    sequences: Tensor | float
    tokens: Tensor | float
    chosen_tokens: Tensor | float = 0.0
    micro_batches: float = 1.0
    share: Tensor | float = 1.0
    step_fraction: float = 1.0


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes that train together; one process by default.

    Both functions are collectives: every rank calls them with tensors of one shape, or all of them hang.

    Args:
        index: Of this process.
        count: Number of processes.
        sum: Adds a tensor up over the ranks.
        gather: Concatenates (B, ...) tensors over the ranks in their order, (count * B, ...), without gradient.
    """

    index: int = 0
    count: int = 1
    sum: Callable[[Tensor], Tensor] = _itself
    gather: Callable[[Tensor], Tensor] = _itself


@dataclass(frozen=True)
class Metric:
    """A metric that is not a plain average over sequences, tokens or micro-batches.

    Args:
        value: Detached tensor: scalar, (B,), (B, 1) or (B, T).
        per: "log" averages over everything since the last log, by count. "micro_batch" takes one value per global
            micro-batch and averages those, as TRL's own metrics do.
        reduce: "mean", or "min"/"max" over the sequences of a micro-batch (implies `per="micro_batch"`), or "exp", the
            exponential of the mean over everything since the last log (a perplexity; implies `per="log"`).
        mask: 0 for values that do not count, of the same shape; without it every row counts, and every scored token.
    """

    value: Tensor
    per: Literal["log", "micro_batch"] = "log"
    reduce: Literal["mean", "min", "max", "exp"] = "mean"
    mask: Tensor | None = None


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the last dimension where `mask` is not 0; masked values, NaN included, neither count nor get gradient.

    Args:
        values: (N, T).
        mask: (N, T).
    """
    return values.masked_fill(mask == 0, 0).sum(dim=-1)


def slopes_of(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of `loss`, None where it does not depend on a tensor; the graph stays.

    Args:
        loss: Scalar.
        tensors: That it was computed from.
    """
    if not loss.requires_grad or not tensors:
        return [None] * len(tensors)
    return list(torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True))


def gradients_of(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """As `slopes_of`, with zeros in place of None."""
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, slopes_of(loss, tensors), strict=True)]
