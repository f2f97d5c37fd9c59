from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trl_custom_losses import LossConfigError, LossFunctionRegistry
from trl_custom_losses.losses.policy import DynamicGRPOLoss
from trl_custom_losses.losses.policy.dynamic_grpo import form_groups
from trl_custom_losses.losses.policy.similarity import VectorSimilarities
from trl_custom_losses.reductions import reduce_loss
from trl_custom_losses.testing import Data, random_data
from trl_custom_losses.testing.ranks import prepared_on_ranks

from .similarity_tools import GivenSimilarities, matrix


def _similarity(size: int, pairs: dict[tuple[int, int], float]) -> Tensor:
    """A symmetric matrix with 1 on the diagonal and 0 where nothing is given."""
    found = torch.eye(size, dtype=torch.float64)
    for (first, second), value in pairs.items():
        found[first, second] = found[second, first] = value
    return found


def _grouped(similarity: Tensor, largest: int = 10, threshold: float = 0.8) -> list[int]:
    return form_groups(GivenSimilarities(similarity), threshold, largest).tolist()


def _cosines(vectors: Tensor) -> Tensor:
    return matrix(VectorSimilarities(vectors))


def _sets(groups: list[int]) -> set[frozenset[int]]:
    return {frozenset(i for i, group in enumerate(groups) if group == number) for number in set(groups)}


def _data(states: list[list[float]], rewards: list[float], prompts: list[int] | None = None) -> Data:
    """Completions of one token with given states at rollout."""
    data = random_data("policy", size=len(states), length=1)
    items = {
        "rewards": torch.tensor(rewards, dtype=torch.float64).unsqueeze(1).expand(-1, 2) * torch.tensor([1.0, 0.0]),
        "group_ids": torch.tensor(prompts or [0] * len(states)),
    }
    return replace(data.with_rows(old_hidden=torch.tensor(states, dtype=torch.float64)), items=data.items | items)


# Groups


def test_the_leader_is_who_most_resemble() -> None:
    # 1 resembles 0 and 2, which do not resemble each other; 3 and 4 resemble each other alone.
    similarity = _similarity(6, {(0, 1): 0.9, (1, 2): 0.85, (0, 2): 0.5, (3, 4): 0.99})
    assert _grouped(similarity) == [0, 0, 0, 1, 1, 2]


def test_only_responses_without_a_group_count_for_a_leader() -> None:
    # 5 resembles more than 6 does, but most of them are in the first group already.
    pairs = [(0, 1), (0, 2), (0, 3), (0, 4), (5, 1), (5, 2), (5, 7), (6, 7), (6, 8)]
    assert _grouped(_similarity(9, dict.fromkeys(pairs, 0.9))) == [0, 0, 0, 0, 0, 2, 1, 1, 1]


def test_of_two_leaders_the_one_nearer_to_its_fellows_comes_first_then_the_first() -> None:
    nearer = _similarity(4, {(0, 1): 0.85, (1, 2): 0.9, (2, 3): 0.85})
    assert _grouped(nearer) == [0, 0, 0, 1]  # 1 and 2 both have two; equally near, 1 stands first
    nearer[2, 3] = nearer[3, 2] = 0.86
    assert _grouped(nearer) == [1, 0, 0, 0]


def test_a_full_group_takes_the_most_similar_then_the_first() -> None:
    similarity = _similarity(5, {(0, 1): 0.85, (0, 2): 0.95, (0, 3): 0.9, (0, 4): 0.9})
    assert _grouped(similarity, largest=3) == [0, 1, 0, 0, 2]


def test_the_threshold_itself_is_similar() -> None:
    data = _data([[3.0, 0.0], [0.8, 0.6]], [1.0, 2.0])
    assert DynamicGRPOLoss(similarity_threshold=0.8).groups(data.rollout()).tolist() == [0, 0]
    assert DynamicGRPOLoss(similarity_threshold=0.80001).groups(data.rollout()).tolist() == [0, 1]


