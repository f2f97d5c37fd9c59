"""Halves of pairs, spread over micro-batches and ranks, make the loss of the whole pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trl_custom_losses import (
    Denominators,
    Loss,
    LossConfigError,
    LossFunctionRegistry,
    Metric,
    ModelOutputs,
    PolicyBatch,
    PreferenceBatch,
    PreferenceLoss,
)
from trl_custom_losses.losses.policy.pair_halves import best_and_worst
from trl_custom_losses.losses.policy.rollout_pairs import RolloutPairsLoss
from trl_custom_losses.losses.preference import SFTLoss, SigmoidLoss
from trl_custom_losses.reductions import evaluate, reduce_loss
from trl_custom_losses.summaries import summarise

from ...example_losses import restored_registry
from ..factories import Data, random_data
from ..pairs import NAN, PAIRS, assert_equal, gradient, sampled, shuffled, whole_pairs
from ..ranks import prepared_on_ranks

_COMPOSED = {
    "type": "composed",
    "components": [
        {"type": "sigmoid", "weight": 0.7, "beta": 0.4},
        {"type": "sft", "weight": 0.2},
        {"type": "ipo", "weight": -0.1, "beta": 0.5},
    ],
}
BASES: dict[str, Any] = {
    "sigmoid": {"type": "sigmoid", "beta": 0.4},
    "ipo": {"type": "ipo", "beta": 0.5},
    "sigmoid_norm": {"type": "sigmoid_norm", "beta": 2.0},
    "hinge": {"type": "hinge", "beta": 0.7},
    "nca_pair": "nca_pair",
    "sft": "sft",
    "perplexity": {"type": "perplexity", "completions": "both"},
    "composed": _COMPOSED,
}


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    with restored_registry():
        yield


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


# What the base sees and says


class Spy(PreferenceLoss):
    """Keeps its batch, scales the sum of the chosen log-probabilities, and reports metrics of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict[str, Any]]:
        self.seen = batch, model_outputs
        chosen = model_outputs.logps.chunk(2)[0]
        logps = model_outputs.logps.detach()
        self.observe("rows", batch.pair_mask.sum())
        return -self.scale * chosen, {
            "scalar": torch.tensor(0.25),
            "per_pair": logps.chunk(2)[0],
            "per_completion": logps,
            "per_token": model_outputs.per_token_logps.detach(),
            "least": Metric(logps.chunk(2)[0], reduce="min"),
            "pair_margin": torch.tensor(-1.0),
        }


def test_the_base_sees_pairs_of_tokens() -> None:
    spy, data = Spy(), sampled(on_policy=False)
    batch, outputs = data.build(RolloutPairsLoss(base=spy))
    prompts = torch.arange(32).view(16, 2)
    RolloutPairsLoss(base=spy)(batch.replace(prompt_ids=prompts), outputs)
    pairs, seen = spy.seen
    assert pairs.pair_mask.nonzero().flatten().tolist() == [1, 2, 8, 9]
    ids, mask = data.rows["ids"], data.rows["mask"]
    for row, (chosen, rejected) in {2: (2, 1), 1: (2, 1), 8: (8, 9), 9: (8, 9)}.items():
        for place, completion in ((row, chosen), (16 + row, rejected)):
            length = mask[completion].sum()
            assert pairs.input_ids[place, 0] == prompts[row, 1]
            assert torch.equal(pairs.input_ids[place, 1 : 1 + length], ids[completion, :length])
            assert torch.equal(pairs.mask[place], mask[completion])
            assert pairs.attention_mask[place].tolist() == [1, *mask[completion].tolist()]
            source = data.rows["logps" if completion == row else "old"][completion]
            assert torch.equal(seen.per_token_logps[place], source * mask[completion])
    empty = [row for row in range(16) if row not in (1, 2, 8, 9)]
    assert not pairs.mask[empty].any() and not pairs.mask[[16 + row for row in empty]].any()


