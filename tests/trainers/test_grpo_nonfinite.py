"""Stopping before a loss that is not finite is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trl_custom_losses import ComposedLoss, ModelOutputs, NonFiniteLossError, PolicyBatch, PolicyLoss

from .grpo_parity import build_custom, loss_and_gradients, make_inputs, rollout, weights


class Breaks(PolicyLoss):
    """NaN in one call, counted from 1."""

    def __init__(self, at: int, value: float = float("nan")) -> None:
        super().__init__()
        self.at, self.value, self.calls = at, value, 0

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        self.calls += 1
        loss = -batch.advantages * model_outputs.per_token_logps
        return loss * (self.value if self.calls == self.at else 1.0), {}


@pytest.mark.parametrize("at", [3, 4], ids=["first-micro-batch", "last-micro-batch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(
    dense_model: Path, run_arguments: dict, at: int, value: float
) -> None:
    config = {"gradient_accumulation_steps": 2, "max_steps": 4, "trainer": {"rollout_func": rollout}}
    trainer = build_custom(dense_model, run_arguments, loss_function=Breaks(at, value), **config)
    reference = build_custom(dense_model, run_arguments, loss_function=Breaks(0), **{**config, "max_steps": 1})
    reference.args.lr_scheduler_type = trainer.args.lr_scheduler_type = "constant"
    for each in (trainer, reference):
        torch.manual_seed(0)
        if each is trainer:
            with pytest.raises(NonFiniteLossError, match="'Breaks' is not finite at step 2"):
                each.train()
        else:
            each.train()
    assert trainer.state.global_step == 1
    assert trainer.loss_function.calls == 4, "the host looks once a step, at the last micro-batch"
    assert all(torch.equal(tensor, weights(reference)[name]) for name, tensor in weights(trainer).items())


def test_training_continues_through_a_nan_if_told_to(dense_model: Path, run_arguments: dict) -> None:
    trainer = build_custom(
        dense_model,
        run_arguments,
        loss_function=Breaks(1),
        stop_on_nonfinite_loss=False,
        trainer={"rollout_func": rollout},
        max_steps=2,
    )
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("part", ["entropy bonus", "auxiliary loss"])
def test_a_term_around_the_loss_that_is_not_finite_stops_too(moe_model: Path, run_arguments: dict, part: str) -> None:
    trainer = build_custom(
        moe_model, run_arguments, loss_function="grpo", entropy_coef=0.1, trainer={"rollout_func": rollout}, max_steps=1
    )
    if part == "entropy bonus":
        trainer.entropy_coef = float("nan")
    else:
        trainer.router_aux_loss_coef = float("inf")
    before = weights(trainer)
    with pytest.raises(NonFiniteLossError, match="Not finite: loss"):
        trainer.train()
    assert all(torch.equal(tensor, weights(trainer)[name]) for name, tensor in before.items())


def test_the_message_names_what_was_not_finite(dense_model: Path, run_arguments: dict) -> None:
    loss = ComposedLoss(components=[("sound", 1.0, Breaks(0)), ("broken", 1.0, Breaks(1))])
    trainer = build_custom(dense_model, run_arguments, loss_function=loss)
    with pytest.raises(NonFiniteLossError, match=r"Not finite: loss, broken_loss, total_loss\."):
        loss_and_gradients(trainer, make_inputs(trainer))
    trainer = build_custom(dense_model, run_arguments, loss_function=Breaks(0))
    inputs = make_inputs(trainer)
    inputs["advantages"][1] = torch.nan
    with pytest.raises(NonFiniteLossError, match=r"Not finite: loss, advantages\."):
        loss_and_gradients(trainer, inputs)


def test_training_starts_again_after_it_was_stopped(dense_model: Path, run_arguments: dict) -> None:
    """As a new trainer would from the same weights: with completions of its own, generated when a step begins."""
    config = {"gradient_accumulation_steps": 2, "max_steps": 3, "optim": "sgd", "learning_rate": 0.05}
    stopped, fresh = (
        build_custom(dense_model, run_arguments, loss_function=loss, trainer={"rollout_func": rollout}, **config)
        for loss in (Breaks(4), Breaks(0))
    )
    with pytest.raises(NonFiniteLossError):
        stopped.train()
    fresh.model.load_state_dict(stopped.model.state_dict())
    for trainer in (stopped, fresh):
        torch.manual_seed(0)
        trainer.train()
    for name, tensor in weights(fresh).items():
        torch.testing.assert_close(weights(stopped)[name], tensor)