def _random_vectors(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 25, (), generator=generator))
    return torch.randn(size, 3, generator=generator) + 0.5


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("largest", [1, 2, 3, 10])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 0.9, 1.0])
def test_each_response_is_in_one_group_around_a_leader_and_none_is_too_large(
    seed: int, largest: int, threshold: float
) -> None:
    similarity = _cosines(_random_vectors(seed))
    groups = _grouped(similarity, largest, threshold)
    assert len(groups) == similarity.size(0)
    assert set(groups) == set(range(max(groups) + 1))
    for members in map(sorted, _sets(groups)):
        assert len(members) <= largest
        assert any((similarity[leader, members] >= threshold).all() for leader in members)
    if largest >= len(groups):  # no two leaders that could have been in one group
        alone = [next(iter(members)) for members in _sets(groups) if len(members) == 1]
        assert all(similarity[first, second] < threshold for first in alone for second in alone if first != second)


@pytest.mark.parametrize("seed", range(12))
def test_groups_do_not_depend_on_the_order_of_responses(seed: int) -> None:
    vectors = _random_vectors(seed)
    order = torch.randperm(vectors.size(0), generator=torch.Generator().manual_seed(seed))
    straight, shuffled = _grouped(_cosines(vectors), 3), _grouped(_cosines(vectors[order]), 3)
    assert _sets(straight) == {frozenset(order[list(members)].tolist()) for members in _sets(shuffled)}


