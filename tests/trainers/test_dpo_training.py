"""Whole runs: training, logging and evaluation with the registry's losses go as they go in TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from tests import tiny
from trl_custom_losses import CustomDPOConfig, CustomDPOTrainer

from .parity import (
    OUR_METRICS,
    TRL_METRICS,
    assert_identical,
    assert_same_logs,
    assert_same_tensors,
    build,
    composed,
    custom,
    logged,
    lora,
    stock,
    weights,
)

# Plain gradient descent: Adam divides rounding errors of vanishing gradients by themselves.
SGD = {"max_steps": 4, "per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.05}
MPO = (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])

RUNS = {
    "sigmoid": ("sigmoid", {}, {}),
    "sft": ("sft", {"loss_type": ["sft"]}, {}),
    "composed": (composed(*MPO), {"loss_type": MPO[0], "loss_weights": MPO[1]}, {}),
    "aot": ("aot", {"loss_type": ["aot"]}, {"label_smoothing": 0.1}),
    "adamw": ("sigmoid", {}, {"optim": "adamw_torch", "adam_epsilon": 1e-3, "learning_rate": 1e-3}),
    "checkpointing": ("sigmoid", {}, {"gradient_checkpointing": True}),
    "bf16": ("sigmoid", {}, {"bf16": True}),
    "bf16 checkpointing": ("ipo", {"loss_type": ["ipo"]}, {"bf16": True, "gradient_checkpointing": True}),
    "weighted": ("sigmoid", {}, {"use_weighting": True, "ld_alpha": 0.5}),
    "precomputed": ("sigmoid", {}, {"precompute_ref_log_probs": True}),
}


@pytest.mark.parametrize(
    ("run", "adapter"),
    [*((run, None) for run in RUNS), *((run, "lora") for run in ("composed", "checkpointing", "bf16", "weighted"))],
)
def test_training_equals_trl(run: str, adapter: str | None, dense_model: Path, run_arguments: dict) -> None:
    loss_function, stock_options, options = RUNS[run]
    config = run_arguments | SGD | options
    theirs = stock(dense_model, config | stock_options, adapter=adapter)
    ours = custom(dense_model, config, loss_function, adapter=adapter)
    start = weights(ours)
    theirs.train()
    ours.train()
    assert_same_logs(ours, theirs)
    assert_same_tensors(weights(ours), weights(theirs))
    moved = max((p - start[name]).abs().max() for name, p in weights(ours).items())
    assert moved > 1e-4, "nothing was trained"


def test_training_of_experts_equals_trl(moe_model: Path, run_arguments: dict) -> None:
    config = run_arguments | SGD | {"gradient_accumulation_steps": 2, "max_steps": 2}
    theirs, ours = stock(moe_model, config), custom(moe_model, config, "sigmoid")
    theirs.train()
    ours.train()
    assert_same_logs(ours, theirs)
    assert_same_tensors(weights(ours), weights(theirs))
    assert "aux_loss" in logged(ours)[0]


@pytest.mark.parametrize("config_class", [DPOConfig, CustomDPOConfig])
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2, "loss_type": MPO[0], "loss_weights": MPO[1], "learning_rate": 1e-2}],
    ids=["default", "accumulated list of losses"],
)
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_without_a_loss_function_swapping_the_classes_changes_no_bit(
    config_class: type, options: dict, adapter: str | None, dense_model: Path, run_arguments: dict
) -> None:
    config = run_arguments | {"max_steps": 4, "per_device_train_batch_size": 2, "eval_strategy": "steps"} | options
    config |= {
        "eval_steps": 2,
        "disable_dropout": False,
    }  # the adapter's dropout tells if more random numbers are drawn
    arguments = {"adapter": adapter, "eval_dataset": tiny.preference_data(4)}
    if adapter == "lora":
        arguments["peft_config"] = lora(lora_dropout=0.2)
    theirs = stock(dense_model, config, **arguments)
    ours = build(CustomDPOTrainer, dense_model, config_class(**config), **arguments)
    assert ours.loss_function is None
    for trainer in (theirs, ours):
        torch.manual_seed(0)
        trainer.train()
    assert logged(ours) == logged(theirs)
    assert_identical(weights(ours), weights(theirs))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("logging_steps", [1, 3])
def test_logged_metrics_equal_trl(
    accumulation: int, logging_steps: int, dense_model: Path, run_arguments: dict
) -> None:
    """Seven steps: with `logging_steps=3` the last one is left for the record at the end of training."""
    options = {"max_steps": 7, "gradient_accumulation_steps": accumulation, "logging_steps": logging_steps}
    config = run_arguments | SGD | options | {"logging_first_step": True}
    theirs, ours = stock(dense_model, config), custom(dense_model, config, "sigmoid")
    theirs.train()
    ours.train()
    assert_same_logs(ours, theirs)
    records = logged(ours)
    assert [record["step"] for record in records] == ([1, 3, 6, 7] if logging_steps == 3 else [*range(1, 8), 7])
    assert all(record.keys() >= TRL_METRICS for record in records[:-1])
    if logging_steps == 3:
        assert records[-1].keys() >= TRL_METRICS
    tokens = [record["num_tokens"] for record in records if "num_tokens" in record]
    assert tokens == sorted(tokens) and tokens[-1] > 100


@pytest.mark.parametrize("batch_size", [2, 3, 4])
@pytest.mark.parametrize("loss_type", ["sigmoid", "sft"])
def test_evaluation_equals_trl(loss_type: str, batch_size: int, dense_model: Path, run_arguments: dict) -> None:
    """Six rows: batches of four leave an uneven last one."""
    config = run_arguments | {"per_device_eval_batch_size": batch_size}
    evaluation = tiny.preference_data(6)
    theirs = stock(dense_model, config | {"loss_type": [loss_type]}, eval_dataset=evaluation)
    ours = custom(dense_model, config, loss_type, eval_dataset=evaluation)
    expected, found = theirs.evaluate(), ours.evaluate()
    assert expected.keys() >= {f"eval_{name}" for name in TRL_METRICS - {"num_tokens"}} | {"eval_loss"}
    assert found.keys() == expected.keys() | {f"eval_{name}" for name in OUR_METRICS}
    assert_same_logs(ours, theirs)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("evaluation", ["several", "passed"])
def test_evaluation_of_several_or_new_data_sets_equals_trl(
    evaluation: str, dense_model: Path, run_arguments: dict
) -> None:
    data = {"easy": tiny.preference_data(3), "hard": tiny.preference_data(5)}
    config = run_arguments | {"per_device_eval_batch_size": 2, "precompute_ref_log_probs": True}
    at_start = data if evaluation == "several" else None
    theirs = stock(dense_model, config, eval_dataset=at_start)
    ours = custom(dense_model, config, "sigmoid", eval_dataset=at_start)
    for trainer in (theirs, ours):
        trainer.evaluate() if at_start else trainer.evaluate(data["hard"], metric_key_prefix="test")
    assert_same_logs(ours, theirs)


def interleaved(dense_model: Path, config: dict, build_trainer: Any, **options: Any) -> DPOTrainer:
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3, "eval_on_start": True}
    trainer = build_trainer(dense_model, config | evaluation, eval_dataset=tiny.preference_data(6), **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("loss_type", ["sigmoid", "sft"])
def test_evaluation_between_steps_does_not_disturb_training(
    loss_type: str, dense_model: Path, run_arguments: dict
) -> None:
    config = run_arguments | SGD | {"max_steps": 6, "gradient_accumulation_steps": 2, "logging_steps": 3}

    def ours(path: Path, config: dict, **options: Any) -> CustomDPOTrainer:
        return custom(path, config, loss_type, **options)

    with_evaluation = interleaved(dense_model, config, ours)
    alone = ours(dense_model, config)
    alone.train()
    assert_identical(weights(with_evaluation), weights(alone))
    records = [record for record in logged(with_evaluation) if "eval_loss" not in record]
    assert records == logged(alone)


def test_evaluation_between_steps_is_logged_as_in_trl(dense_model: Path, run_arguments: dict) -> None:
    config = run_arguments | SGD | {"max_steps": 5, "gradient_accumulation_steps": 2, "logging_steps": 3}
    theirs = interleaved(dense_model, config, stock)
    ours = interleaved(dense_model, config, lambda *args, **options: custom(*args, "sigmoid", **options))
    assert_same_logs(ours, theirs)
    assert [record["step"] for record in logged(ours) if "eval_loss" in record] == [0, 2, 4, 5]


class EvaluatesWithinTheStep(TrainerCallback):
    """Evaluates after each micro-batch that does not end an optimizer step."""

    trainer: DPOTrainer
    times = 0

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.times += 1
        self.trainer.evaluate()


@pytest.mark.parametrize("loss_type", ["sigmoid", "sft"])
def test_evaluation_within_an_accumulation_window_does_not_disturb_it(
    loss_type: str, dense_model: Path, run_arguments: dict
) -> None:
    config = run_arguments | SGD | {"max_steps": 2, "gradient_accumulation_steps": 3, "logging_steps": 2}
    results = []
    for interrupts in (True, False):
        trainer = custom(dense_model, config, loss_type, eval_dataset=tiny.preference_data(3))
        callback = EvaluatesWithinTheStep()
        callback.trainer = trainer
        if interrupts:
            trainer.add_callback(callback)
        trainer.train()
        assert callback.times == (2 if interrupts else 0)  # windows of three and, at the end of the epoch, of one
        results.append((weights(trainer), [record for record in logged(trainer) if "eval_loss" not in record]))
    assert_identical(results[0][0], results[1][0])
    for key, value in results[1][1][0].items():
        assert results[0][1][0][key] == pytest.approx(value), key


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_compute_metrics_sees_the_logits_that_trl_passes(
    adapter: str | None, dense_model: Path, run_arguments: dict
) -> None:
    seen: list[torch.Tensor] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(torch.as_tensor(prediction.predictions))
        return {"largest": float(prediction.predictions.max()), "rows": len(prediction.label_ids)}

    config = run_arguments | {"per_device_eval_batch_size": 2}
    arguments = {"eval_dataset": tiny.preference_data(4), "compute_metrics": compute_metrics, "adapter": adapter}
    theirs = stock(dense_model, config, **arguments)
    ours = custom(dense_model, config, "sigmoid", **arguments)
    expected, found = theirs.evaluate(), ours.evaluate()
    assert found.keys() == expected.keys() | {f"eval_{name}" for name in OUR_METRICS} and found["eval_rows"] == 8
    assert_same_logs(ours, theirs)
    torch.testing.assert_close(seen[1], seen[0])
