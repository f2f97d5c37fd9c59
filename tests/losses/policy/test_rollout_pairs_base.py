"""The loss of the pairs inside: what it sees and reports, its part in the run, and which may be one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trl_custom_losses import (
    Loss,
    LossConfigError,
    LossFunctionRegistry,
    Metric,
    ModelOutputs,
    PreferenceBatch,
    PreferenceLoss,
)
from trl_custom_losses.losses.policy.rollout_pairs import RolloutPairsLoss
from trl_custom_losses.losses.preference import SFTLoss, SigmoidLoss
from trl_custom_losses.summaries import summarise

from ..pairs import COMPOSED, gradient, sampled, shuffled, whole_pairs

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
    loss, data = RolloutPairsLoss(base=COMPOSED), sampled()
    batch, outputs = data.build(loss, data.denominators())
    _, metrics = loss(batch, outputs)
    for name, part in loss.base.components():
        torch.testing.assert_close(metrics[f"{name}_loss"], whole_pairs(part, data).detach())
    torch.testing.assert_close(metrics["total_loss"], whole_pairs(loss.base, data).detach())


def test_gradient_balancing_inside_sees_the_gradients_of_the_pairs() -> None:
    settings = {**COMPOSED, "balancing": "upgrad"}
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


# Which losses may be the base


def test_config_fields_of_the_policy_trainer_do_not_reach_the_base() -> None:
    config = {"type": "rollout_pairs", "base": "sigmoid"}
    loss = LossFunctionRegistry.build(config, family="policy", defaults={"beta": 0.04, "epsilon": 0.3})
    assert loss.base.beta == 0.1
    assert loss.base.origins["beta"] == "default"
    assert LossFunctionRegistry.build("rollout_pairs", family="policy", defaults={"beta": 0.04}).base.beta == 0.1


def test_an_object_may_be_the_base() -> None:
    base = SFTLoss()
    assert RolloutPairsLoss(base=base).base is base


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
