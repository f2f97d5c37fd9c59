"""DPO on pairs of the rollout and GRPO on the rollout, weighted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from trl_custom_losses import LossConfigError, LossFunctionRegistry
from trl_custom_losses.losses.composite import ComposedDPOGRPOLoss
from trl_custom_losses.losses.policy import GRPOLoss
from trl_custom_losses.losses.preference import IPOLoss, SigmoidLoss
from trl_custom_losses.testing import Data
from trl_custom_losses.types import Metric

from ...example_losses import restored_registry
from ..pairs import assert_equal, gradient, sampled, shuffled, whole_pairs

_SIDES = {"dpo": {"type": "sigmoid", "beta": 0.4}, "grpo": "grpo"}


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    with restored_registry():
        yield


def build(*, defaults: dict[str, Any] | None = None, **settings: Any) -> ComposedDPOGRPOLoss:
    config = {"type": "composed_dpo_grpo", **_SIDES, **settings}
    loss = LossFunctionRegistry.build(config, family="policy", defaults=defaults)
    assert isinstance(loss, ComposedDPOGRPOLoss)
    return loss


def run(loss: ComposedDPOGRPOLoss, data: Data) -> dict[str, float]:
    """Values of what it logs."""
    _, metrics = loss(*data.build(loss, data.denominators()))
    values = {name: metric.value if isinstance(metric, Metric) else metric for name, metric in metrics.items()}
    return {name: value.item() for name, value in values.items() if value.dim() == 0}


# Value and gradient


@pytest.mark.parametrize("dpo", ["sigmoid", "ipo", "sft"])
@pytest.mark.parametrize("parts", [1, 4, 16])
def test_micro_batches_sum_to_the_weighted_losses_of_pairs_and_completions(dpo: str, parts: int) -> None:
    loss, data = build(dpo=dpo, dpo_weight=0.6, grpo_weight=0.25), sampled()
    total = sum(
        data.take(part).loss(loss, data.denominators(micro_batches=parts)) for part in shuffled(16, parts, seed=0)
    )
    assert_equal(total, 0.6 * whole_pairs(LossFunctionRegistry.build(dpo), data) + 0.25 * data.loss(GRPOLoss()), data)


def test_the_weights_are_70_to_30() -> None:
    loss, data = build(), sampled()
    expected = 0.7 * whole_pairs(SigmoidLoss(beta=0.4), data) + 0.3 * data.loss(GRPOLoss())
    assert_equal(data.loss(loss), expected, data)
    assert (loss.dpo_weight, loss.grpo_weight) == (0.7, 0.3)


def test_logs_both_losses_their_weights_and_the_total() -> None:
    loss, data = build(), sampled()
    values = run(loss, data)
    dpo, grpo = whole_pairs(SigmoidLoss(beta=0.4), data).item(), data.loss(GRPOLoss()).item()
    expected = {"dpo_loss": dpo, "grpo_loss": grpo, "dpo_weight": 0.7, "grpo_weight": 0.3}
    expected |= {"total_loss": 0.7 * dpo + 0.3 * grpo, "frac_prompts_with_pair": 0.5}
    assert values == pytest.approx(expected)
    _, metrics = loss(*data.build(loss))
    assert {"pair_margin", "pair_accuracy", "clip_ratio/low_mean"} <= metrics.keys()


def test_without_pairs_grpo_goes_on() -> None:
    loss, data = build(), sampled(rewards=[1.0] * 16)
    assert_equal(data.loss(loss), 0.3 * data.loss(GRPOLoss()), data)


def test_both_sides_prepare_under_their_own_names() -> None:
    loss = build(grpo={"type": "dynamic_grpo", "embedding": "tokens", "similarity_threshold": 0.3})
    data = sampled()
    prepared = data.prepared(loss)
    assert {name.split(".")[0] for name in prepared} == {"dpo", "grpo"}
    alone = LossFunctionRegistry.build({"type": "dynamic_grpo", "embedding": "tokens", "similarity_threshold": 0.3})
    expected = 0.7 * whole_pairs(SigmoidLoss(beta=0.4), data) + 0.3 * data.loss(alone)
    assert_equal(data.loss(loss), expected, data)
    assert not torch.equal(gradient(data.loss(loss), data), gradient(data.loss(build()), data))


def test_the_sides_default_to_adaptive_dpo_and_dynamic_grpo() -> None:
    loss = LossFunctionRegistry.build("composed_dpo_grpo", family="policy")
    assert [(name, part.name) for name, part in loss.components()] == [
        ("dpo", "rollout_pairs"),
        ("grpo", "dynamic_grpo"),
    ]
    assert [part.name for part in loss.tree()] == [
        "composed_dpo_grpo",
        "rollout_pairs",
        "adaptive_dpo",
        "sigmoid",
        "dynamic_grpo",
    ]
    assert loss.rollout_requires == {"ref_per_token_logps", "pooled_hidden"}
    assert loss.kl_reduction == "sequence_mean"
    data = sampled()
    assert {"adaptive_beta", "num_dynamic_groups", "dpo_loss"} <= loss(*data.build(loss))[1].keys()


def test_the_beta_of_adaptive_dpo_moves_with_the_run() -> None:
    dpo = {"type": "adaptive_dpo", "reference_policy_kl_penalty": 0.4, "final_beta": 0.2, "warmup_steps": 2}
    loss, data = build(dpo={**dpo, "decay_steps": 4}), sampled()
    for part in loss.tree():
        part.on_train_begin(6)
    for step, beta in ((0, 0.2), (1, 0.3), (2, 0.4), (4, 0.3), (6, 0.2)):
        for part in loss.tree():
            part.move_to_step(step)
        values = run(loss, data)
        assert values["adaptive_beta"] == pytest.approx(beta)
        assert values["dpo_loss"] == pytest.approx(whole_pairs(SigmoidLoss(beta=beta), data).item())


def test_adaptive_dpo_follows_the_margins_of_the_pairs() -> None:
    dpo = {"type": "adaptive_dpo", "strategy": "margin", "beta": 0.1, "margin_decay": 0.0}
    loss, data = build(dpo=dpo), sampled()
    adaptive = loss.tree()[2]
    for part in shuffled(16, 8, seed=0):
        data.take(part).loss(loss, data.denominators(micro_batches=8))
    total, count = adaptive.take_observed()["followed"].tolist()
    ratios = ((data.rows["logps"] - data.rows["ref"]) * data.rows["mask"]).sum(1).detach()
    assert total / count == pytest.approx((ratios[[2, 8]] - ratios[[1, 9]]).mean().item())


# Weights


def test_weights_follow_schedules() -> None:
    linear = {"schedule": "linear", "start": 1.0, "end": 0.0}
    loss, data = build(dpo_weight=linear, grpo_weight={**linear, "start": 0.0, "end": 2.0, "total_steps": 2}), sampled()
    assert list(loss.schedules) == ["dpo_weight", "grpo_weight"]
    for schedule in loss.schedules.values():
        schedule.begin(10)
    for step, dpo, grpo in ((0, 1.0, 0.0), (1, 0.9, 1.0), (5, 0.5, 2.0), (10, 0.0, 2.0)):
        for part in loss.tree():
            part.move_to_step(step)
        values = run(loss, data)
        assert (values["dpo_weight"], values["grpo_weight"]) == pytest.approx((dpo, grpo))
        expected = dpo * whole_pairs(SigmoidLoss(beta=0.4), data) + grpo * data.loss(GRPOLoss())
        assert_equal(data.loss(loss), expected, data)
    assert "dpo_weight=linear(start=1.0, end=0.0)" in loss.extra_repr()
    assert loss.hyperparameters()["dpo_weight"] is loss.schedules["dpo_weight"]


def test_weights_and_what_they_weigh_may_be_scheduled_together() -> None:
    linear = {"schedule": "linear", "start": 1.0, "end": 0.5, "total_steps": 2}
    lengths = {"schedule": "linear", "start": 8, "end": 4, "total_steps": 2}
    loss = build(
        dpo={"type": "sigmoid", "beta": linear},
        grpo={"type": "dr_grpo", "max_completion_length": lengths},
        dpo_weight=linear,
    )
    for part in loss.tree():
        part.move_to_step(2)
    sigmoid, dr_grpo = loss.leaves()
    assert (loss.dpo_weight, sigmoid.beta, dr_grpo.max_completion_length) == (0.5, 0.5, 4)


def test_objects_may_be_composed_with_schedules_too() -> None:
    linear = {"schedule": "linear", "start": 1.0, "end": 0.0, "total_steps": 4}
    loss, data = ComposedDPOGRPOLoss(dpo=IPOLoss(), grpo=GRPOLoss(epsilon=0.3), dpo_weight=linear), sampled()
    loss.move_to_step(1)
    assert loss.dpo_weight == 0.75
    assert_equal(data.loss(loss), 0.75 * whole_pairs(IPOLoss(), data) + 0.3 * data.loss(GRPOLoss()), data)


def test_gradients_can_be_balanced() -> None:
    loss, data = build(balancing="upgrad"), sampled()
    data.loss(loss, data.denominators())
    (gramian,) = loss.take_observed().values()
    sides = [
        gradient(whole_pairs(SigmoidLoss(beta=0.4), data), data).flatten(),
        gradient(data.loss(GRPOLoss()), data).flatten(),
    ]
    torch.testing.assert_close(gramian, torch.stack([torch.stack([a @ b for b in sides]) for a in sides]))


# Building


def test_config_fields_reach_the_grpo_side_alone() -> None:
    """GRPO's beta is the coefficient of a KL term."""
    loss = build(dpo="sigmoid", defaults={"beta": 0.04, "epsilon": 0.3, "dpo_weight": None})
    sigmoid, grpo = loss.leaves()
    assert (sigmoid.beta, sigmoid.origins["beta"]) == (0.1, "default")
    assert (grpo.epsilon, grpo.origins["epsilon"]) == (0.3, "trainer config")


