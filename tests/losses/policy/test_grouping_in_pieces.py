"""Similarities and groups of large batches, computed piece by piece."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scripts.benchmarks.grouping import groups_from_matrix, matrix_of_cosines, vectors
from scripts.benchmarks.measure import peak_memory
from trl_custom_losses.losses.policy import dynamic_grpo, similarity
from trl_custom_losses.losses.policy.dynamic_grpo import form_groups
from trl_custom_losses.losses.policy.similarity import (
    Similarities,
    VectorSimilarities,
    nearest_within,
    similarities,
    sums_within,
)
from trl_custom_losses.testing import random_data

from .similarity_tools import GivenSimilarities, groups_by_definition, matrix

_THRESHOLDS = [-1.0, -0.3, 0.0, 0.1, 0.5, 0.8, 0.95, 1.0]


@pytest.fixture(params=["pieces", "one piece"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few responses, so that there are many, or as large as in training."""
    if request.param == "pieces":
        monkeypatch.setattr(Similarities, "side", 5)


@pytest.fixture(params=["all", "some", "none"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All near pairs are kept; only when few are left; none, if there are any."""
    if request.param != "all":
        monkeypatch.setattr(dynamic_grpo, "_KEPT", 0)
        monkeypatch.setattr(dynamic_grpo, "_KEPT_EACH", 5 if request.param == "some" else 0)


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    """Vectors in clusters, of any length, with duplicates and vectors of zeros, and a prompt of each."""
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 60, (), generator=generator))
    found = vectors(size, clusters=1 + size // 6, dimensions=(2, 4, 40)[seed % 3], noise=0.5, seed=seed)
    found *= torch.rand(size, 1, generator=generator) * 10
    for _ in range(size // 5):
        first, second = torch.randint(size, (2,), generator=generator)
        found[first] = found[second]
    found[torch.rand(size, generator=generator) < 0.07] = 0
    if seed % 4 == 0:
        found = found.round()  # many equal similarities
    return found, torch.randint(1 + size // 8, (size,), generator=generator)


def _random_texts(seed: int) -> tuple[Similarities, Tensor]:
    """Completions of few kinds of tokens, some of them without a scored one."""
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(2, 40, (), generator=generator))
    data = random_data("policy", size=size, length=5)
    mask = (torch.rand(size, 5, generator=generator) < 0.8).long()
    mask[torch.rand(size, generator=generator) < 0.1] = 0
    data = data.with_rows(ids=torch.randint(3, (size, 5), generator=generator), mask=mask)
    return similarities(data.rollout(), "tokens", 2), torch.randint(1 + size // 8, (size,), generator=generator)


def _sets(groups: Tensor) -> set[frozenset[int]]:
    return {frozenset(torch.where(groups == number)[0].tolist()) for number in groups.unique()}


# Groups


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("pieces", "kept")
def test_groups_of_vectors_are_those_of_the_definition(seed: int) -> None:
    found, prompts = _batch(seed)
    cosines = matrix_of_cosines(found)
    for threshold in _THRESHOLDS:
        for largest in (3, 100):
            near = cosines >= threshold
            expected = groups_from_matrix(cosines, near, largest)
            assert torch.equal(form_groups(VectorSimilarities(found), threshold, largest), expected)
            of_prompts = groups_from_matrix(cosines, near & (prompts.unsqueeze(0) == prompts.unsqueeze(1)), largest)
            groups = form_groups(VectorSimilarities(found), threshold, largest, prompts)
            assert sorted(set(groups.tolist())) == list(range(int(groups.max()) + 1))
            assert _sets(groups) == _sets(of_prompts)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("pieces", "kept")
def test_groups_of_bags_are_those_of_the_definition(seed: int) -> None:
    bags, prompts = _random_texts(seed)
    cosines = matrix(bags)
    for threshold in _THRESHOLDS:
        near = cosines >= threshold
        assert torch.equal(form_groups(bags, threshold, 4), groups_from_matrix(cosines, near, 4))
        of_prompts = groups_from_matrix(cosines, near & (prompts.unsqueeze(0) == prompts.unsqueeze(1)), 4)
        assert _sets(form_groups(bags, threshold, 4, prompts)) == _sets(of_prompts)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("largest", [1, 3, 100])
def test_the_matrix_of_the_benchmark_gives_the_groups_of_the_definition(seed: int, largest: int) -> None:
    cosines = matrix_of_cosines(_batch(seed)[0])
    for threshold in _THRESHOLDS:
        expected = groups_by_definition(cosines.tolist(), (cosines >= threshold).tolist(), largest)
        assert groups_from_matrix(cosines, cosines >= threshold, largest).tolist() == expected


@pytest.mark.usefixtures("pieces", "kept")
def test_responses_that_are_near_to_none_come_last_in_their_order() -> None:
    cosines = torch.eye(12, dtype=torch.float64)
    cosines[7, 9] = cosines[9, 7] = 0.9
    groups = form_groups(GivenSimilarities(cosines), 0.8, 5)
    assert groups.tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 8, 0, 9, 10]


@pytest.mark.usefixtures("pieces")
def test_groups_of_one_compute_no_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GivenSimilarities, "units", None)
    assert form_groups(GivenSimilarities(torch.ones(4, 4)), -1.0, 1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("threshold", [0.29, 0.57, 0.80001, 0.99999, -0.29, 1.0, -1.0])
def test_a_similarity_of_the_threshold_is_near(threshold: float) -> None:
    cosines = torch.tensor([[1.0, threshold], [threshold, 1.0]], dtype=torch.float64)
    assert form_groups(GivenSimilarities(cosines), threshold, 2).tolist() == [0, 0]
    if threshold > -1:
        assert form_groups(GivenSimilarities(cosines - 1e-5), threshold, 2).tolist() == [0, 1]


def test_prompts_are_compared_by_themselves() -> None:
    """No similarity between responses far apart is computed, whatever the order of the batch."""
    asked = []

    class Counted(VectorSimilarities):
        def units(self, rows: Tensor | slice, columns: Tensor | slice) -> Tensor:
            found = super().units(rows, columns)
            asked.append(found.numel())
            return found

    found, prompts = vectors(1000, 100, 8), torch.arange(1000) % 125
    form_groups(Counted(found), 0.8, 10, prompts)
    sums_within(Counted(found), prompts)
    nearest_within(Counted(found), prompts)
    assert sum(asked) <= 3 * 1000 * 64
    asked.clear()
    form_groups(Counted(found), 0.8, 10)
    assert sum(asked) >= 1000**2 / 2


# Similarities


@pytest.mark.parametrize("dimensions", [3, 64, 1000])
def test_cosines_do_not_depend_on_pieces_or_the_order_of_summation(dimensions: int) -> None:
    """Bit for bit, before they are rounded too."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(37, dimensions, generator=generator) * torch.rand(37, 1, generator=generator) * 100
    whole = VectorSimilarities(found)
    shuffled = torch.randperm(dimensions, generator=generator)
    other = VectorSimilarities(found[:, shuffled])
    assert torch.equal(other._directions, whole._directions[:, shuffled])
    products = whole._directions @ whole._directions.T
    assert torch.equal(other._directions @ other._directions.T, products)
    one_by_one = (whole._directions.unsqueeze(0) * whole._directions.unsqueeze(1)).flip(2).cumsum(2)[..., -1]
    assert torch.equal(one_by_one, products)
    for rows, columns, units, _ in whole.tiles():
        assert torch.equal(units, (products[rows][:, columns] * 1e5).round().clamp(-1e5, 1e5))


def test_lengths_do_not_depend_on_the_order_of_summation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in their last bit, which a fine grid shows."""
    monkeypatch.setattr(similarity, "_GRID", 2.0**60)
    generator = torch.Generator().manual_seed(0)
    found, order = torch.randn(100, 300, generator=generator), torch.randperm(300, generator=generator)
    shuffled = VectorSimilarities(found[:, order])._directions
    assert torch.equal(shuffled, VectorSimilarities(found)._directions[:, order])


def test_rounding_of_directions_is_far_below_that_of_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    for found in (torch.randn(60, 1024, generator=generator), torch.randn(60, 1024, generator=generator) ** 9):
        directions = VectorSimilarities(found)._directions
        exact = torch.nn.functional.normalize(found.double(), dim=1)
        assert (directions @ directions.T - exact @ exact.T).abs().max() < 1e-7


@pytest.mark.parametrize("side", [1, 7, 40, 64])
@pytest.mark.parametrize("seed", range(4))
def test_tiles_hold_each_pair_once_in_either_direction(side: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Similarities, "side", side)
    for found, prompts in ((VectorSimilarities(_batch(seed)[0]), _batch(seed)[1]), _random_texts(seed)):
        expected = matrix(found)
        for fields in (None, prompts):
            seen = torch.zeros_like(expected)
            last = torch.full((found.size,), -1)
            for rows, columns, units, compared in found.tiles(fields):
                assert units.numel() <= side**2
                seen[rows.unsqueeze(1), columns.unsqueeze(0)] += compared.double()
                assert torch.equal(units / 1e5, expected[rows][:, columns])
                first, final = columns[compared.int().argmax(1)], columns[-1 - compared.flip(1).int().argmax(1)]
                some = compared.any(1)
                assert (first > last[rows])[some].all()  # the others come in the order of the batch
                last[rows] = torch.where(some, final, last[rows])
            same = torch.ones_like(seen) if fields is None else (fields.unsqueeze(0) == fields.unsqueeze(1)).double()
            assert torch.equal(seen, same.fill_diagonal_(0))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("pieces")
def test_sums_and_nearest_within_prompts(seed: int) -> None:
    for found, prompts in ((VectorSimilarities(_batch(seed)[0]), _batch(seed)[1]), _random_texts(seed)):
        others = (prompts.unsqueeze(0) == prompts.unsqueeze(1)).fill_diagonal_(False)
        sums = (matrix(found).clamp(min=0) * others).sum(1)
        torch.testing.assert_close(sums_within(found, prompts), sums, rtol=0, atol=1e-10)
        nearest = matrix(found).masked_fill(~others, -torch.inf).argmax(1)
        expected = nearest.masked_fill(~others.any(1), -1)
        assert torch.equal(nearest_within(found, prompts), expected)


# Memory


@pytest.mark.parametrize("threshold", [0.8, -1.0], ids=["few near", "all near"])
def test_no_matrix_of_all_pairs_is_made(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Similarities, "side", 128)
    monkeypatch.setattr(dynamic_grpo, "_KEPT", 0)
    monkeypatch.setattr(dynamic_grpo, "_KEPT_EACH", 16)
    found = vectors(2048, 256, 16)
    largest = 10 if threshold > 0 else 500
    peak = peak_memory(lambda: form_groups(VectorSimilarities(found), threshold, largest))
    assert peak < 2048**2 * 8 / 6


def test_no_matrix_of_all_pairs_of_bags_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Similarities, "side", 128)
    data = random_data("policy", size=1024, length=4)
    rollout = data.rollout()
    peak = peak_memory(lambda: form_groups(similarities(rollout, "tokens", 2), 0.8, 10))
    assert peak < 1024**2 * 8


@pytest.mark.parametrize("dimensions", [16_384, 65_536])
def test_equal_vectors_have_similarity_one_in_many_dimensions(dimensions: int) -> None:
    """Also where one entry stands out, as in weighted counts of words."""
    for seed in range(3):
        small = 1 / math.sqrt(dimensions) * (1 + 0.1 * torch.rand((), generator=torch.Generator().manual_seed(seed)))
        vector = torch.full((dimensions,), float(small), dtype=torch.float64)
        vector[0] = 1.0
        assert (matrix(VectorSimilarities(vector.repeat(2, 1))) == 1).all()
