"""Compositions under TRL's options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from trl_custom_losses import (
    ComposedLoss,
    LossConfigError,
    ModelOutputs,
    PolicyBatch,
    PolicyLoss,
    Rollout,
)
from trl_custom_losses.losses.policy import GRPOLoss, VESPOLoss
from trl_custom_losses.trainers import CustomGRPOConfig

from .grpo_parity import (
    assert_gradients,
    build,
    build_custom,
    logged,
    loss_and_gradients,
    make_inputs,
    rollout,
    weights,
)


class Likelihood(PolicyLoss):
    """Auxiliary: minus the mean log-probability, one value per sequence."""

    surrogate = False

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        return -model_outputs.mean_logps, {"likelihood": -model_outputs.mean_logps.detach()}


class PerSequence(PolicyLoss):
    """A surrogate of one value per sequence, to which masks per token cannot be applied."""

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        return -batch.advantages[:, 0] * model_outputs.mean_logps, {}


class OwnAdvantages(GRPOLoss):
    """GRPO on advantages of its own: TRL's with the opposite sign."""

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        return {"advantages": -rollout.advantages[rollout.local]}


def copied(gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if gradient is None else gradient.clone() for name, gradient in gradients.items()}


def together(parts: list[tuple[float, tuple[Tensor, Mapping[str, Tensor | None]]]]) -> tuple[Tensor, dict]:
    """The weighted sum of losses and of their gradients."""
    total = sum(weight * loss for weight, (loss, _) in parts)
    gradients: dict[str, Tensor | None] = dict.fromkeys(parts[0][1][1])
    for weight, (_, each) in parts:
        for name, gradient in each.items():
            if gradient is not None:
                gradients[name] = weight * gradient + (0 if gradients[name] is None else gradients[name])
    return total, gradients


MODIFIERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "kl": ({"beta": 0.3, "use_bias_correction_kl": True}, {}),
    "off-policy": ({"off_policy_mask_threshold": 0.02}, {"sampling": True}),
    "high-entropy": ({"top_entropy_quantile": 0.4}, {}),
    "vllm-token": ({}, {"ratio": "token", "sampling": True}),
    "vllm-sequence": ({"beta": 0.3}, {"ratio": "sequence", "sampling": True}),
    "all": (
        {"beta": 0.3, "off_policy_mask_threshold": 0.02, "top_entropy_quantile": 0.6, "entropy_coef": 0.1},
        {"ratio": "token", "sampling": True, "tool_mask": True, "masked_rows": (1,)},
    ),
}


@pytest.mark.parametrize("modifier", MODIFIERS)
def test_masks_and_ratios_act_on_the_surrogate_of_a_composition_alone_and_kl_is_added_once(
    dense_model: Path, run_arguments: dict, modifier: str
) -> None:
    config, options = MODIFIERS[modifier]
    stock = build(GRPOTrainer, GRPOConfig, dense_model, run_arguments, loss_type="grpo", **config)
    auxiliary = build_custom(dense_model, run_arguments, loss_function=Likelihood())
    loss = ComposedLoss(components=[("grpo", 1.0, GRPOLoss()), ("likelihood", 0.25, Likelihood())])
    composed = build_custom(dense_model, run_arguments, loss_function=loss, **config)
    for trainer in (stock, auxiliary, composed):
        trainer.current_gradient_accumulation_steps = 2
        trainer.use_vllm = "ratio" in options and trainer is not auxiliary
    inputs = make_inputs(stock, **options)
    surrogate, aux, (value, gradients) = (
        loss_and_gradients(trainer, inputs) for trainer in (stock, auxiliary, composed)
    )
    expected, expected_gradients = together([(1.0, surrogate), (0.25, aux)])
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert_gradients(gradients, expected_gradients)
    metrics = logged(composed)
    assert metrics["likelihood_loss"] == pytest.approx(2 * aux[0].item(), rel=1e-5)
    assert (metrics["grpo_weight"], metrics["likelihood_weight"]) == (1.0, 0.25)
    parts = metrics["grpo_loss"] + 0.25 * metrics["likelihood_loss"]
    assert metrics["total_loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("options", [{"sampling": True}, {"ratio": "token"}], ids=["off-policy", "vllm"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_surrogate_of_one_value_a_sequence_under_masks_per_token_is_reported(
    dense_model: Path, run_arguments: dict, options: dict, nested: bool
) -> None:
    loss: Any = PerSequence()
    if nested:
        loss = ComposedLoss(components=[("main", 1.0, loss), ("likelihood", 1.0, Likelihood())])
    threshold = 0.02 if "sampling" in options else None
    trainer = build_custom(dense_model, run_arguments, loss_function=loss, off_policy_mask_threshold=threshold)
    inputs = make_inputs(trainer, **options)
    trainer.use_vllm = "ratio" in options
    with pytest.raises(ValueError, match=r"returned shape \(4,\).*surrogate = False"):
        loss_and_gradients(trainer, inputs)


