"""How similar a rollout's completions are to one another: computed on the host, so that all ranks agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapters import import_loss
from ...errors import LossConfigError
from ...types import Rollout

_DECIMALS = 5


def check_embedding(embedding: str) -> str:
    """Check the hyperparameter `embedding`: "hidden", "tokens" or the import path of a function.

    Raises:
        LossConfigError: It is none of them, or the function cannot be imported or called.
    """
    if embedding not in ("hidden", "tokens"):
        _function(embedding)
    return embedding


def similarities(rollout: Rollout, embedding: str, max_ngram: int) -> Tensor:
    """Cosine similarities between the completions of all ranks, (N, N), as `cosines` returns them.

    Args:
        rollout: The generation batch.
        embedding: "hidden" compares the policy's pooled last hidden states, "tokens" bags of token n-grams, counted
            exactly; anything else names a function from a list of texts to vectors, (B, D).
        max_ngram: Length of the longest n-gram.
    """
    if embedding == "tokens":
        return _as_cosines(_ngram_products(rollout, max_ngram))
    hidden = embedding == "hidden"
    return cosines(rollout.gather(rollout.forward().pooled_hidden if hidden else _vectors_of_texts(rollout, embedding)))


def cosines(vectors: Tensor) -> Tensor:
    """Cosine of the angle between any two of the vectors; 0 with a vector of zeros.

    Computed in float64 on the host and rounded to 5 decimals: what is equal up to floating-point noise, such as the
    similarities to two equal completions, is equal then, on every rank, and ties can be broken by a rule.

    Args:
        vectors: (N, D).

    Returns:
        (N, N), float64, on the host.
    """
    vectors = vectors.detach().cpu().double()
    if not vectors.isfinite().all():
        raise ValueError("the embeddings of completions, which similarities are computed from, are not all finite")
    # Scaled by the largest entry first: squares of huge or tiny numbers would leave the range.
    vectors = F.normalize(vectors / vectors.abs().amax(1, keepdim=True).clamp(min=1e-300), dim=1)
    return _as_cosines(vectors @ vectors.T)


def state_distance(states: Tensor, others: Tensor) -> Tensor:
    """Euclidean distance of the directions of vectors, in [0, 2), with a gradient that is finite everywhere.

    d = sqrt(|a/|a| - b/|b||^2 + s^2) - s,  s = 0.001, so that where the two meet, the slope is 0 and not undefined.

    Args:
        states: (B, H).
        others: (B, H).

    Returns:
        (B,).
    """
    squared = (F.normalize(states, dim=1) - F.normalize(others, dim=1)).square().sum(1)
    return torch.sqrt(squared + 1e-6) - 1e-3


def _as_cosines(products: Tensor) -> Tensor:
    """Scalar products of vectors, (N, N), over their lengths, rounded."""
    lengths = products.diagonal().clamp(min=0).sqrt()
    lengths = lengths.masked_fill(lengths == 0, 1)
    scaled = products / lengths.unsqueeze(0) / lengths.unsqueeze(1)
    return torch.round(scaled.clamp(-1, 1), decimals=_DECIMALS)


def _ngram_products(rollout: Rollout, longest: int) -> Tensor:
    """Scalar products of the completions' counts of n-grams of 1 to `longest` scored tokens in a row, (N, N)."""
    ids = rollout.gather_padded(rollout.completion_ids).cpu().unique(return_inverse=True)[1]
    mask = rollout.gather_padded(rollout.mask).cpu() > 0
    rows = torch.arange(ids.size(0)).unsqueeze(1)
    vocabulary, total = ids.max() + 1, 0
    grams, whole, bags = ids, mask, []
    for length in range(1, min(longest, ids.size(1)) + 1):
        if length > 1:  # the n-gram that is one shorter and the token after it, numbered anew
            grams = (grams[:, :-1] * vocabulary + ids[:, length - 1 :]).unique(return_inverse=True)[1]
            whole = whole[:, :-1] & mask[:, length - 1 :]
        bags.append(torch.stack((rows.expand_as(grams)[whole], grams[whole] + total)))
        total += int(grams.max()) + 1
    bag = torch.cat(bags, dim=1)
    ones = torch.ones(bag.size(1), dtype=torch.float64)
    counts = torch.sparse_coo_tensor(bag, ones, (ids.size(0), total), check_invariants=True).coalesce()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")  # which the product uses inside
        return torch.sparse.mm(counts, counts.t().coalesce()).to_dense()


def _vectors_of_texts(rollout: Rollout, path: str) -> Tensor:
    """What the function named by `path` makes of this rank's completions, (B, D), float32."""
    texts = rollout.texts()
    vectors = torch.as_tensor(_function(path)(texts))
    vectors = vectors.detach().to(rollout.completion_ids.device, torch.float32)
    # A collective of unequal sizes would hang, so that the ranks compare them first; every rank raises or none.
    shape = vectors.shape if vectors.dim() == 2 and vectors.size(0) == len(texts) else (-1, -1)
    widths = rollout.gather(torch.tensor([shape[1]], device=vectors.device))
    if (widths != widths[0]).any() or widths[0] < 0:
        raise ValueError(
            f"hyperparameter 'embedding': {path} must return one vector of a fixed size for each of {len(texts)} "
            f"texts, found the shape {tuple(vectors.shape)}"
        )
    return vectors


def _function(path: str) -> Callable[[list[str]], Any]:
    if ":" not in path:
        raise LossConfigError(
            f"hyperparameter 'embedding': expected 'hidden', 'tokens' or the import path of a function, "
            f"'package.module:function', found {path!r}"
        )
    try:
        function = import_loss(path)
    except LossConfigError as error:
        raise LossConfigError(f"hyperparameter 'embedding': {error}") from error
    if not callable(function):
        raise LossConfigError(f"hyperparameter 'embedding': {path} is no function, found {function!r}")
    return function
