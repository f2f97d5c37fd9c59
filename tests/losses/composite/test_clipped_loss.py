"""A bound on what one loss may push: what it clips, in a composition, and in a run."""

from __future__ import annotations

from math import log, sqrt

import pytest
import torch
from torch import Tensor

from trl_custom_losses import LossConfigError, LossFunctionRegistry, ModelOutputs, PolicyBatch, PolicyLoss, Rollout
from trl_custom_losses.losses.composite import ClippedLoss
from trl_custom_losses.testing import random_data

from ..singles import column_pairs
from .clipped import FAMILIES, PER, build, gradient, rows_of, run

# What is clipped


def test_values_of_one_pair() -> None:
    batch, outputs = column_pairs([-1.0, -2.0], [-1.0, -2.0])
    outputs.per_token_logps.requires_grad_()
    for bound, length in ((0.1, 0.1), (0.5, 0.5), (2.0, sqrt(0.5))):
        loss = build({"type": "sigmoid", "beta": 1.0}, max_grad_norm=bound)
        value, metrics = loss(batch, outputs)
        assert value.item() == metrics["base_loss"].item() == pytest.approx(log(2))
        (found,) = torch.autograd.grad(value, outputs.per_token_logps)  # (-1/2, 1/2) before
        assert found.flatten().tolist() == pytest.approx([-length / sqrt(2), length / sqrt(2)])
        assert metrics["grad_norm"].item() == pytest.approx(sqrt(0.5))
        assert metrics["clip_fraction"].item() == (bound < sqrt(0.5))


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_value_is_the_base_losss(family: str, per: str) -> None:
    data = random_data(family)
    for bound in (1e-6, 1e6):
        value, metrics = run(build(FAMILIES[family], max_grad_norm=bound, per=per), data)
        assert torch.equal(value, run(LossFunctionRegistry.build(FAMILIES[family]), data)[0])
        assert torch.equal(metrics["base_loss"], value.detach())


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(("family", "base"), [("preference", "ipo"), ("preference", "sft"), ("policy", "dapo")])
def test_below_the_bound_nothing_changes_by_a_bit(family: str, base: str, per: str) -> None:
    data, plain = random_data(family, dtype=torch.float32), LossFunctionRegistry.build(base)
    loss = build(base, max_grad_norm=1e6, per=per)
    assert torch.equal(run(loss, data)[0], run(plain, data)[0])
    assert torch.equal(gradient(loss, data), gradient(plain, data))
    if per == "batch":  # whatever the loss is multiplied by
        assert torch.equal(gradient(loss, data, scale=1 / 3), gradient(plain, data, scale=1 / 3))
    assert run(loss, data)[1]["clip_fraction"].sum() == 0