@pytest.mark.parametrize("seed", range(6))
def test_groups_do_not_depend_on_noise(seed: int) -> None:
    """Equal responses get states that differ in the last digits, according to what else is in their batch."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(4, 32, generator=generator).repeat(4, 1)
    noisy = vectors * (1 + 1e-6 * torch.randn(16, 32, generator=generator))
    assert _grouped(_cosines(noisy), 3) == _grouped(_cosines(vectors), 3)


# Advantages

_STATES = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [2.0, 0.1], [0.1, 1.0], [-1.0, 0.0]]
_REWARDS = [1.0, 3.0, 5.0, 8.0, 6.0, 2.0]


def test_advantages_are_against_the_group() -> None:
    data = _data(_STATES, _REWARDS)
    prepared = data.prepared(DynamicGRPOLoss(scale_rewards="none"))
    assert prepared["advantages"].tolist() == pytest.approx([1 - 4, 3 - 4, 5 - 5.5, 8 - 4, 6 - 5.5, 2 - 25 / 6])
    scaled = data.prepared(DynamicGRPOLoss())["advantages"].tolist()
    expected = [(1 - 4) / (statistics.stdev([1, 3, 8]) + 1e-4), (2 - 25 / 6) / (statistics.stdev(_REWARDS) + 1e-4)]
    assert [scaled[0], scaled[5]] == pytest.approx(expected)


def test_groups_stay_within_prompts_where_asked() -> None:
    data = _data(_STATES, _REWARDS, prompts=[0, 0, 0, 1, 1, 1])
    across, within = (
        data.prepared(DynamicGRPOLoss(scope=scope, scale_rewards="none")) for scope in ("batch", "prompt")
    )
    assert across["advantages"].tolist() == pytest.approx([-3, -1, -0.5, 4, 0.5, 2 - 16 / 3])
    assert within["advantages"].tolist() == pytest.approx([-1, 1, 5 - 3, 8 - 16 / 3, 6 - 16 / 3, 2 - 16 / 3])
    assert (across["num_dynamic_groups"][0], within["num_dynamic_groups"][0]) == (3, 5)


@pytest.mark.parametrize("scope", ["batch", "prompt"])
@pytest.mark.parametrize("embedding", ["hidden", "tokens"])
def test_equal_rewards_give_0(scope: str, embedding: str) -> None:
    data = _data(_STATES, [0.1] * 6, prompts=[0, 0, 0, 1, 1, 1])
    assert not data.prepared(DynamicGRPOLoss(scope=scope, embedding=embedding))["advantages"].any()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_of_one_are_grpo(scale: str) -> None:
    data = random_data("policy", size=6)
    alone = data.prepared(DynamicGRPOLoss(max_group_size=1, scale_rewards=scale))
    whole = data.prepared(DynamicGRPOLoss(similarity_threshold=-1.0, scope="prompt", scale_rewards=scale))
    torch.testing.assert_close(alone["advantages"], whole["advantages"])
    assert (alone["frac_singleton_groups"] == 1).all() and (whole["frac_singleton_groups"] == 0).all()


# Ranks


@pytest.mark.parametrize("ranks", [2, 3, 4, 12])
@pytest.mark.parametrize(
    "options",
    [
        {"similarity_threshold": 0.5, "max_group_size": 3},
        {"similarity_threshold": 0.2, "embedding": "tokens", "max_group_size": 4},
        {"similarity_threshold": 0.5, "scope": "prompt", "scale_rewards": "batch"},
        {"similarity_threshold": 0.95, "embedding": f"{__name__}:letters"},
    ],
    ids=["batch", "tokens", "prompt", "function"],
)
def test_ranks_find_the_groups_of_one_process(ranks: int, options: dict) -> None:
    data = random_data("policy", size=12, length=6)
    loss = DynamicGRPOLoss(**options)
    expected = data.prepared(loss)
    assert 1 < expected["num_dynamic_groups"][0] < 12
    found = prepared_on_ranks(loss, data, ranks)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def letters(texts: list[str]) -> Tensor:
    return torch.tensor([[text.count(letter) + 1.0 for letter in "12345"] for text in texts])


def test_the_threshold_and_the_largest_size_can_be_scheduled() -> None:
    schedule = {"schedule": "piecewise", "boundaries": [1, 2]}
    loss = LossFunctionRegistry.build(
        {
            "type": "dynamic_grpo",
            "similarity_threshold": {**schedule, "values": [0.8, 0.999, 0.999]},
            "max_group_size": {**schedule, "values": [10, 10, 1]},
        },
        family="policy",
    )
    data, found = _data([[1.0, 0.0], [1.0, 0.1], [1.0, 0.001]], [1.0, 2.0, 3.0]), []
    for step in range(3):
        loss.move_to_step(step)
        found.append(int(data.prepared(loss)["num_dynamic_groups"][0]))
    assert found == [1, 2, 3]


# Metrics


def test_metrics_tell_of_the_generation_batch_however_it_is_split() -> None:
    data, loss = _data(_STATES, _REWARDS), DynamicGRPOLoss()
    expected = {"num_dynamic_groups": 3.0, "avg_group_size": 2.0, "frac_singleton_groups": 1 / 3}
    for rows in ([0], [5, 2], [0, 1, 2, 3, 4, 5]):
        _, metrics = loss(*data.take(rows).build(loss))
        for name, value in expected.items():
            assert metrics[name].tolist() == pytest.approx([value] * len(rows)), name
    assert "clip_ratio/low_mean" in metrics


def test_the_loss_is_grpos_with_these_advantages() -> None:
    data, loss = _data(_STATES, _REWARDS), DynamicGRPOLoss(scale_rewards="none")
    data = data.with_rows(old=data.rows["logps"].detach())
    batch, outputs = data.build(loss)
    value = reduce_loss(loss, loss(batch, outputs)[0], batch)
    assert value.item() == pytest.approx(-(2 - 25 / 6) / 6)  # the two groups' advantages sum to 0
    (gradient,) = torch.autograd.grad(value, data.rows["logps"])
    assert gradient[:, 0].tolist() == pytest.approx([3 / 6, 1 / 6, 0.5 / 6, -4 / 6, -0.5 / 6, (25 / 6 - 2) / 6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity_threshold": 1.1}, "'similarity_threshold': expected a value >= -1 and <= 1"),
        ({"max_group_size": 0}, "'max_group_size': expected a value >= 1"),
        ({"scope": "group"}, "'scope': expected 'batch' | 'prompt'"),
        ({"embedding": "text"}, "'embedding': expected 'hidden', 'tokens' or"),
        ({"epsilon": -1.0}, "'epsilon'"),
    ],
)
def test_ranges(options: dict, message: str) -> None:
    with pytest.raises(LossConfigError) as raised:
        DynamicGRPOLoss(**options)
    assert message in str(raised.value)


@pytest.mark.parametrize("scope", ["batch", "prompt"])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.8])
def test_a_response_without_a_scored_token_is_similar_to_none(threshold: float, scope: str) -> None:
    """Whatever its vector: here that of the others."""
    data = _data([[1.0, 0.0]] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], [0, 0, 0, 1, 1])
    mask = torch.tensor([[1], [0], [1], [1], [0]])
    loss = DynamicGRPOLoss(similarity_threshold=threshold, scope=scope)
    groups = loss.groups(data.with_rows(mask=mask).rollout()).tolist()
    together = {frozenset({0, 2, 3})} if scope == "batch" else {frozenset({0, 2}), frozenset({3})}
    assert _sets(groups) == together | {frozenset({1}), frozenset({4})}
    assert sorted(set(groups)) == list(range(len(set(groups))))
