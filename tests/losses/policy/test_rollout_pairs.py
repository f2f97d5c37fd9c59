"""Halves of pairs, spread over micro-batches and ranks, make the loss of the whole pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_custom_losses import Denominators, Loss, LossConfigError, LossFunctionRegistry, ModelOutputs, PolicyBatch
from trl_custom_losses.losses.policy.pair_halves import best_and_worst
from trl_custom_losses.losses.policy.rollout_pairs import RolloutPairsLoss
from trl_custom_losses.reductions import evaluate, reduce_loss
from trl_custom_losses.testing import Data, random_data
from trl_custom_losses.testing.ranks import prepared_on_ranks

from ..pairs import COMPOSED, NAN, PAIRS, assert_equal, gradient, sampled, shuffled, whole_pairs

BASES: dict[str, Any] = {
    "sigmoid": {"type": "sigmoid", "beta": 0.4},
    "ipo": {"type": "ipo", "beta": 0.5},
    "sigmoid_norm": {"type": "sigmoid_norm", "beta": 2.0},
    "hinge": {"type": "hinge", "beta": 0.7},
    "nca_pair": "nca_pair",
    "sft": "sft",
    "perplexity": {"type": "perplexity", "completions": "both"},
    "composed": COMPOSED,
}


# The whole


@pytest.mark.parametrize("base", BASES.values(), ids=list(BASES))
@pytest.mark.parametrize("parts", [1, 4, 16])
def test_shuffled_micro_batches_sum_to_the_loss_of_the_pairs(base: Any, parts: int) -> None:
    loss, data = RolloutPairsLoss(base=base), sampled()
    given = data.denominators(micro_batches=parts)
    for seed in range(3):
        total = sum(data.take(part).loss(loss, given) for part in shuffled(16, parts, seed))
        assert_equal(total, whole_pairs(loss.base, data), data)


def rank_loss(loss: Loss, data: Data, prepared: dict[str, Tensor], rows: Tensor) -> Tensor:
    """What one of two ranks adds up over its two shuffled micro-batches; its tensors are as long as its own rows."""
    width = int(data.rows["mask"][rows].sum(1).max())
    given = Denominators(
        sequences=8.0, tokens=data.rows["mask"].sum() / 2, micro_batches=2, share=1 / 4, step_fraction=0.5
    )
    total = torch.zeros((), dtype=torch.float64)
    for part in rows[torch.randperm(8, generator=torch.Generator().manual_seed(len(rows)))].chunk(2):
        own = {name: data.rows[name][part, :width] for name in ("logps", "ref", "ids", "mask")}
        batch = PolicyBatch(
            prompt_ids=own["ids"],
            completion_ids=own["ids"],
            mask=own["mask"],
            advantages=torch.ones(len(part)),
            prepared={name: value[part] for name, value in prepared.items()},
            denominators=given,
        )
        outputs = ModelOutputs(per_token_logps=own["logps"], ref_per_token_logps=own["ref"], mask=own["mask"])
        raw, _ = evaluate(loss, batch, outputs)
        total = total + reduce_loss(loss, raw, batch)
    return total


@pytest.mark.parametrize("base", BASES.values(), ids=list(BASES))
@pytest.mark.parametrize("longer", [0, 1])
def test_ranks_average_to_the_loss_of_pairs_that_they_share(base: Any, longer: int) -> None:
    loss, data = RolloutPairsLoss(base=base), sampled()
    # Every other completion is on the other rank, so that all pairs are divided; one rank's rows are the longer ones.
    ranks = [[*range(1, 16, 2)], [*range(0, 16, 2)]]
    spread = data.take(ranks[longer - 1] + ranks[longer])
    spread = replace(spread, whole=None, index=None)
    prepared = prepared_on_ranks(loss, spread, 2)
    assert (prepared["role"].view(2, 8).sum(1) != 0).all()
    sums = [rank_loss(loss, spread, prepared, rows) for rows in torch.arange(16).view(2, 8)]
    assert_equal(torch.stack(sums).mean(), whole_pairs(loss.base, data), data)


@pytest.mark.parametrize("base", ["sigmoid", "ipo", "sft"])
def test_an_optimizer_step_that_is_a_part_of_the_generation_batch_weighs_pairs_by_its_share(base: str) -> None:
    """Two optimizer steps on one generation batch: their mean is the mean over its pairs."""
    loss, data = RolloutPairsLoss(base=BASES[base]), sampled()
    given = replace(data.denominators(micro_batches=2), sequences=8.0)
    steps = [data.take(part).loss(loss, given) for part in shuffled(16, 4, seed=1)]
    assert_equal((sum(steps[:2]) + sum(steps[2:])) / 2, whole_pairs(loss.base, data), data)


def test_values_and_gradients_of_one_pair() -> None:
    """Log-ratios 0.5 - 0.1 - 0.1 = 0.3 of the chosen and -0.4 of the rejected completion; beta 0.1."""
    data = random_data("policy", size=4, length=3, lengths=[1, 3, 2, 2])
    ratios = torch.tensor([[-0.4, 9, 9], [0.5, -0.1, -0.1], [1, 2, 9], [3, 4, 9]], dtype=torch.float64)
    logps = (data.rows["ref"] + ratios).detach().requires_grad_()
    items = {"rewards": torch.tensor([[0.0], [2.0], [NAN], [1.0]]).expand(4, 2), "group_ids": torch.zeros(4).long()}
    data = replace(data.with_rows(logps=logps, old=logps.detach()), items=data.items | items)
    z = 0.1 * 0.7
    value = data.loss(RolloutPairsLoss())
    assert value.item() == pytest.approx(math.log1p(math.exp(-z)), rel=1e-12)
    push = -0.1 / (1 + math.exp(z))
    expected = [[-push, 0, 0], [push, push, push], [0, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(gradient(value, data), torch.tensor(expected, dtype=torch.float64))
    # sft: minus the mean over the chosen completion's 3 tokens.
    value = data.loss(RolloutPairsLoss(base="sft"))
    assert value.item() == pytest.approx(-logps[1].mean().item())
    torch.testing.assert_close(gradient(value, data)[1], torch.full((3,), -1 / 3, dtype=torch.float64))
    assert gradient(data.loss(RolloutPairsLoss(base="sft")), data).count_nonzero() == 3


@pytest.mark.parametrize("parts", [1, 16])
def test_off_policy_each_half_meets_its_partner_of_sampling_time(parts: int) -> None:
    loss, data = RolloutPairsLoss(base=BASES["sigmoid"]), sampled(on_policy=False)
    now, old = data.rows["logps"], data.rows["old"]
    halves = []
    for chosen, rejected in PAIRS:
        for row, other in ((chosen, rejected), (rejected, chosen)):
            mixed = data.with_rows(logps=torch.where(torch.arange(16).unsqueeze(1) == row, now, old))
            halves.append(whole_pairs(loss.base, mixed, [(chosen, rejected)]))
            assert other != row
    given = data.denominators(micro_batches=parts)
    total = sum(data.take(part).loss(loss, given) for part in shuffled(16, parts, seed=0))
    value = torch.stack(halves).mean()
    torch.testing.assert_close(total, value)
    torch.testing.assert_close(gradient(total, data), 2 * gradient(value, data))


# Pairs


@pytest.mark.parametrize(
    ("rewards", "groups", "expected"),
    [
        ([1.0, 3.0, 2.0], [0, 0, 0], [(1, 0)]),
        ([1.0, 3.0, 3.0, 1.0], [0, 0, 0, 0], [(1, 0)]),  # the first of equals
        ([2.0, 2.0], [0, 0], []),
        ([2.0], [0], []),
        ([NAN, 1.0, 2.0], [0, 0, 0], [(2, 1)]),
        ([NAN, 1.0, NAN], [0, 0, 0], []),
        ([NAN, NAN], [0, 0], []),
        ([0.0, 5.0, 1.0, 4.0], [7, 3, 7, 3], [(2, 0), (1, 3)]),
        ([math.inf, 0.0, -math.inf], [0, 0, 0], [(0, 2)]),
        ([-math.inf, -math.inf], [0, 0], []),
        ([], [], []),
    ],
)
def test_best_and_worst(rewards: list[float], groups: list[int], expected: list[tuple[int, int]]) -> None:
    assert best_and_worst(rewards, groups) == expected


def roles(data: Data) -> list[int]:
    return data.prepared(RolloutPairsLoss())["role"].tolist()


def test_rewards_are_weighted_and_summed_without_those_that_are_missing() -> None:
    data = random_data("policy", size=4, lengths=[1, 1, 1, 1])  # the weights are 1 and 0.5
    rewards = torch.tensor([[1.0, 4.0], [NAN, 7.0], [2.5, NAN], [NAN, NAN]])  # 3, 3.5, 2.5, not scored
    items = {"rewards": rewards, "group_ids": torch.zeros(4).long()}
    assert roles(replace(data, items=data.items | items)) == [0, 1, -1, 0]


def test_rewards_that_cancel_to_nan_are_left_out() -> None:
    data = random_data("policy", size=4, lengths=[1, 1, 1, 1])
    rewards = torch.tensor([[math.inf, -math.inf], [1.0, 0.0], [2.0, 0.0], [0.5, 0.0]])
    items = {"rewards": rewards, "group_ids": torch.zeros(4).long()}
    assert roles(replace(data, items=data.items | items)) == [0, 0, 1, -1]


def test_completions_without_a_scored_token_are_in_no_pair() -> None:
    data = random_data("policy", size=4, lengths=[2, 0, 3, 0])
    items = {"rewards": torch.tensor([[1.0], [9.0], [2.0], [-9.0]]).expand(4, 2), "group_ids": torch.zeros(4).long()}
    assert roles(replace(data, items=data.items | items)) == [-1, 0, 1, 0]


def test_what_a_row_carries() -> None:
    data = sampled(on_policy=False)
    prepared = data.prepared(RolloutPairsLoss())
    assert prepared["role"].tolist() == [0, -1, 1, 0, 0, 0, 0, 0, 1, -1, 0, 0, 0, 0, 0, 0]
    lengths = data.rows["mask"].sum(1)
    for chosen, rejected in PAIRS:
        for row, partner in ((chosen, rejected), (rejected, chosen)):
            length = lengths[partner]
            assert prepared["partner_mask"][row].tolist() == data.rows["mask"][partner].tolist()
            for name, source in (("logps", "old"), ("ref_logps", "ref"), ("ids", "ids")):
                found = prepared[f"partner_{name}"][row]
                assert torch.equal(found[:length], data.rows[source][partner, :length])
    tokens, chosen_tokens = int(lengths[[2, 1, 8, 9]].sum()), int(lengths[[2, 8]].sum())
    assert prepared["totals"].tolist() == [[2, 4, 16, tokens, chosen_tokens]] * 16
    assert not any(value.requires_grad for value in prepared.values())


@pytest.mark.parametrize("base", ["sigmoid", "sft", "ipo"])
@pytest.mark.parametrize("rewards", [[2.0] * 16, [NAN] * 16], ids=["equal", "unscored"])
def test_without_any_pair_the_loss_is_0_and_has_a_graph(base: str, rewards: list[float]) -> None:
    loss, data = RolloutPairsLoss(base=base), sampled(rewards=rewards)
    for part in shuffled(16, 4, seed=0):
        value = data.take(part).loss(loss, data.denominators(micro_batches=4))
        assert value.item() == 0
        assert torch.equal(gradient(value, data), torch.zeros_like(data.rows["logps"]))


def test_a_reference_is_asked_for_only_if_the_base_needs_it() -> None:
    assert RolloutPairsLoss().requires == RolloutPairsLoss().rollout_requires == {"ref_per_token_logps"}
    loss = RolloutPairsLoss(base="sft")
    assert loss.requires == loss.rollout_requires == frozenset()
    assert "partner_ref_logps" not in sampled().prepared(loss)


# A policy loss


def test_it_is_no_preference_loss_itself() -> None:
    assert RolloutPairsLoss().family == "policy"
    with pytest.raises(LossConfigError, match="policy loss"):
        LossFunctionRegistry.build("rollout_pairs", family="preference")


def test_what_corrects_a_surrogate_does_not_act_on_pairs() -> None:
    loss, data = RolloutPairsLoss(), sampled()
    batch, outputs = data.build(loss, data.denominators())
    none = torch.zeros(16, 1)
    corrected = batch.replace(
        advantages=none - 1, on_policy_mask=none, entropy_mask=none, importance_sampling_ratio=none
    )
    assert torch.equal(reduce_loss(loss, loss(corrected, outputs)[0], corrected), data.loss(loss))
    assert not loss.surrogate


def test_the_trainers_kl_term_does_not_depend_on_the_base() -> None:
    assert RolloutPairsLoss(base="sft").kl_reduction == RolloutPairsLoss(base="ipo").kl_reduction == "token_mean"
