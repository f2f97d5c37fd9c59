from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch

from trl_custom_losses import LossConfigError
from trl_custom_losses.losses.policy import DRAGRPOLoss
from trl_custom_losses.testing import Data, random_data
from trl_custom_losses.testing.ranks import prepared_on_ranks

_ROOT = round(math.sqrt(0.5), 5)


def _data(states: list[list[float]], rewards: list[float], prompts: list[int] | None = None) -> Data:
    """Completions of one token with given states at rollout."""
    data = random_data("policy", size=len(states), length=1)
    items = {
        "rewards": torch.tensor(rewards, dtype=torch.float64).unsqueeze(1).expand(-1, 2) * torch.tensor([1.0, 0.0]),
        "group_ids": torch.tensor(prompts or [0] * len(states)),
    }
    return replace(data.with_rows(old_hidden=torch.tensor(states, dtype=torch.float64)), items=data.items | items)


def test_rewards_are_divided_by_one_and_the_similarity_to_the_others() -> None:
    data = _data([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0]], [2.0, 4.0, 6.0])
    prepared = data.prepared(DRAGRPOLoss(scale_rewards="none"))
    redundancy = [2 + _ROOT, 2 + _ROOT, 1 + 2 * _ROOT]
    assert prepared["redundancy"].tolist() == pytest.approx(redundancy)
    adjusted = [reward / by for reward, by in zip([2.0, 4.0, 6.0], redundancy, strict=True)]
    mean = statistics.mean(adjusted)
    assert prepared["advantages"].tolist() == pytest.approx([reward - mean for reward in adjusted])
    scaled = data.prepared(DRAGRPOLoss())["advantages"].tolist()
    deviation = statistics.stdev(adjusted) + 1e-4
    assert scaled == pytest.approx([(reward - mean) / deviation for reward in adjusted])


def test_other_prompts_make_nothing_redundant() -> None:
    states, rewards = [[1.0, 0.0], [2.0, 0.0], [1.0, 1.0]], [2.0, 4.0, 6.0]
    alone = _data(states, rewards).prepared(DRAGRPOLoss())
    both = _data([*states, *states], [*rewards, 1.0, 1.0, 7.0], [0, 0, 0, 1, 1, 1]).prepared(DRAGRPOLoss())
    for name, value in alone.items():
        torch.testing.assert_close(both[name][:3], value)


def test_opposite_states_do_not_make_a_reward_explode() -> None:
    """With negative cosines the divisor would be 1 - 1 = 0, or negative."""
    prepared = _data([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.01]], [1.0, 1.0, 1.0]).prepared(DRAGRPOLoss())
    assert prepared["redundancy"].tolist() == pytest.approx([1.0, 2.0, 2.0], abs=1e-3)


def test_a_response_without_a_token_counts_for_itself_alone() -> None:
    data = random_data("policy", size=3, length=4, lengths=[4, 0, 4])
    redundancy = data.prepared(DRAGRPOLoss(embedding="tokens"))["redundancy"]
    assert redundancy[1] == 1
    assert (redundancy[[0, 2]] > 1).all()


def test_the_repeated_answer_is_worth_less() -> None:
    """Also among equal rewards, which GRPO would leave alone."""
    states = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    advantages = _data(states, [1.0] * 3).prepared(DRAGRPOLoss())["advantages"].tolist()
    assert advantages[0] == advantages[1] < 0 < advantages[2]


def test_negative_rewards() -> None:
    """Divided, the repeated wrong answer is punished less than the one that stands alone; multiplied, more."""
    data = _data([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [-1.0, -1.0, -1.0, 2.0])
    divided = data.prepared(DRAGRPOLoss(scale_rewards="none"))["advantages"].tolist()
    multiplied = data.prepared(DRAGRPOLoss(scale_rewards="none", negative_rewards="multiply"))["advantages"].tolist()
    assert divided == pytest.approx([reward - 0 for reward in (-0.5, -0.5, -1.0, 2.0)])
    assert multiplied == pytest.approx([reward + 3 / 4 for reward in (-2.0, -2.0, -1.0, 2.0)])


def test_responses_that_were_not_scored_get_0_but_make_others_redundant() -> None:
    data = _data([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [1.0, 1.0, 1.0])
    items = data.items | {"rewards": torch.tensor([[1.0, 0.0], [float("nan")] * 2, [1.0, 0.0]])}
    prepared = replace(data, items=items).prepared(DRAGRPOLoss(scale_rewards="none"))
    assert prepared["advantages"].tolist() == pytest.approx([0.5 - 0.75, 0.0, 1 - 0.75])


@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize("embedding", ["hidden", "tokens"])
def test_ranks_find_the_advantages_of_one_process(ranks: int, embedding: str) -> None:
    data, loss = random_data("policy", size=6, length=6), DRAGRPOLoss(embedding=embedding)
    expected = data.prepared(loss)
    for name, value in prepared_on_ranks(loss, data, ranks).items():
        assert torch.equal(value, expected[name]), name


def test_redundancy_is_logged_for_each_response() -> None:
    data, loss = random_data("policy", size=6), DRAGRPOLoss()
    _, metrics = loss(*data.take([4, 1]).build(loss))
    assert torch.equal(metrics["redundancy"], data.prepared(loss)["redundancy"][[4, 1]])
    assert "clip_ratio/low_mean" in metrics


def test_choices() -> None:
    with pytest.raises(LossConfigError, match=r"'negative_rewards': expected 'divide' \| 'multiply', found 'keep'"):
        DRAGRPOLoss(negative_rewards="keep")
