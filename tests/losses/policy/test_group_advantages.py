from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_custom_losses import LossConfigError
from trl_custom_losses.losses.policy import DynamicGRPOLoss
from trl_custom_losses.losses.policy.group_advantages import group_advantages, weighted_rewards
from trl_custom_losses.testing import random_data

NAN = float("nan")


def _advantages(rewards: list[float], groups: list[int], prompts: list[int], scale: Any = "none") -> list[float]:
    found = group_advantages(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), torch.tensor(prompts), scale
    )
    assert found.dtype is torch.float64
    return found.tolist()


@pytest.mark.parametrize(
    ("scale", "divisors"),
    [
        ("none", [1.0] * 5),
        ("group", [statistics.stdev([1, 3, 8]) + 1e-4] * 3 + [statistics.stdev([2, 4]) + 1e-4] * 2),
        ("batch", [statistics.stdev([1, 3, 8, 2, 4]) + 1e-4] * 5),
    ],
)
def test_values(scale: str, divisors: list[float]) -> None:
    centred = [1 - 4, 3 - 4, 8 - 4, 2 - 3, 4 - 3]
    expected = [value / divisor for value, divisor in zip(centred, divisors, strict=True)]
    # Groups need neither be numbered without gaps nor stand together.
    order = [3, 0, 4, 1, 2]
    rewards, groups = [1, 3, 8, 2, 4], [7, 7, 7, 2, 2]
    found = _advantages([rewards[i] for i in order], [groups[i] for i in order], [0] * 5, scale)
    assert found == pytest.approx([expected[i] for i in order], rel=1e-12)


@pytest.mark.parametrize(("scale", "divisor"), [("none", 1.0), ("group", statistics.stdev([1, 3, 8, 5]) + 1e-4)])
def test_the_only_member_of_a_group_is_compared_with_its_prompt(scale: str, divisor: float) -> None:
    # The first two form a group, the next two are alone; the last one's prompt has no other response.
    found = _advantages([1, 3, 8, 5, 9], [0, 0, 1, 2, 3], [0, 0, 0, 0, 1], scale)
    mean = (1 + 3 + 8 + 5) / 4
    assert found[2:4] == pytest.approx([(8 - mean) / divisor, (5 - mean) / divisor])
    pair = statistics.stdev([1, 3]) + 1e-4 if scale == "group" else 1.0
    assert found[:2] == pytest.approx([-1 / pair, 1 / pair])
    assert found[4] == 0


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("reward", [0.0, 0.1, -1 / 3, 1e8 + 0.1, 3e-9])
def test_equal_rewards_give_exactly_0(scale: str, reward: float) -> None:
    found = _advantages([reward] * 7, [0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 1], scale)
    assert found == [0.0] * 7


def test_responses_that_were_not_scored_count_nowhere_and_get_0() -> None:
    found = _advantages([1, NAN, 3, NAN, 5], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1])
    # The last one's fellow was not scored: of its prompt it is the only one, too.
    assert found == [-1, 0, 1, 0, 0]
    found = _advantages([1, NAN, 3, NAN, 5], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0])
    assert found == [-1, 0, 1, 0, 5 - 3]
    assert _advantages([NAN, NAN], [0, 0], [0, 0], "group") == [0, 0]


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_of_whole_prompts_they_are_trls(scale: str) -> None:
    rewards = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[0, 1] = rewards[2, 3] = NAN
    prompts = torch.arange(6).repeat_interleave(4)

    def deviation(values: Tensor) -> float:
        return statistics.stdev(values[~values.isnan()].tolist())

    rows = [row - row.nanmean() for row in rewards]
    divisors = {"none": [1.0] * 6, "group": [deviation(row) + 1e-4 for row in rewards]}
    divisors["batch"] = [deviation(rewards.flatten()) + 1e-4] * 6
    expected = torch.cat([row / by for row, by in zip(rows, divisors[scale], strict=True)]).nan_to_num()
    found = group_advantages(rewards.flatten(), prompts, prompts, scale)
    torch.testing.assert_close(found, expected)


def test_rewards_are_weighted_and_summed_where_there_are_any() -> None:
    data = random_data("policy", size=3)
    rewards = torch.tensor([[1.0, 4.0], [NAN, 4.0], [NAN, NAN]])
    rollout = replace(data, items=data.items | {"rewards": rewards}).rollout()  # weights 1 and 0.5
    found = weighted_rewards(rollout)
    assert found[:2].tolist() == [3.0, 2.0] and found[2].isnan()
    assert found.dtype is torch.float64


@pytest.mark.parametrize(("given", "meant"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_legacy_names_of_the_scale(given: Any, meant: str) -> None:
    assert DynamicGRPOLoss(scale_rewards=given).scale_rewards == meant


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_rewards": "groups"}, "'scale_rewards': expected 'group' | 'batch' | 'none', found 'groups'"),
        ({"max_ngram": 0}, "'max_ngram': expected a value >= 1"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "Set it to 'sum_then_normalize'"),
        ({"multi_objective_aggregation": "sum"}, "'multi_objective_aggregation': expected"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict, message: str) -> None:
    with pytest.raises(LossConfigError) as raised:
        DynamicGRPOLoss(**options)
    assert message in str(raised.value)


def test_states_are_computed_only_where_they_are_compared() -> None:
    assert DynamicGRPOLoss().rollout_requires == {"pooled_hidden"}
    assert DynamicGRPOLoss(embedding="tokens").rollout_requires == frozenset()
