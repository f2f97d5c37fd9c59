from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from trl_custom_losses import LossConfigError, Rollout
from trl_custom_losses.losses.policy.similarity import (
    VectorSimilarities,
    check_embedding,
    state_distance,
)
from trl_custom_losses.losses.policy.similarity import similarities as similarities_of
from trl_custom_losses.testing import random_data

from .similarity_tools import matrix

_HERE = f"{__name__}:"


def lengths_and_digits(texts: list[str]) -> Tensor:
    """An embedding of texts."""
    return torch.tensor([[len(text), text.count("1"), 1] for text in texts])


def as_lists(texts: list[str]) -> list[list[float]]:
    return [[1.0, len(text)] for text in texts]


def one_short(texts: list[str]) -> Tensor:
    return torch.ones(len(texts) - 1, 2)


def flat(texts: list[str]) -> Tensor:
    return torch.ones(len(texts))


NO_FUNCTION = 3


def _rollout(ids: list[list[int]], mask: list[list[int]] | None = None) -> Rollout:
    data = random_data("policy", size=len(ids), length=len(ids[0]))
    rows = {"ids": torch.tensor(ids), "mask": torch.ones(len(ids), len(ids[0]), dtype=torch.long)}
    if mask is not None:
        rows["mask"] = torch.tensor(mask)
    return data.with_rows(**rows).rollout()


def cosines(vectors: Tensor) -> Tensor:
    return matrix(VectorSimilarities(vectors))


def similarities(rollout: Rollout, embedding: str, max_ngram: int) -> Tensor:
    return matrix(similarities_of(rollout, embedding, max_ngram))


def _bag(ids: list[int], longest: int) -> Counter:
    return Counter(tuple(ids[i : i + n]) for n in range(1, longest + 1) for i in range(len(ids) - n + 1))


def _cosine(first: Counter, second: Counter) -> float:
    product = sum(count * second[gram] for gram, count in first.items())
    norms = [math.sqrt(sum(count**2 for count in bag.values())) for bag in (first, second)]
    return product / math.prod(norms) if all(norms) else 0.0


# Vectors


def test_cosines_of_vectors() -> None:
    found = cosines(torch.tensor([[1.0, 0.0], [3.0, 3.0], [-2.0, 0.0], [0.0, 0.0]]))
    root = round(math.sqrt(0.5), 5)
    expected = [[1, root, -1, 0], [root, 1, -root, 0], [-1, -root, 1, 0], [0, 0, 0, 0]]
    assert found.tolist() == expected
    assert found.dtype is torch.float64 and found.device.type == "cpu"


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_cosines_do_not_depend_on_lengths(scale: float) -> None:
    vectors = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.tensor([scale, 1.0, scale, 2.0, scale], dtype=torch.float64).unsqueeze(1)
    assert torch.equal(cosines(vectors * lengths), cosines(vectors))


def test_noise_makes_no_difference_between_equal_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 64, generator=generator).repeat_interleave(4, 0)
    noisy = cosines(vectors + 1e-7 * torch.randn(12, 64, generator=generator))
    for first in range(0, 12, 4):
        for second in range(0, 12, 4):
            assert noisy[first : first + 4, second : second + 4].unique().numel() == 1
    assert (noisy.diagonal() == 1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_are_reported(value: float) -> None:
    with pytest.raises(ValueError, match="not all finite"):
        cosines(torch.tensor([[1.0, value], [1.0, 2.0]]))


def test_hidden_compares_the_rollouts_states() -> None:
    data = random_data("policy", size=5)
    found = similarities(data.rollout(), "hidden", 1)
    states = data.rows["old_hidden"]
    expected = torch.nn.functional.cosine_similarity(states.unsqueeze(0), states.unsqueeze(1), dim=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.51e-5)


# Tokens


@pytest.mark.parametrize("longest", [1, 2, 3, 9])
def test_tokens_are_compared_by_their_ngrams(longest: int) -> None:
    data = random_data("policy", size=6, length=7)
    found = similarities(data.rollout(), "tokens", longest)
    lengths = data.rows["mask"].sum(1).tolist()
    bags = [_bag(row[:n], longest) for row, n in zip(data.rows["ids"].tolist(), lengths, strict=True)]
    expected = [[_cosine(first, second) for second in bags] for first in bags]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0.51e-5)