def test_metrics_count_rows_with_a_pair_alone() -> None:
    data, spy = sampled(), Spy()
    loss = RolloutPairsLoss(base=spy)
    sums: dict[str, list[float]] = {}
    for part in shuffled(16, 8, seed=0):
        batch, outputs = data.take(part).build(loss, data.denominators(micro_batches=8))
        _, metrics = loss(batch, outputs)
        for name, (total, count, _, reduce) in summarise(metrics, batch.mask, "test").items():
            if reduce == "mean":
                total, count = float(total), float(count)
                sums.setdefault(name, [0.0, 0.0])
                sums[name] = [sums[name][0] + total, sums[name][1] + count]
            else:
                sums[name] = [min(sums.get(name, [math.inf])[0], float(total)), 1.0]
    found = {name: total / count for name, (total, count) in sums.items()}
    mask = data.rows["mask"]
    logps, ratios = (((data.rows["logps"] - ref) * mask).sum(1).detach() for ref in (torch.zeros(()), data.rows["ref"]))
    chosen, rejected = [2, 8], [1, 9]
    members = chosen + rejected
    tokens = (data.rows["logps"] * mask)[members].sum() / mask[members].sum()
    assert found == pytest.approx(
        {
            "scalar": 0.25,
            "per_pair": logps[chosen].mean().item(),
            "per_completion": logps[members].mean().item(),
            "per_token": tokens.item(),
            "least": logps[chosen].min().item(),
            "base/pair_margin": -1.0,
            "pair_margin": (logps[chosen] - logps[rejected]).mean().item(),
            "pair_accuracy": (logps[chosen] > logps[rejected]).double().mean().item(),
            "frac_prompts_with_pair": 0.5,
        }
    )
    batch, outputs = data.build(RolloutPairsLoss(), data.denominators())
    total, count, *_ = summarise(RolloutPairsLoss()(batch, outputs)[1], batch.mask, "test")["pair_margin"]
    assert (total / count).item() == pytest.approx((ratios[chosen] - ratios[rejected]).mean().item())
    assert count == 4


def test_what_the_base_learns_gets_its_gradient_once() -> None:
    spy, data = Spy(), sampled()
    loss = RolloutPairsLoss(base=spy)
    total = sum(data.take(p).loss(loss, data.denominators(micro_batches=4)) for p in shuffled(16, 4, seed=0))
    expected = -(data.rows["logps"] * data.rows["mask"]).sum(1)[[2, 8]].mean()
    torch.testing.assert_close(torch.autograd.grad(total, spy.scale)[0], expected.detach())


def test_components_report_the_loss_of_the_pairs() -> None:
    loss, data = RolloutPairsLoss(base=_COMPOSED), sampled()
    batch, outputs = data.build(loss, data.denominators())
    _, metrics = loss(batch, outputs)
    for name, part in loss.base.components():
        torch.testing.assert_close(metrics[f"{name}_loss"], whole_pairs(part, data).detach())
    torch.testing.assert_close(metrics["total_loss"], whole_pairs(loss.base, data).detach())


def test_gradient_balancing_inside_sees_the_gradients_of_the_pairs() -> None:
    settings = {**_COMPOSED, "balancing": "upgrad"}
    loss, data = RolloutPairsLoss(base=settings), sampled()
    for part in shuffled(16, 4, seed=0):
        data.take(part).loss(loss, data.denominators(micro_batches=4))
    observed = loss.base.take_observed()["gramian"]
    pairs = LossFunctionRegistry.build(settings)
    whole_pairs(pairs, data)
    torch.testing.assert_close(observed, pairs.take_observed()["gramian"])


@pytest.mark.parametrize("per", ["batch", "sequence"])
def test_a_bound_inside_holds_for_the_pairs(per: str) -> None:
    base, data = {"type": "clipped_loss", "base_loss": "sigmoid", "max_grad_norm": 1e-3, "per": per}, sampled()
    loss, free = RolloutPairsLoss(base=base), gradient(whole_pairs(SigmoidLoss(), data), data)
    whole = data.loss(loss, data.denominators())
    torch.testing.assert_close(whole, whole_pairs(SigmoidLoss(), data))
    if per == "batch":
        torch.testing.assert_close(gradient(whole, data), 1e-3 * free / free.norm())
    given = replace(data.denominators(micro_batches=8), share=1 / 8)
    split = gradient(sum(data.take(part).loss(loss, given) for part in shuffled(16, 8, seed=0)), data)
    assert 1e-4 < split.norm() <= 1e-3 * (1 + 1e-12)


