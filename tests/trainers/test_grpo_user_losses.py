"""Losses of the user's own: a file, a function, an object."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_custom_losses import LossFunctionRegistry, ModelOutputs, PolicyBatch, PolicyLoss
from trl_custom_losses.trainers import CustomGRPOConfig, CustomGRPOTrainer

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

USER_LOSS = """
import torch
from trl_custom_losses import LossFunctionRegistry, PolicyLoss

@LossFunctionRegistry.register("clipped_reinforce")
class ClippedReinforce(PolicyLoss):
    def __init__(self, *, cap: float = 2.0, epsilon: float = 0.9):
        super().__init__()
        self.cap, self.epsilon = cap, epsilon

    def forward(self, batch, outputs):
        ratio = (outputs.per_token_logps - outputs.old_per_token_logps).exp().detach().clamp(max=self.cap)
        return -ratio * batch.advantages * outputs.per_token_logps, {"ratio": ratio}
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A loss in a file of its own."""
    LossFunctionRegistry.names()  # so that the names of the package are not dropped with the user's below
    monkeypatch.setattr(LossFunctionRegistry, "_functions", dict(LossFunctionRegistry._functions))
    (tmp_path / "users_losses.py").write_text(USER_LOSS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_losses", raising=False)
    return "users_losses"


def test_a_users_loss_selected_by_import_path_trains(dense_model: Path, run_arguments: dict, user_module: str) -> None:
    trainer = build(
        CustomGRPOTrainer,
        CustomGRPOConfig,
        dense_model,
        run_arguments,
        loss_function={"type": f"{user_module}:ClippedReinforce", "cap": 1},
        trainer={"rollout_func": rollout},
        max_steps=2,
        num_iterations=2,
        beta=0.1,
    )
    before = weights(trainer)
    trainer.train()
    assert trainer.loss_function.hyperparameters() == {"cap": 1.0, "epsilon": 0.2}, "epsilon is the config's"
    assert any(not torch.equal(tensor, weights(trainer)[name]) for name, tensor in before.items())
    assert {"ratio", "kl", "entropy"} <= trainer.state.log_history[0].keys()


def reinforce(batch: PolicyBatch, outputs: ModelOutputs, *, epsilon: float = 0.5) -> tuple[Tensor, dict]:
    return -batch.advantages * outputs.per_token_logps * epsilon, {"used": torch.tensor(epsilon)}


class Reinforce:
    """Nothing but a call."""

    def __call__(self, batch: PolicyBatch, outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return reinforce(batch, outputs, epsilon=0.2)


class ReinforceLoss(PolicyLoss):
    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        return reinforce(batch, model_outputs, epsilon=0.2)


@pytest.mark.parametrize(
    "loss",
    [reinforce, Reinforce(), f"{__name__}:reinforce", f"{__name__}:Reinforce", f"{__name__}:ReinforceLoss"],
    ids=["function", "object", "function-path", "class-path", "loss-path"],
)
def test_functions_and_objects_are_losses_under_all_options(dense_model: Path, run_arguments: dict, loss: Any) -> None:
    config = {"off_policy_mask_threshold": 0.02, "beta": 0.2}  # and epsilon 0.2 for the function
    expected = build_custom(dense_model, run_arguments, loss_function=ReinforceLoss(), **config)
    trainer = build_custom(dense_model, run_arguments, loss_function=loss, **config)
    inputs = make_inputs(trainer)
    (value, gradients), (found, found_gradients) = (loss_and_gradients(each, inputs) for each in (expected, trainer))
    assert found == value
    assert_gradients(found_gradients, gradients)
    assert logged(trainer)["used"] == pytest.approx(0.2)