def test_copies_keep_their_weights_apart() -> None:
    first, second = build(dpo_weight=0.5), build(dpo_weight=0.6)
    first.dpo_weight = 0.1
    assert (first.weights["dpo"], second.weights["dpo"]) == (0.1, 0.6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dpo": "grpo"}, "'base', a preference loss: loss 'grpo' is a policy loss"),
        ({"grpo": "sigmoid"}, "'sigmoid' is a preference loss"),
        ({"dpo": "aot"}, "'aot' compares the pairs"),
        ({"dpo": "nothing"}, "there is no loss named 'nothing'"),
        ({"dpo": 3}, "'dpo'"),
        ({"dpo_weight": "0.7"}, "'dpo_weight'"),
        ({"grpo_weight": {"schedule": "linear", "start": 1.0}}, "'grpo_weight'.*needs 'end'"),
        ({"dpo_wieght": 0.7}, "did you mean 'dpo_weight'"),
        ({"balancing": "none"}, "'balancing'"),
        ({"grpo": {"type": "grpo", "epsilon": -1}}, "'epsilon'"),
    ],
)
def test_mistakes_are_reported(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LossConfigError, match=message):
        build(**settings)


def test_it_is_a_policy_loss() -> None:
    assert "composed_dpo_grpo" in LossFunctionRegistry.names("policy")
    assert "composed_dpo_grpo" not in LossFunctionRegistry.names("preference")
    with pytest.raises(LossConfigError, match="policy loss"):
        LossFunctionRegistry.build("composed_dpo_grpo", family="preference")
