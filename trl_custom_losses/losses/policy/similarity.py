"""How similar a rollout's completions are to one another: alike on all ranks, without a matrix of all pairs."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapters import import_loss
from ...errors import LossConfigError
from ...types import Rollout

_UNITS = 10**5  # a similarity in whole numbers of 1e-5
_GRID = 2.0**26
_SMALLEST_SIDE = 64


def check_embedding(embedding: str) -> str:
    """Check the hyperparameter `embedding`: "hidden", "tokens" or the import path of a function.

    Raises:
        LossConfigError: It is none of them, or the function cannot be imported or called.
    """
    if embedding not in ("hidden", "tokens"):
        _function(embedding)
    return embedding


class Similarities(ABC):
    """Cosines of the angles between N completions, computed piece by piece where they are asked for.

    They come rounded to 5 decimals, as whole numbers of 1e-5, which are float64 so that their sums are exact: what is
    equal up to floating-point noise, such as the similarities to two equal completions, is equal then, on every rank,
    and ties can be broken by a rule. No piece has more than `side` x `side` elements, whatever N.

    Args:
        size: N.
        device: Where pieces are computed.
    """

    side = 512

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.device = device

    @abstractmethod
    def units(self, rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
        """Similarities of some completions to others, (R, C), in whole numbers of 1e-5, float64."""

    @abstractmethod
    def take(self, index: Tensor) -> Similarities:
        """Similarities between the completions named by `index`, (M,), in its order."""

    def tiles(self, fields: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Similarities between all completions of one field, tile by tile.

        Each is computed once and yielded twice, also transposed; as seen from a completion, the others come in the
        order of the batch. Where fields are small, so are tiles: the cost is N times the size of a field.

        Args:
            fields: Which completions to compare: those with the same number, (N,), on the host; all by default.

        Yields:
            Numbers of the completions in rows, (R,), and columns, (C,); their similarities, (R, C), as in `units`;
            whether both are of one field and not the same, (R, C).
        """
        fields = torch.zeros(self.size, dtype=torch.long) if fields is None else fields
        order = fields.argsort(stable=True)
        source = self if torch.equal(order, torch.arange(self.size)) else self.take(order)
        fields = fields[order]
        largest = int(fields.unique_consecutive(return_counts=True)[1].max())
        side = min(self.side, max(largest, _SMALLEST_SIDE))
        begin = torch.searchsorted(fields, fields)
        order, fields = order.to(self.device), fields.to(self.device)
        for column in range(0, self.size, side):
            columns = slice(column, column + side)
            for row in range(int(begin[column]) // side * side, column + 1, side):
                rows = slice(row, row + side)
                units = source.units(rows, columns)
                compared = fields[rows].unsqueeze(1) == fields[columns].unsqueeze(0)
                if row == column:
                    yield order[rows], order[columns], units, compared.fill_diagonal_(False)
                else:
                    yield order[columns], order[rows], units.T, compared.T
                    yield order[rows], order[columns], units, compared


class VectorSimilarities(Similarities):
    """Similarities between vectors; 0 with a vector of zeros.

    Directions are float64 whose entries are rounded to multiples of 2^-26. So products are multiples of 2^-52 and no
    sum of some of them reaches 2: float64 holds them exactly, and no order of summation, number of threads, size of
    pieces or device makes a difference. Rounding moves a cosine by about 1e-8, at most by 1.5e-6 for D = 1024.

    Args:
        vectors: (N, D), of any type and length. They are compared on their device where that is a CPU or a CUDA GPU,
            on the host otherwise, as others may lack float64.

    Raises:
        ValueError: They are not all finite.
    """

    def __init__(self, vectors: Tensor) -> None:
        vectors = vectors.detach()
        device = vectors.device if vectors.device.type in ("cpu", "cuda") else torch.device("cpu")
        super().__init__(vectors.size(0), device)
        self._directions = torch.empty(vectors.shape, dtype=torch.float64, device=device)
        finite = torch.ones((), dtype=torch.bool, device=device)
        rows = max(1, self.side**2 // max(1, vectors.size(1)))
        for found, some in zip(self._directions.split(rows), vectors.split(rows), strict=True):
            some = some.to(device).double()
            finite &= some.isfinite().all()
            found.copy_(_directions(some))
        if not finite:
            raise ValueError("the embeddings of completions, which similarities are computed from, are not all finite")

    def units(self, rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
        products = self._directions[rows] @ self._directions[columns].T
        return products.mul_(_UNITS).round_().clamp_(-_UNITS, _UNITS)

    def take(self, index: Tensor) -> VectorSimilarities:
        found = copy(self)
        found._directions = self._directions[index.to(self.device)]
        found.size = index.numel()
        return found


class BagSimilarities(Similarities):
    """Similarities between bags, computed on the host; 0 with an empty one.

    Args:
        owners: The completion in whose bag each item is, (M,).
        items: Which item it is, from 0, (M,).
        size: N.
    """

    def __init__(self, owners: Tensor, items: Tensor, size: int) -> None:
        super().__init__(size, torch.device("cpu"))
        kinds = int(items.max()) + 1 if items.numel() else 1
        kept, counts = (owners * kinds + items).unique(return_counts=True)
        owners, items, counts = kept // kinds, kept % kinds, counts.double()
        self._squares = torch.zeros(size, dtype=torch.float64).index_add_(0, owners, counts.square())
        # What is in one bag alone counts for that bag's length and for no product: most n-grams are.
        shared = items.bincount(minlength=kinds) > 1
        here, renumbered = shared[items], shared.cumsum(0) - 1
        self._lengths = owners[here].bincount(minlength=size)
        self._items, self._counts, self._kinds = renumbered[items[here]], counts[here], max(1, int(shared.sum()))
        self._last: tuple[slice, Tensor] | None = None

    def units(self, rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support")  # which the product uses inside
            products = torch.sparse.mm(self._bags(rows), self._transposed(columns)).to_dense()
        numbers, squares = torch.arange(self.size), self._squares
        itself = numbers[rows].unsqueeze(1) == numbers[columns]
        products = torch.where(itself, squares[columns], products)  # with what is in this bag alone
        lengths = (squares[rows].unsqueeze(1) * squares[columns]).sqrt_()
        return products.div_(lengths.clamp_(min=1)).mul_(_UNITS).round_().clamp_(-_UNITS, _UNITS)

    def take(self, index: Tensor) -> BagSimilarities:
        found = copy(self)
        bags = self._bags(index)
        found.size, found._last = index.numel(), None
        found._squares, found._lengths = self._squares[index], self._lengths[index]
        found._items, found._counts = bags.indices()[1], bags.values()
        return found

    def _bags(self, rows: Tensor | slice) -> Tensor:
        """Counts in some completions' bags, (R, kinds), sparse."""
        begin = self._lengths.cumsum(0) - self._lengths
        begin, lengths = begin[rows], self._lengths[rows]
        owners = torch.arange(lengths.numel()).repeat_interleave(lengths)
        own_begin = lengths.cumsum(0) - lengths
        where = torch.arange(owners.numel()) + (begin - own_begin)[owners]
        indices, shape = torch.stack((owners, self._items[where])), (lengths.numel(), self._kinds)
        return torch.sparse_coo_tensor(indices, self._counts[where], shape, is_coalesced=True, check_invariants=True)

    def _transposed(self, columns: Tensor | slice) -> Tensor:
        """As `_bags`, transposed; kept until other columns are asked for, since tiles ask for the same in a row."""
        if self._last is not None and self._last[0] == columns:
            return self._last[1]
        bags = self._bags(columns).t().coalesce()
        self._last = (columns, bags) if isinstance(columns, slice) else None
        return bags


def sums_within(similarities: Similarities, fields: Tensor) -> Tensor:
    """Sum of a completion's positive similarities to the others of its field, (N,), float64 on the host.

    Args:
        similarities: Between N completions.
        fields: (N,), on the host.
    """
    sums = torch.zeros(similarities.size, dtype=torch.float64, device=similarities.device)
    for rows, _, units, compared in similarities.tiles(fields):
        sums[rows] += (units.clamp(min=0) * compared).sum(1)
    return sums.cpu() / _UNITS


def nearest_within(similarities: Similarities, fields: Tensor) -> Tensor:
    """The completion most similar to each among the others of its field, (N,), on the host; -1 where it is alone.

    The first of the batch where several are equally similar.

    Args:
        similarities: Between N completions.
        fields: (N,), on the host.
    """
    nearest = torch.full((similarities.size,), -1, device=similarities.device)
    best = torch.full_like(nearest, -torch.inf, dtype=torch.float64)
    for rows, columns, units, compared in similarities.tiles(fields):
        largest, where = units.masked_fill(~compared, -torch.inf).max(1)  # the first of the largest
        better = largest > best[rows]
        best[rows] = torch.where(better, largest, best[rows])
        nearest[rows] = torch.where(better, columns[where], nearest[rows])
    return nearest.cpu()


def similarities(rollout: Rollout, embedding: str, max_ngram: int) -> Similarities:
    """Similarities between the completions of all ranks.

    Args:
        rollout: The generation batch.
        embedding: "hidden" compares the policy's pooled last hidden states, "tokens" bags of token n-grams, counted
            exactly; anything else names a function from a list of texts to vectors, (B, D).
        max_ngram: Length of the longest n-gram.
    """
    if embedding == "tokens":
        return _ngram_similarities(rollout, max_ngram)
    hidden = embedding == "hidden"
    vectors = rollout.forward().pooled_hidden if hidden else _vectors_of_texts(rollout, embedding)
    return VectorSimilarities(rollout.gather(vectors))


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


def _directions(vectors: Tensor) -> Tensor:
    """Unit vectors on the grid that `VectorSimilarities` describes, (N, D), float64; 0 for a vector of zeros."""
    # Over the largest entry first: squares of huge or tiny numbers would leave the range.
    vectors = vectors / vectors.abs().amax(1, keepdim=True).clamp(min=1e-300)
    # The length from whole numbers as well, whose squares are summed in two halves, exactly in whatever order.
    squares = (vectors * 2**30).round_().long().square_()
    high, low = (squares >> 30).sum(1, keepdim=True), (squares & (2**30 - 1)).sum(1, keepdim=True)
    lengths = (high.double() * 2**30 + low.double()).sqrt() / 2**30
    return (vectors / lengths.clamp(min=1)).mul_(_GRID).round_().div_(_GRID)


def _ngram_similarities(rollout: Rollout, longest: int) -> BagSimilarities:
    """Of the completions' bags of n-grams of 1 to `longest` scored tokens in a row."""
    ids = rollout.gather_padded(rollout.completion_ids).cpu().unique(return_inverse=True)[1]
    mask = rollout.gather_padded(rollout.mask).cpu() > 0
    rows = torch.arange(ids.size(0)).unsqueeze(1)
    vocabulary, total = ids.max() + 1, 0
    grams, whole, owners, items = ids, mask, [], []
    for length in range(1, min(longest, ids.size(1)) + 1):
        if length > 1:  # the n-gram that is one shorter and the token after it, numbered anew
            grams = (grams[:, :-1] * vocabulary + ids[:, length - 1 :]).unique(return_inverse=True)[1]
            whole = whole[:, :-1] & mask[:, length - 1 :]
        owners.append(rows.expand_as(grams)[whole])
        items.append(grams[whole] + total)
        total += int(grams.max()) + 1
    return BagSimilarities(torch.cat(owners), torch.cat(items), ids.size(0))


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
