"""The custom trainer with one of TRL's losses from the registry computes what TRL's trainer computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_custom_losses import LossFunctionRegistry

from .parity import LOSS_TYPES, OUR_METRICS, TRL_METRICS, assert_parity

# Away from the defaults, so that a hyperparameter that does not arrive, or acts where it should not, shows.
OPTIONS = {"beta": 0.3, "label_smoothing": 0.15, "discopop_tau": 0.7}


def test_every_trl_loss_type_is_registered() -> None:
    assert set(LOSS_TYPES) <= set(LossFunctionRegistry.names("preference"))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_dense_loss_gradients_and_metrics_equal_trl(loss_type: str, dense_model: Path, run_arguments: dict) -> None:
    step = assert_parity(dense_model, run_arguments | OPTIONS, loss_type, {"loss_type": [loss_type]})
    assert step.metrics.keys() == TRL_METRICS | OUR_METRICS | {"epoch", "step"}  # and nothing of the loss


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_lora_loss_gradients_and_metrics_equal_trl(loss_type: str, dense_model: Path, run_arguments: dict) -> None:
    assert_parity(dense_model, run_arguments | OPTIONS, loss_type, {"loss_type": [loss_type]}, adapter="lora")


@pytest.mark.parametrize("loss_type", ["sigmoid", "sft", "sppo_hard"])
def test_continued_adapter_is_compared_with_its_starting_point(
    loss_type: str, dense_model: Path, run_arguments: dict
) -> None:
    assert_parity(dense_model, run_arguments | OPTIONS, loss_type, {"loss_type": [loss_type]}, adapter="continued")


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sft"])
def test_prompt_tuning_equals_trl(loss_type: str, dense_model: Path, run_arguments: dict) -> None:
    assert_parity(dense_model, run_arguments | OPTIONS, loss_type, {"loss_type": [loss_type]}, adapter="prompt")


@pytest.mark.parametrize("adapter", [None, "lora"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "sft"])
def test_mixture_of_experts_equals_trl_with_its_auxiliary_loss(
    loss_type: str, adapter: str | None, moe_model: Path, run_arguments: dict
) -> None:
    step = assert_parity(moe_model, run_arguments | OPTIONS, loss_type, {"loss_type": [loss_type]}, adapter=adapter)
    assert step.metrics["aux_loss"] > 0.1
