"""Accumulated micro-batches give the gradient of the one big batch, whatever their lengths and numbers of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from trl_custom_losses import PreferenceLoss
from trl_custom_losses.reductions import FixedLengthMean

from .parity import assert_same_tensors, composed, custom, first_batch, logged, measure, ragged_data, stock


class PerToken(PreferenceLoss):
    """A value per token of all completions, in nats, reduced as asked."""

    def __init__(self, *, reduction: Any, rows: str = "all") -> None:
        super().__init__()
        self.reduction = reduction
        self.rows = rows

    def forward(self, batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        count = batch.num_pairs if self.rows == "chosen" else 2 * batch.num_pairs
        value = outputs.per_token_logps[:count] ** 2
        return value, {"per_token": value.detach(), "per_row": outputs.lengths[:count].float()}


class Scalar(PreferenceLoss):
    """The mean over the micro-batch, taken by the loss itself."""

    def forward(self, batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = outputs.log_ratios.chunk(2)
        return -F.logsigmoid(chosen - rejected).mean(), {}


# Names a loss that does not see the pairs of a micro-batch together; a callable makes a new one for each run.
LOSSES = {
    "sigmoid": "sigmoid",
    "sft": "sft",
    "ipo": "ipo",
    "composed": composed(["sigmoid", "sft"], [0.7, 1.5]),
    "nested": {
        "type": "composed",
        "components": [{"name": "inner", **composed(["sft", "hinge"], [2.0, 0.5])}, {"type": "sigmoid", "weight": 3.0}],
    },
    "tokens of all completions": lambda: PerToken(reduction="token_mean"),
    "tokens of chosen completions": lambda: PerToken(reduction="token_mean", rows="chosen"),
    "mean of means": lambda: PerToken(reduction="sequence_mean"),
    "mean of sums": lambda: PerToken(reduction="sequence_sum", rows="chosen"),
    "fixed length": lambda: PerToken(reduction=FixedLengthMean(16)),
}


class KeepsGradients(TrainerCallback):
    """Copies the gradient of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def run(
    path: Path, config: dict, loss: Any, rows: int, batch_size: int, accumulation: int, **options: Any
) -> tuple[list[dict[str, Tensor]], dict[str, float]]:
    """The gradient of each optimizer step, the weights standing still, and the first record that was logged."""
    config = config | {"learning_rate": 0.0, "max_grad_norm": 0.0, "num_train_epochs": 1} | options
    config |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    kept = KeepsGradients()
    arguments = {"train_dataset": ragged_data(rows), "callbacks": [kept]}
    if loss is None:
        trainer = stock(path, config, **arguments)
    else:
        trainer = custom(path, config, loss() if callable(loss) else loss, **arguments)
    trainer.train()
    return kept.steps, logged(trainer)[0]


@pytest.mark.parametrize("rows", [8, 7])
@pytest.mark.parametrize("loss", LOSSES)
def test_four_micro_batches_give_the_gradient_of_one_batch(
    loss: str, rows: int, dense_model: Path, run_arguments: dict
) -> None:
    """Seven rows in batches of two: the last micro-batch has one."""
    expected, big = run(dense_model, run_arguments, LOSSES[loss], rows, batch_size=8, accumulation=1)
    found, accumulated = run(dense_model, run_arguments, LOSSES[loss], rows, batch_size=2, accumulation=4)
    assert len(found) == len(expected) == 1
    assert_same_tensors(found[0], expected[0])
    # What averages over sequences or tokens is logged as for the big batch too.
    exact = {"loss", "grad_norm", "num_tokens", "per_token", "per_row"}
    exact |= {name for name in big if name.endswith(("_loss", "_weight"))}
    for name in exact & big.keys():
        assert accumulated[name] == pytest.approx(big[name], rel=1e-5), name
    if loss in ("composed", "nested"):
        assert {"sft_loss", "sigmoid_loss", "total_loss"} <= exact


@pytest.mark.parametrize("loss", ["sigmoid", "sft", "composed"])
def test_a_shorter_last_window_gives_the_gradient_of_its_rows(
    loss: str, dense_model: Path, run_arguments: dict
) -> None:
    """Seven rows in windows of three batches of two: the epoch's second step has one row; two epochs."""
    expected, _ = run(dense_model, run_arguments, LOSSES[loss], 7, batch_size=6, accumulation=1, num_train_epochs=2)
    found, _ = run(dense_model, run_arguments, LOSSES[loss], 7, batch_size=2, accumulation=3, num_train_epochs=2)
    assert len(found) == len(expected) == 4
    for step, gradient in enumerate(expected):
        assert_same_tensors(found[step], gradient)


def test_a_batch_outside_the_training_loop_counts_as_itself(dense_model: Path, run_arguments: dict) -> None:
    """What the last optimizer step counted does not reach a loss that is computed after it."""
    config = run_arguments | {"learning_rate": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    trainer = custom(dense_model, config | {"gradient_accumulation_steps": 4}, "sft", train_dataset=ragged_data(7))
    batch = first_batch(trainer)
    before = measure(trainer, batch)
    trainer.train()
    after = measure(trainer, batch)
    torch.testing.assert_close(after.loss, before.loss)
    assert_same_tensors(after.gradients, before.gradients)


def test_a_scalar_loss_is_averaged_over_equal_micro_batches(dense_model: Path, run_arguments: dict) -> None:
    expected, _ = run(dense_model, run_arguments, Scalar, 8, batch_size=8, accumulation=1)
    found, _ = run(dense_model, run_arguments, Scalar, 8, batch_size=2, accumulation=4)
    assert_same_tensors(found[0], expected[0])


@pytest.mark.parametrize("options", [{"ld_alpha": 0.5}, {"use_weighting": True}, {"precompute_ref_log_probs": True}])
def test_modifiers_keep_the_gradient_of_one_batch(options: dict, dense_model: Path, run_arguments: dict) -> None:
    expected, _ = run(dense_model, run_arguments, "sigmoid", 7, batch_size=8, accumulation=1, **options)
    found, _ = run(dense_model, run_arguments, "sigmoid", 7, batch_size=2, accumulation=4, **options)
    assert_same_tensors(found[0], expected[0])


@pytest.mark.parametrize(("loss_type", "rows"), [("sft", 8), ("sigmoid", 7)])
def test_in_trl_the_gradient_depends_on_the_split(
    loss_type: str, rows: int, dense_model: Path, run_arguments: dict
) -> None:
    """Why the custom trainer differs from TRL with accumulation: TRL averages each micro-batch's mean."""
    big, _ = run(dense_model, run_arguments, None, rows, batch_size=8, accumulation=1, loss_type=[loss_type])
    split, _ = run(dense_model, run_arguments, None, rows, batch_size=2, accumulation=4, loss_type=[loss_type])
    largest = max(tensor.abs().max() for tensor in big[0].values())
    assert max((split[0][name] - tensor).abs().max() for name, tensor in big[0].items()) > 0.02 * largest