def test_tokens_by_hand() -> None:
    # Counts of 7, 8, 77, 78, 87:  (3, 0, 2, 0, 0), (2, 1, 0, 1, 1), (0, 3, ...) without a gram in common.
    found = similarities(_rollout([[7, 7, 7], [7, 8, 7], [8, 8, 8]]), "tokens", 2)
    assert found[0, 1] == round(6 / math.sqrt(13 * 7), 5)
    assert found[1, 2] == round(3 / math.sqrt(7 * 13), 5)
    assert found[0, 2] == 0


def test_an_ngram_does_not_reach_over_unscored_tokens() -> None:
    rollout = _rollout([[1, 2, 3, 9], [1, 9, 9, 3], [1, 2, 3, 4]], [[1, 0, 1, 0], [1, 0, 0, 1], [1, 1, 1, 1]])
    found = similarities(rollout, "tokens", 3)
    assert found[0, 1] == 1  # both: 1 and 3
    assert found[0, 2] == round(2 / math.sqrt(2 * 9), 5)


def test_a_completion_without_a_scored_token_is_similar_to_none() -> None:
    found = similarities(_rollout([[1, 2], [1, 2], [3, 3]], [[1, 1], [0, 0], [0, 0]]), "tokens", 2)
    assert found.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert not similarities(_rollout([[1, 2], [1, 2]], [[0, 0], [0, 0]]), "tokens", 2).any()


def test_padding_and_other_rows_do_not_matter() -> None:
    data = random_data("policy", size=6, length=7)
    whole = similarities(data.rollout(), "tokens", 2)
    assert torch.equal(similarities(data.padded(3, 0.0).rollout(), "tokens", 2), whole)
    part = data.take([4, 0, 2]).rollout()
    assert torch.equal(similarities(part, "tokens", 2), whole[[4, 0, 2]][:, [4, 0, 2]])


# Functions


@pytest.mark.parametrize("name", ["lengths_and_digits", "as_lists"])
def test_a_function_of_the_texts(name: str) -> None:
    rollout = random_data("policy", size=4).rollout()
    texts = rollout.texts()
    vectors = torch.as_tensor(globals()[name](texts)).float()
    assert torch.equal(similarities(rollout, _HERE + name, 2), cosines(vectors))


@pytest.mark.parametrize("name", ["one_short", "flat"])
def test_a_function_that_returns_something_else_is_reported(name: str) -> None:
    rollout = random_data("policy", size=4).rollout()
    with pytest.raises(ValueError, match=rf"'embedding': .*{name} must return one vector .* 4 texts, found the shape"):
        similarities(rollout, _HERE + name, 2)


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        ("Hidden", "expected 'hidden', 'tokens' or the import path of a function, .* found 'Hidden'"),
        ("no_such_package_at_all:f", "could not import 'no_such_package_at_all'"),
        (_HERE + "no_such_function", "has no 'no_such_function'"),
        (_HERE + "NO_FUNCTION", "is no function, found 3"),
        ("a b:c", "looks like 'package.module"),
    ],
)
def test_embeddings_that_cannot_be_used_are_refused(embedding: str, message: str) -> None:
    with pytest.raises(LossConfigError, match=f"(?s)hyperparameter 'embedding': .*{message}"):
        check_embedding(embedding)


# Distances of states


@pytest.mark.parametrize(
    ("other", "distance"),
    [([2.0, 0.0], 0.0), ([0.0, 5.0], math.sqrt(2)), ([-1.0, 0.0], 2.0), ([1.0, 1.0], math.sqrt(2 - math.sqrt(2)))],
)
def test_distance_of_directions(other: list[float], distance: float) -> None:
    found = state_distance(torch.tensor([[3.0, 0.0]]), torch.tensor([other]))
    assert found.item() == pytest.approx(distance, abs=1.1e-3)
    assert 0 <= found.item() < 2


@pytest.mark.parametrize("state", [[3.0, 0.0], [1.0, 1e-9], [1e-30, 0.0], [1e30, 1e30], [0.0, 0.0]])
def test_distance_has_a_finite_gradient(state: list[float]) -> None:
    states = torch.tensor([state], dtype=torch.float64, requires_grad=True)
    distance = state_distance(states, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(distance.sum(), states)
    assert distance.isfinite().all() and gradient.isfinite().all()


def test_distance_is_flat_where_the_directions_meet() -> None:
    states = torch.tensor([[3.0, 4.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(state_distance(states, states.detach() * 2).sum(), states)
    assert gradient.abs().max() < 1e-3