def test_a_loss_that_multiplies_vllm_ratios_itself_does_not_get_them_twice_in_a_composition(
    dense_model: Path, run_arguments: dict
) -> None:
    config = {"beta": 0.0}
    stock = [build(GRPOTrainer, GRPOConfig, dense_model, run_arguments, loss_type=t) for t in ("grpo", "vespo")]
    loss = ComposedLoss(components=[("grpo", 0.5, GRPOLoss()), ("vespo", 2.0, VESPOLoss())])
    composed = build_custom(dense_model, run_arguments, loss_function=loss, **config)
    for trainer in (*stock, composed):
        trainer.use_vllm = True
    inputs = make_inputs(composed, ratio="token", sampling=True, drift=0.1)
    expected, gradients = together(
        [(weight, loss_and_gradients(each, inputs)) for weight, each in zip((0.5, 2.0), stock, strict=True)]
    )
    value, found = loss_and_gradients(composed, inputs)
    torch.testing.assert_close(value, expected)
    assert_gradients(found, gradients)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "off-policy-mask"])
def test_a_composition_of_one_loss_is_that_loss(dense_model: Path, run_arguments: dict, masked: bool) -> None:
    """Also where the loss prepares advantages of its own, from which the off-policy mask is made."""
    trained = []
    composed = ComposedLoss(components=[("own", 1.0, OwnAdvantages())])
    for loss in (OwnAdvantages(), composed):
        trainer = build_custom(
            dense_model,
            run_arguments,
            loss_function=loss,
            trainer={"rollout_func": rollout},
            off_policy_mask_threshold=0.1 if masked else None,
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=1e9,
        )
        torch.manual_seed(0)
        trainer.train()
        trained.append(weights(trainer))
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor)


def test_a_nested_composition_is_the_flat_one(dense_model: Path, run_arguments: dict) -> None:
    inner = ComposedLoss(components=[("main", 0.5, GRPOLoss()), ("likelihood", 0.1, Likelihood())])
    losses = [
        ComposedLoss(components=[("both", 2.0, inner)]),
        ComposedLoss(components=[("main", 1.0, GRPOLoss()), ("likelihood", 0.2, Likelihood())]),
    ]
    results = []
    for loss in losses:
        trainer = build_custom(dense_model, run_arguments, loss_function=loss, beta=0.2, top_entropy_quantile=0.5)
        results.append(loss_and_gradients(trainer, make_inputs(trainer)))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_gradients(results[0][1], results[1][1])


@pytest.mark.parametrize("name", ["total", "policy", "aux"])
def test_a_component_cannot_take_the_name_of_a_metric_of_the_trainer(run_arguments: dict, name: str) -> None:
    """`total_loss`, `policy_loss` (entropy bonus) and `aux_loss` (mixture of experts) are taken."""
    with pytest.raises(LossConfigError, match=name):
        CustomGRPOConfig(
            **run_arguments, loss_function={"type": "composed", "components": [{"type": "grpo", "name": name}]}
        )


def test_a_scalar_is_taken_as_the_mean_of_the_micro_batch(dense_model: Path, run_arguments: dict) -> None:
    def scalar(batch: PolicyBatch, outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return -outputs.mean_logps.mean(), {}

    results = []
    for loss in (Likelihood(), scalar):
        trainer = build_custom(dense_model, run_arguments, loss_function=loss)
        trainer.current_gradient_accumulation_steps = 3
        inputs = make_inputs(trainer)
        results.append(loss_and_gradients(trainer, inputs))
        evaluated, _ = loss_and_gradients(trainer, inputs, mode="eval")
        torch.testing.assert_close(evaluated, 3 * results[-1][0])
    torch.testing.assert_close(results[0][0], results[1][0])


def test_a_metric_of_the_loss_never_replaces_one_of_the_trainer(dense_model: Path, run_arguments: dict) -> None:
    class Shadows(GRPOLoss):
        def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Mapping[str, Any]]:
            loss, metrics = super().forward(batch, model_outputs)
            return loss, {**metrics, **dict.fromkeys(("loss", "reward", "entropy"), torch.tensor(99.0))}

    histories = []
    for loss in (GRPOLoss(), Shadows()):
        options = {"max_steps": 1, "trainer": {"rollout_func": rollout}}
        trainer = build_custom(dense_model, run_arguments, loss_function=loss, **options)
        torch.manual_seed(0)
        trainer.train()
        histories.append(trainer.state.log_history)
    for name in ("loss", "reward", "entropy"):
        assert histories[1][0][name] == pytest.approx(histories[0][0][name], abs=1e-6), name