def test_the_base_takes_part_in_the_run() -> None:
    loss, data = RolloutPairsLoss(base=Spy()), sampled()
    assert [(name, part.name) for name, part in loss.components()] == [("base", "Spy")]
    assert loss.tree() == [loss, loss.base]
    for part in shuffled(16, 4, seed=0):
        data.take(part).loss(loss)
    assert loss.base.take_observed() == {"rows": 4}  # two halves a pair
    loss.eval()
    data.loss(loss)
    assert loss.base.take_observed() == {}


def test_hyperparameters_of_the_base_can_be_scheduled() -> None:
    base = {"type": "sigmoid", "beta": {"schedule": "linear", "start": 0.1, "end": 0.5, "total_steps": 4}}
    loss, data = LossFunctionRegistry.build({"type": "rollout_pairs", "base": base}, family="policy"), sampled()
    for part in loss.tree():
        part.move_to_step(2)
    torch.testing.assert_close(data.loss(loss), whole_pairs(SigmoidLoss(beta=0.3), data))
    batch, outputs = data.build(loss)
    assert loss(batch, outputs)[1]["beta"].item() == pytest.approx(0.3)


# Building


def test_config_fields_of_the_policy_trainer_do_not_reach_the_base() -> None:
    config = {"type": "rollout_pairs", "base": "sigmoid"}
    loss = LossFunctionRegistry.build(config, family="policy", defaults={"beta": 0.04, "epsilon": 0.3})
    assert loss.base.beta == 0.1
    assert loss.base.origins["beta"] == "default"
    assert LossFunctionRegistry.build("rollout_pairs", family="policy", defaults={"beta": 0.04}).base.beta == 0.1


def test_an_object_may_be_the_base() -> None:
    base = SFTLoss()
    assert RolloutPairsLoss(base=base).base is base


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


class _NeedsHidden(PreferenceLoss):
    requires = frozenset({"pooled_hidden", "ref_logps"})


class _NeedsColumn(PreferenceLoss):
    columns = ("unsafe",)


class _NeedsTwo(PreferenceLoss):
    minimum_batch = 2


class _AveragesLocally(PreferenceLoss):
    reduction = "local_token_mean"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (_NeedsHidden(), "'_NeedsHidden' needs pooled_hidden;"),
        (_NeedsColumn(), "needs the column 'unsafe'"),
        (_NeedsTwo(), "compares the pairs"),
        (_AveragesLocally(), "averages within each micro-batch"),
        ({"type": "composed", "components": [{"type": "aot"}, {"type": "sft"}]}, "'composed' compares the pairs"),
        ("aot", "'aot' compares the pairs"),
        ("grpo", "'base', a preference loss: loss 'grpo' is a policy loss"),
        ("sigmoied", "did you mean 'sigmoid'"),
        ({"beta": 0.1}, "needs a 'type'"),
        ({"type": "sigmoid", "beta": -1.0}, "'base', a preference loss: loss 'sigmoid': hyperparameter 'beta'"),
    ],
)
def test_bases_that_cannot_be_halved_are_refused(base: Any, message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        RolloutPairsLoss(base=base)
    if not isinstance(base, Loss):
        with pytest.raises(LossConfigError, match=message):
            LossFunctionRegistry.build({"type": "rollout_pairs", "base": base}, family="policy")


def test_a_base_that_is_a_number_is_refused() -> None:
    with pytest.raises(LossConfigError, match="'base'"):
        LossFunctionRegistry.build({"type": "rollout_pairs", "base": 3}, family="policy")


def test_a_base_that_returns_a_scalar_is_reported() -> None:
    class Scalar(PreferenceLoss):
        def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
            return model_outputs.logps.mean(), {}

    with pytest.raises(ValueError, match=r"rows without a pair.*scalar"):
        sampled().loss(RolloutPairsLoss(base=Scalar()))
