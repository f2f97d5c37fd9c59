"""Gradient balancing in real runs: what it sees of the model, and how batches are split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from trl_custom_losses import (
    ComposableLossFunction,
    CustomDPOConfig,
    CustomDPOTrainer,
    Loss,
    ModelOutputs,
    PolicyLoss,
    PreferenceLoss,
)

from .grpo_parity import build_custom, loss_and_gradients, make_inputs
from .parity import custom, measure


def _chosen(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


class Likelihood(PreferenceLoss):
    def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return -model_outputs.per_token_logps, {}


class LikelihoodFromLogits(Likelihood):
    requires = frozenset({"logits"})

    def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return -_chosen(model_outputs.logits, batch.input_ids[:, 1:]), {}


class Reinforce(PolicyLoss):
    def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return -batch.advantages * model_outputs.per_token_logps, {}


class ReinforceFromLogits(Reinforce):
    requires = frozenset({"logits"})

    def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return -batch.advantages * _chosen(model_outputs.logits, batch.completion_ids), {}


class States(PolicyLoss):
    requires = frozenset({"pooled_hidden"})
    surrogate = False

    def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return model_outputs.pooled_hidden.sum(1), {}


class Entropy(PolicyLoss):
    requires = frozenset({"entropies"})
    surrogate = False

    def forward(self, batch: Any, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return -model_outputs.entropies, {}


def _gramian(parts: dict[str, Loss], model: Path, arguments: dict) -> Tensor:
    """What is observed of the first micro-batch."""
    loss = ComposableLossFunction(parts, balancing="upgrad")
    if loss.family == "preference":
        measure(custom(model, arguments, loss))
    else:
        run = build_custom(model, arguments, loss_function=loss)
        loss_and_gradients(run, make_inputs(run))
    return loss.take_observed()["gramian"]


def test_a_loss_through_log_probabilities_or_logits_has_one_gradient(dense_model: Path, run_arguments: dict) -> None:
    """Both reach the model through the same logits."""
    for parts in (
        {"tokens": Likelihood(), "logits": LikelihoodFromLogits()},
        {"tokens": Reinforce(), "logits": ReinforceFromLogits(), "entropy": Entropy()},
    ):
        gramian = _gramian(parts, dense_model, run_arguments)
        torch.testing.assert_close(gramian[:2, :2], gramian[0, 0].expand(2, 2))
        assert gramian[0, 0] > 1e-4
        if "entropy" in parts:
            torch.testing.assert_close(gramian[0, 2], gramian[1, 2])
            assert gramian[2, 2] > 1e-4 and abs(gramian[0, 2]) > 1e-6


def test_losses_on_states_entropies_and_tokens_are_all_seen(dense_model: Path, run_arguments: dict) -> None:
    gramian = _gramian({"a": Reinforce(), "b": States(), "c": Entropy(), "d": States()}, dense_model, run_arguments)
    assert (gramian.diagonal() > 1e-4).all()
    torch.testing.assert_close(gramian[1, 3], gramian[1, 1])
    assert gramian[0, 1] == gramian[0, 2] == 0, "they do not meet before the model"


@pytest.mark.parametrize("method", ["upgrad", "mgda"])
def test_a_balanced_run_does_not_depend_on_how_batches_are_split(
    method: str, dense_model: Path, tmp_path: Path
) -> None:
    runs = []
    for accumulation in (1, 2, 4):
        config = tiny.run_arguments(tmp_path) | {"optim": "sgd", "learning_rate": 0.02, "max_steps": 4}
        config |= {
            "gradient_accumulation_steps": accumulation,
            "per_device_train_batch_size": 4 // accumulation,
        }
        components = [{"type": "sigmoid", "beta": 1.0}, {"type": "sft", "weight": 0.3}, {"type": "ipo"}]
        run = CustomDPOTrainer(
            model=tiny.load_model(dense_model, seed=1),
            ref_model=tiny.load_model(dense_model),
            args=CustomDPOConfig(
                **config,
                loss_function={
                    "type": "composed",
                    "components": components,
                    "balancing": {"type": method, "decay": 0.5},
                },
            ),
            train_dataset=tiny.preference_data(),
            processing_class=tiny.tokenizer(),
        )
        run.train()
        entries = [entry for entry in run.state.log_history if "loss" in entry]
        keys = [key for key in entries[0] if key.startswith("grad_cosine/") or key.endswith("_weight")]
        assert len(keys) == 6
        runs.append([[entry[key] for key in keys] for entry in entries])
    for found in runs[1:]:
        for ours, theirs in zip(found, runs[0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert runs[0][-1] != pytest.approx(runs[0][0], rel=1e-2)
