"""Around the objective: stopping on NaN, checkpoints and resuming, callbacks, metrics of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOConfig

from tests import tiny
from trl_custom_losses import CustomDPOTrainer, Metric, NonFiniteLossError, PreferenceLoss

from .parity import assert_identical, assert_same_logs, build, composed, custom, logged, stock, weights

HERE = __name__
RUN = {"max_steps": 3, "per_device_train_batch_size": 2, "optim": "sgd", "lr_scheduler_type": "constant"}
RUN |= {"learning_rate": 0.05}


class Breaks(PreferenceLoss):
    """DPO until its `at`-th call in training, which is multiplied by `factor`."""

    def __init__(self, *, at: int = 0, factor: str = "nan") -> None:
        super().__init__()
        self.at, self.factor, self.calls = at, float(factor), 0

    def forward(self, batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += torch.is_grad_enabled()
        chosen, rejected = outputs.log_ratios.chunk(2)
        value = -F.logsigmoid(0.1 * (chosen - rejected))
        return value * self.factor if self.calls == self.at else value, {}


def after(steps: int, path: Path, config: dict, **arguments: Any) -> dict[str, Tensor]:
    """The weights after a healthy run of `steps` steps."""
    trainer = custom(path, config | {"max_steps": steps}, Breaks(), **arguments)
    trainer.train()
    return weights(trainer)


@pytest.mark.parametrize("factor", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("accumulation", "at"), [(1, 2), (2, 3), (2, 4)])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(
    accumulation: int, at: int, factor: str, dense_model: Path, run_arguments: dict
) -> None:
    """The second step fails, in its only, first or last micro-batch."""
    config = run_arguments | RUN | {"gradient_accumulation_steps": accumulation}
    trainer = custom(dense_model, config, {"type": f"{HERE}:Breaks", "at": at, "factor": factor})
    with pytest.raises(NonFiniteLossError, match=r"(?s)Breaks.*not finite at step 2"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert_identical(weights(trainer), after(1, dense_model, config))


def test_a_component_that_is_not_finite_is_named(dense_model: Path, run_arguments: dict) -> None:
    components = [{"type": "sft"}, {"type": f"{HERE}:Breaks", "name": "culprit", "at": 2}]
    trainer = custom(dense_model, run_arguments | RUN, {"type": "composed", "components": components})
    with pytest.raises(NonFiniteLossError, match="culprit_loss") as caught:
        trainer.train()
    assert "sft_loss" not in str(caught.value)


def test_a_plain_config_stops_too(dense_model: Path, run_arguments: dict) -> None:
    trainer = build(CustomDPOTrainer, dense_model, DPOConfig(**(run_arguments | RUN)), loss_function=Breaks(at=2))
    with pytest.raises(NonFiniteLossError):
        trainer.train()


def test_stopping_can_be_switched_off(dense_model: Path, run_arguments: dict) -> None:
    config = run_arguments | RUN | {"stop_on_nonfinite_loss": False}
    trainer = custom(dense_model, config, Breaks(at=2))
    trainer.train()
    assert trainer.state.global_step == 3
    assert any(p.isnan().any() for p in weights(trainer).values())


def test_training_can_go_on_after_the_stop(dense_model: Path, run_arguments: dict) -> None:
    """The error leaves nothing behind: the same trainer, trained again, does what a new one does."""
    config = run_arguments | RUN | {"gradient_accumulation_steps": 2}
    trainer = custom(dense_model, config, Breaks(at=1))
    with pytest.raises(NonFiniteLossError, match="at step 1"):
        trainer.train()
    trainer.model.zero_grad()
    trainer.train()
    healthy = custom(dense_model, config, Breaks())
    healthy.train()
    assert_identical(weights(trainer), weights(healthy))
    assert trainer.state.log_history[0]["loss"] == healthy.state.log_history[0]["loss"]


@pytest.mark.parametrize("adapter", [None, "lora"])
@pytest.mark.parametrize(
    "loss_function", ["sigmoid", composed(["sigmoid", "sft"], [1.0, 0.5])], ids=["one", "composed"]
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    loss_function: Any, adapter: str | None, dense_model: Path, run_arguments: dict
) -> None:
    """Saved in the middle of the second of four epochs, with a stateful optimizer and schedule."""
    config = run_arguments | {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "learning_rate": 1e-2}
    config |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
    whole = custom(dense_model, config, loss_function, adapter=adapter)
    whole.train()
    checkpoint = Path(config["output_dir"]) / "checkpoint-3"
    assert (checkpoint.parent / "README.md").exists(), "TRL's model card is written with each checkpoint"
    resumed = custom(dense_model, config | {"seed": 1, "data_seed": 0}, loss_function, adapter=adapter)
    assert any(not torch.equal(p, weights(whole)[name]) for name, p in weights(resumed).items())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_identical(weights(resumed), weights(whole))
    # TRL counts tokens from the resumption on, and the mean over the run leaves out the steps before it.
    apart = {"num_tokens", "train_loss"}
    records = [
        [{k: v for k, v in r.items() if k not in apart} for r in logged(trainer)] for trainer in (resumed, whole)
    ]
    assert records[0] == records[1]


def test_a_resumed_run_logs_what_trl_logs(dense_model: Path, run_arguments: dict) -> None:
    config = run_arguments | RUN | {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "logging_steps": 2}
    trainers = []
    for make in (stock, lambda path, config: custom(path, config, "sigmoid")):
        make(dense_model, config).train()
        trainer = make(dense_model, config)
        trainer.train(resume_from_checkpoint=str(Path(config["output_dir"]) / "checkpoint-4"))
        trainers.append(trainer)
    theirs, ours = trainers
    assert_same_logs(ours, theirs)


def test_the_best_model_is_chosen_and_training_stops_by_metrics_of_the_loss(
    dense_model: Path, run_arguments: dict
) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/margins"}
    config = run_arguments | RUN | options | {"greater_is_better": True}
    trainer = custom(dense_model, config, "sigmoid", eval_dataset=tiny.preference_data(4))
    trainer.train()
    margins = [record["eval_rewards/margins"] for record in trainer.state.log_history if "eval_loss" in record]
    assert trainer.state.best_metric == max(margins) and len(margins) == 3


class KeepsLogs(TrainerCallback):
    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.records.append(dict(logs))


class Reports(PreferenceLoss):
    """SFT that reports a metric of each kind."""

    reduction = "token_mean"

    def forward(self, batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Any]]:
        per_token = -outputs.per_token_logps[: batch.num_pairs]
        lengths = batch.mask[: batch.num_pairs].sum(1).float()
        return per_token, {
            "token": per_token.detach(),
            "row": lengths,
            "scalar": lengths.mean(),
            "longest": Metric(lengths, reduce="max"),
            "shortest": Metric(lengths, reduce="min"),
            "batch": Metric(lengths, per="micro_batch"),
        }


def test_metrics_of_a_loss_are_averaged_as_they_declare(dense_model: Path, run_arguments: dict) -> None:
    """Seven rows in batches of two: the last batch counts as one row, half of the others, in sums over rows."""
    config = run_arguments | {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    callback = KeepsLogs()
    config |= {"per_device_eval_batch_size": 2}
    data, evaluation = tiny.preference_data(7), tiny.preference_data(5)
    arguments = {"train_dataset": data, "eval_dataset": evaluation, "callbacks": [callback]}
    trainer = custom(dense_model, config, Reports(), **arguments)
    batches = [batch["completion_mask"].sum(1).float().chunk(2)[0] for batch in trainer.get_train_dataloader()]
    trainer.train()
    found = callback.records[0]
    rows = torch.cat(batches)
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    assert found["row"] == pytest.approx(rows.mean().item())
    assert found["scalar"] == found["batch"] == pytest.approx(sum(batch.mean().item() for batch in batches) / 4)
    assert found["longest"] == pytest.approx(sum(batch.max().item() for batch in batches) / 4)
    assert found["shortest"] == pytest.approx(sum(batch.min().item() for batch in batches) / 4)
    assert found["token"] == pytest.approx(found["loss"], rel=1e-5)  # the loss is the mean over all tokens
    results = trainer.evaluate()
    lengths = [len(ids) + 1 for ids in trainer.processing_class(evaluation["chosen"][:])["input_ids"]]  # and the end
    assert results["eval_row"] == pytest.approx(sum(lengths) / 5)
    assert "eval_token" in callback.records[-1] and "token" not in callback.records[-1]


def test_a_metric_that_is_no_tensor_says_so(dense_model: Path, run_arguments: dict) -> None:
    def wrong(batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Any]]:
        return outputs.logps, {"name": "text"}

    with pytest.raises(TypeError, match=r"'wrong'.*metric 'name'"):
        custom(dense_model, run_arguments | {"max_steps": 1}, wrong).train()


@pytest.mark.parametrize("shape", ["wrong rows", "wrong positions", "three dimensions", "no tensor"])
def test_a_loss_of_a_wrong_shape_says_so(shape: str, dense_model: Path, run_arguments: dict) -> None:
    def wrong(batch: Any, outputs: Any) -> tuple[Any, dict[str, Any]]:
        logps = outputs.per_token_logps
        values = {"wrong rows": logps.sum(1)[:-1], "wrong positions": logps[:, :-1], "three dimensions": logps[None]}
        return values.get(shape, 1.0), {}

    with pytest.raises((TypeError, ValueError), match="loss"):
        custom(dense_model, run_arguments | {"max_steps": 1}, wrong).train()