@pytest.mark.parametrize("scale", [0.25, 1.0, 65536.0])
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_holds_whatever_the_loss_is_multiplied_by(family: str, per: str, scale: float) -> None:
    data, bound = random_data(family, dtype=torch.float32), 0.01
    loss = build(FAMILIES[family], max_grad_norm=bound, per=per)
    unscaled = gradient(loss, data, scale=scale) / scale
    assert torch.equal(unscaled, gradient(loss, data))
    lengths = rows_of(data, unscaled).norm(dim=1)
    if per == "batch":
        assert lengths.norm() == pytest.approx(bound, rel=1e-6)
    else:
        assert lengths.max() == pytest.approx(bound / sqrt(4), rel=1e-6) and lengths.norm() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_per_batch_the_direction_stays(family: str) -> None:
    data = random_data(family)
    before = gradient(LossFunctionRegistry.build(FAMILIES[family]), data)
    after = gradient(build(FAMILIES[family], max_grad_norm=0.01), data)
    torch.testing.assert_close(after, before * 0.01 / before.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_per_sequence_outliers_alone_are_held_back(family: str) -> None:
    data = random_data(family)
    before = rows_of(data, gradient(LossFunctionRegistry.build(FAMILIES[family]), data))
    lengths = before.norm(dim=1)
    bound = lengths.sort().values[1:3].mean()  # two are longer, two are not
    loss = build(FAMILIES[family], max_grad_norm=bound.item() * 2, per="sequence")
    after = rows_of(data, gradient(loss, data))
    for row in range(4):
        longer = lengths[row] > bound
        torch.testing.assert_close(after[row], before[row] * (bound / lengths[row] if longer else 1))
    metrics = run(loss, data)[1]
    assert metrics["clip_fraction"].tolist() == (lengths > bound).tolist()
    torch.testing.assert_close(metrics["grad_norm"], lengths * 2)  # what is compared with max_grad_norm


# In a composition


def test_in_a_composition_it_clips_its_own_component() -> None:
    data = random_data("preference")
    clipped = {"type": "clipped_loss", "base_loss": "ipo", "max_grad_norm": 0.01, "name": "pref", "weight": 3.0}
    loss = LossFunctionRegistry.build(
        {"type": "composed", "components": [clipped, {"type": "sft", "weight": 0.5}]}, family="preference"
    )
    ipo, sft = (gradient(LossFunctionRegistry.build(name), data) for name in ("ipo", "sft"))
    torch.testing.assert_close(gradient(loss, data), 3 * ipo * 0.01 / ipo.norm() + 0.5 * sft)
    _, metrics = run(loss, data)
    assert {"pref_loss", "sft_loss", "total_loss", "base_loss", "grad_norm", "clip_fraction"} <= metrics.keys()
    assert metrics["pref_loss"] == metrics["base_loss"] == run(LossFunctionRegistry.build("ipo"), data)[0]


def test_a_composition_can_be_clipped() -> None:
    data = random_data("policy")
    components = [{"type": "grpo", "weight": 2.0}, {"type": "dapo", "weight": 1.0}]
    base = {"type": "composed", "components": components}
    before = gradient(LossFunctionRegistry.build(base, family="policy"), data)
    loss = LossFunctionRegistry.build(
        {"type": "clipped_loss", "base_loss": base, "max_grad_norm": 0.02}, family="policy"
    )
    torch.testing.assert_close(gradient(loss, data), before * 0.02 / before.norm())
    _, metrics = run(loss, data)
    assert {"grpo_loss", "dapo_loss", "grpo_weight"} <= metrics.keys()
    assert metrics["base_loss"] == metrics["total_loss"]
    assert [leaf.name for leaf in loss.leaves()] == ["grpo", "dapo"] and loss.kl_reduction == "sequence_mean"


def test_bounds_can_be_nested() -> None:
    data = random_data("preference")
    outer = build({"type": "clipped_loss", "base_loss": "ipo", "max_grad_norm": 0.02}, max_grad_norm=0.01)
    assert gradient(outer, data).norm() == pytest.approx(0.01)
    _, metrics = run(outer, data)
    assert metrics["grad_norm"] == pytest.approx(0.02)
    assert metrics["base/grad_norm"] == pytest.approx(gradient(LossFunctionRegistry.build("ipo"), data).norm())


@pytest.mark.parametrize("per", PER)
def test_gradient_balancing_sees_the_clipped_gradient(per: str) -> None:
    data = random_data("preference")
    clipped = {"type": "clipped_loss", "base_loss": "ipo", "max_grad_norm": 0.01, "per": per, "name": "pref"}
    loss = LossFunctionRegistry.build(
        {"type": "composed", "components": [clipped, {"type": "sft"}], "balancing": "upgrad"}, family="preference"
    )
    run(loss, data)
    length = gradient(build("ipo", max_grad_norm=0.01, per=per), data).norm()
    assert loss.take_observed()["gramian"][0, 0] == pytest.approx(length**2)


# The run


def test_the_bound_can_be_scheduled() -> None:
    loss = build("ipo", max_grad_norm={"schedule": "linear", "start": 0.04, "end": 0.01, "total_steps": 3})
    data = random_data("preference")
    for step, bound in enumerate([0.04, 0.03, 0.02, 0.01, 0.01]):
        loss.move_to_step(step)
        assert gradient(loss, data).norm() == pytest.approx(bound)


@pytest.mark.parametrize("per", PER)
def test_without_gradient_there_is_the_value_alone(per: str) -> None:
    data = random_data("preference")
    with torch.no_grad():
        value, metrics = run(build("ipo", per=per, max_grad_norm=1e-3), data)
    assert metrics.keys() == {"base_loss"} and value == run(LossFunctionRegistry.build("ipo"), data)[0]
    batch, outputs = data.build(build("ipo"))
    with torch.no_grad():
        assert build("ipo", per=per)(batch, outputs)[1].keys() == {"base_loss"}


def test_prepares_what_the_base_prepares() -> None:
    class Preparing(PolicyLoss):
        def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
            return {"advantages": 2 * rollout.advantages, "own": rollout.advantages}

        def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
            assert torch.equal(batch.advantages, 2 * batch["own"].unsqueeze(1))
            return -batch.advantages * model_outputs.per_token_logps, {"mine": batch.advantages.mean()}

    data, loss = random_data("policy"), ClippedLoss(base_loss=Preparing())
    assert loss.prepares and data.prepared(loss).keys() == {"base.advantages", "base.own"}
    assert "mine" in run(loss, data)[1]


def test_needs_what_the_base_needs() -> None:
    loss = build("aot")
    assert loss.batch_coupled and loss.requires == {"ref_logps"} and loss.family == "preference"
    policy = build({"type": "dr_grpo", "max_completion_length": 8})
    assert policy.family == "policy" and not policy.surrogate and policy.leaves()[0].surrogate
    assert policy.kl_reduction == policy.losses[0].reduction


# Refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "needs the hyperparameter 'base_loss'"),
        ({"base_loss": "sigmiod"}, "did you mean 'sigmoid'"),
        ({"base_loss": {"beta": 0.1}}, "'base_loss': expected a loss's name or a dict with 'type'"),
        ({"base_loss": ["sigmoid"]}, "base_loss"),
        ({"base_loss": "grpo"}, "is a policy loss and cannot run in a DPO trainer"),
        ({"base_loss": {"type": "sigmoid", "beta": -1.0}}, "beta"),
        ({"base_loss": "sigmoid", "max_grad_norm": 0.0}, "max_grad_norm"),
        ({"base_loss": "sigmoid", "per": "token"}, "'batch' | 'sequence'"),
        ({"base_loss": "sigmoid", "max_grad_norm": {"schedule": "linear", "start": 1.0, "end": 0.0}}, "reaches 0"),
    ],
)
def test_refuses(config: dict, message: str) -> None:
    with pytest.raises(LossConfigError, match=message.replace("|", r"\|")):
        LossFunctionRegistry.build({"type": "clipped_loss", **config}, family="preference")
