"""The bound on one loss in real runs: of the whole optimizer step, as the backward pass delivers it."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, set_seed

from tests import tiny
from trl_custom_losses import (
    CustomDPOConfig,
    CustomDPOTrainer,
    CustomGRPOConfig,
    CustomGRPOTrainer,
    LossFunctionRegistry,
    ModelOutputs,
    PolicyLoss,
)
from trl_custom_losses.composition import Batch
from trl_custom_losses.losses.composite import ClippedLoss

from .parity import assert_identical, assert_same_tensors, perturb, weights

PER = ["batch", "sequence"]
BOUND = 0.003
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}


class Watched(ClippedLoss):
    """Keeps the squared length of the gradient that the backward pass delivers to what the loss read."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.squares: list[float] = []

    def forward(self, batch: Batch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        result = super().forward(batch, model_outputs)
        if torch.is_grad_enabled():
            for anchor in model_outputs.anchors():
                anchor.register_hook(lambda gradient: self.squares.append(gradient.double().square().sum().item()))
        return result


class StepNorms(TrainerCallback):
    """The gradient norm of each optimizer step, of what a loss watched."""

    def __init__(self, loss: Watched) -> None:
        self.loss, self.norms = loss, []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.norms.append(sqrt(sum(self.loss.squares)))
        self.loss.squares.clear()


def dpo(model: Path, arguments: dict, loss: Any, **options: Any) -> CustomDPOTrainer:
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 1} | SGD | options
    run = CustomDPOTrainer(
        model=tiny.load_model(model),
        args=CustomDPOConfig(**{**arguments, **options}),
        train_dataset=tiny.preference_data(7),  # the last micro-batch has one pair, the last step fewer micro-batches
        eval_dataset=tiny.preference_data(4),
        processing_class=tiny.tokenizer(),
        loss_function=loss,
    )
    perturb(run.model)
    return run


def grpo(model: Path, arguments: dict, loss: Any, **options: Any) -> CustomGRPOTrainer:
    options = {"per_device_train_batch_size": 4, "num_generations": 2, "max_steps": 2} | SGD | options
    run = CustomGRPOTrainer(
        model=tiny.load_model(model),
        reward_funcs=[tiny.count_reward, tiny.length_reward],
        args=CustomGRPOConfig(**{**arguments, "max_completion_length": 8, **options}),
        train_dataset=tiny.prompt_data(),
        processing_class=tiny.tokenizer(),
        loss_function=loss,
    )
    perturb(run.model)
    return run


TRAINERS = {"dpo": (dpo, {"type": "ipo", "beta": 0.1}), "grpo": (grpo, {"type": "grpo"})}


def train(make: Any, *arguments: Any, **options: Any) -> Any:
    run = make(*arguments, **options)
    set_seed(0)  # TRL shuffles generation batches with the global generator
    run.train()
    return run


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("name", TRAINERS)
def test_the_bound_holds_for_every_step(
    name: str, per: str, accumulation: int, dense_model: Path, run_arguments: dict
) -> None:
    make, base = TRAINERS[name]
    options = {"gradient_accumulation_steps": accumulation}
    loss = Watched(base_loss=base, max_grad_norm=BOUND, per=per)
    run = make(dense_model, run_arguments, loss, **options)
    steps = StepNorms(loss)
    run.add_callback(steps)
    run.train()
    assert len(steps.norms) >= 2
    for norm in steps.norms:
        if per == "batch":  # every micro-batch is clipped
            assert norm == pytest.approx(BOUND, rel=1e-5)
        else:
            assert BOUND / 10 < norm <= BOUND * (1 + 1e-5)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_where_nothing_is_clipped_the_run_is_that_of_the_base(
    accumulation: int, name: str, per: str, dense_model: Path, run_arguments: dict
) -> None:
    make, base = TRAINERS[name]
    options = {"gradient_accumulation_steps": accumulation}
    plain = train(make, dense_model, run_arguments, base, **options)
    loss = {"type": "clipped_loss", "base_loss": base, "max_grad_norm": 1e6, "per": per}
    clipped = train(make, dense_model, run_arguments, loss, **options)
    if per == "batch":
        assert_identical(weights(clipped), weights(plain))
    else:  # the same slopes, multiplied by the Trainer's 1/3 in another order
        assert_same_tensors(weights(clipped), weights(plain))
    for ours, theirs in zip(clipped.state.log_history[:2], plain.state.log_history[:2], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0 if per == "batch" else 1e-5, abs=0)
        assert ours["clip_fraction"] == 0.0


@pytest.mark.parametrize("name", TRAINERS)
def test_metrics_are_logged_beside_the_trainers_own(name: str, dense_model: Path, run_arguments: dict) -> None:
    make, base = TRAINERS[name]
    loss = {"type": "clipped_loss", "base_loss": base, "max_grad_norm": BOUND}
    run = train(make, dense_model, run_arguments, loss, gradient_accumulation_steps=2)
    first = run.state.log_history[0]
    assert first["clip_fraction"] == 1.0 and first["clipped_loss/grad_norm"] > BOUND
    assert first["grad_norm"] != first["clipped_loss/grad_norm"]  # that of the parameters
    assert first["base_loss"] == pytest.approx(first["loss"], abs=1e-4)


def test_evaluation_reports_the_value(dense_model: Path, run_arguments: dict) -> None:
    run = dpo(dense_model, run_arguments, {"type": "clipped_loss", "base_loss": "ipo", "max_grad_norm": BOUND})
    metrics = run.evaluate()
    plain = dpo(dense_model, run_arguments, "ipo").evaluate()
    assert metrics["eval_loss"] == metrics["eval_base_loss"] == plain["eval_loss"]
    assert "eval_clip_fraction" not in metrics


class WithLogits(PolicyLoss):
    """Reaches the model through log-probabilities and logits."""

    requires = frozenset({"logits"})

    def forward(self, batch: Batch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return -batch.advantages * model_outputs.per_token_logps + 1e-3 * model_outputs.logits.square().sum(-1), {}


@pytest.mark.parametrize("per", PER)
def test_where_a_loss_asks_for_logits_the_bound_is_on_these(per: str, dense_model: Path, run_arguments: dict) -> None:
    """The log-probabilities are computed from the very logits that the loss sees."""
    loss = Watched(base_loss=WithLogits(), max_grad_norm=BOUND, per=per)
    run = grpo(dense_model, run_arguments, loss, gradient_accumulation_steps=2)
    steps = StepNorms(loss)
    run.add_callback(steps)
    run.train()
    assert all(BOUND / 10 < norm <= BOUND * (1 + 1e-5) for norm in steps.norms) and len(steps.norms) == 2

    alone = Watched(base_loss=LossFunctionRegistry.build("grpo"), max_grad_norm=1e6)
    alone.requires = alone.requires | {"logits"}
    run = train(grpo, dense_model, run_arguments, alone)
    assert run.state.log_history[0]["Watched/grad_norm"] > 1e-3


def test_a_component_is_bounded_alone(dense_model: Path, run_arguments: dict) -> None:
    """A clipped part and an unclipped one train as their sum."""
    clipped = {"type": "clipped_loss", "base_loss": "ipo", "max_grad_norm": 1e-9, "name": "pref"}
    both = {"type": "composed", "components": [clipped, {"type": "sft"}]}
    sft = train(dpo, dense_model, run_arguments, "sft", gradient_accumulation_steps=2)
    run = train(dpo, dense_model, run_arguments, both, gradient_accumulation_steps=2)
    assert_same_tensors(weights(run), weights(sft), rtol=1e-4)
    assert run.state.log_history[0]["pref_loss"] > 1
