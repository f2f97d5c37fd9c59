"""Data-set columns that a loss declares reach it, row by row, and never the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tests import tiny
from trl_custom_losses import PreferenceLoss

from .parity import assert_same_tensors, custom, logged, measure, weights

MODEL_ARGUMENTS = {"input_ids", "attention_mask", "labels", "use_cache", "fused_lm_head"}


class Weighted(PreferenceLoss):
    """DPO weighted by a column; keeps what it saw."""

    columns = ("weight", "label")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, list[str], Tensor]] = []

    def forward(self, batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append((batch.columns["weight"], batch["label"], batch.input_ids))
        chosen, rejected = outputs.log_ratios.chunk(2)
        return batch["weight"] * -F.logsigmoid(0.1 * (chosen - rejected)), {}


def as_stream(data: Dataset) -> IterableDataset:
    """A stream that knows its column names."""
    return data.to_iterable_dataset()


def as_generator(data: Dataset) -> IterableDataset:
    """A stream that does not know its column names before its first example."""

    def examples() -> Iterator[dict[str, Any]]:
        yield from data

    return IterableDataset.from_generator(examples)


def unchanged(data: Dataset) -> Dataset:
    return data


def spy_on(model: nn.Module) -> set[str]:
    """The names of all keyword arguments that `model` is called with from now on."""
    names: set[str] = set()
    model.register_forward_pre_hook(lambda module, args, kwargs: names.update(kwargs), with_kwargs=True)
    return names


def assert_saw_its_rows(loss: Weighted, trainer: DPOTrainer, times: int, batch_size: int) -> None:
    """Each batch brought weight and label of the row whose prompt it holds."""
    data = tiny.preference_data()
    row_of = {row["prompt"].replace(" ", ""): index for index, row in enumerate(data)}
    assert len(loss.seen) == times
    for weight, label, input_ids in loss.seen:
        assert isinstance(weight, Tensor) and weight.shape == (batch_size,) and weight.dtype == torch.float32
        assert isinstance(label, list) and len(label) == batch_size
        texts = trainer.processing_class.batch_decode(input_ids[:batch_size])
        rows = [row_of[text.replace(" ", "").split("?")[0] + "?"] for text in texts]
        assert label == [f"row {row}" for row in rows]
        assert weight.tolist() == [0.5 + row for row in rows]


@pytest.mark.parametrize("remove_unused_columns", [True, False])
@pytest.mark.parametrize("kind", [unchanged, as_stream, as_generator])
def test_columns_reach_the_loss_in_training_and_evaluation(
    kind: Callable[[Dataset], Any], remove_unused_columns: bool, dense_model: Path, run_arguments: dict
) -> None:
    loss = Weighted()
    config = run_arguments | {"remove_unused_columns": remove_unused_columns, "max_steps": 2}
    config |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2}
    evaluation = kind(tiny.preference_data(4))
    trainer = custom(dense_model, config, loss, train_dataset=kind(tiny.preference_data()), eval_dataset=evaluation)
    trainer.train()
    assert_saw_its_rows(loss, trainer, times=4, batch_size=2)
    loss.seen.clear()
    assert trainer.evaluate()["eval_loss"] > 0
    assert_saw_its_rows(loss, trainer, times=2, batch_size=2)
    assert [label for _, labels, _ in loss.seen for label in labels] == [f"row {i}" for i in range(4)]


def test_models_are_not_called_with_columns(dense_model: Path, run_arguments: dict) -> None:
    trainer = custom(dense_model, run_arguments | {"max_steps": 1}, Weighted(), compute_metrics=lambda _: {})
    policy, reference = spy_on(trainer.model), spy_on(trainer.ref_model)
    trainer.train()
    trainer.evaluate(tiny.preference_data(2))
    assert policy == reference == MODEL_ARGUMENTS


def test_columns_and_precomputed_references_go_together(dense_model: Path, run_arguments: dict) -> None:
    runs = []
    for precompute in (True, False):
        loss = Weighted()
        config = run_arguments | {"precompute_ref_log_probs": precompute, "per_device_train_batch_size": 4}
        trainer = custom(dense_model, config, loss)
        names = spy_on(trainer.model)
        trainer.evaluate(tiny.preference_data(4))  # precomputes for its new data, with their columns
        assert names == MODEL_ARGUMENTS
        loss.seen.clear()
        runs.append(measure(trainer))
        assert_saw_its_rows(loss, trainer, times=1, batch_size=4)
    torch.testing.assert_close(runs[0].loss, runs[1].loss)
    assert_same_tensors(runs[0].gradients, runs[1].gradients)


def test_a_column_weight_acts_on_the_objective(dense_model: Path, run_arguments: dict) -> None:
    """Weights of 2 double the gradient of DPO."""

    def doubled(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "weight": 2.0}

    found = measure(custom(dense_model, run_arguments, Weighted(), train_dataset=tiny.preference_data().map(doubled)))
    plain = measure(custom(dense_model, run_arguments, "sigmoid"))
    torch.testing.assert_close(found.loss, 2 * plain.loss)
    assert_same_tensors(found.gradients, {name: 2 * gradient for name, gradient in plain.gradients.items()})


def test_columns_are_added_to_what_ones_own_collator_makes(dense_model: Path, run_arguments: dict) -> None:
    class Collator(DataCollatorForPreference):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            assert all(example.keys() >= {"weight", "label"} for example in examples)
            return super().torch_call(examples)

    loss = Weighted()
    config = run_arguments | {"per_device_train_batch_size": 2, "max_steps": 1}
    trainer = custom(dense_model, config, loss, data_collator=Collator(pad_token_id=0))
    trainer.train()
    assert_saw_its_rows(loss, trainer, times=1, batch_size=2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3, 4], torch.tensor([1, 2, 3, 4])),
        ([True, False, True, False], torch.tensor([True, False, True, False])),
        ([0.5, 1.0, 2.0, 4.0], torch.tensor([0.5, 1.0, 2.0, 4.0])),
        ([[1], [2, 3], [], [4]], [[1], [2, 3], [], [4]]),
        (["a", "b", "c", "d"], ["a", "b", "c", "d"]),
    ],
    ids=["int", "bool", "float", "list", "text"],
)
def test_numbers_become_a_tensor_and_the_rest_a_list(
    values: list, expected: Any, dense_model: Path, run_arguments: dict
) -> None:
    seen: list[Any] = []

    class Reads(PreferenceLoss):
        columns = ("value", "prompt")

        def forward(self, batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
            seen.append((batch["value"], batch["prompt"]))
            return outputs.logps, {}

    data = tiny.preference_data(4).add_column("value", values)
    trainer = custom(dense_model, run_arguments, Reads(), train_dataset=data, eval_dataset=data)
    trainer.evaluate()
    [(found, prompts)] = seen
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected) and found.dtype == expected.dtype
    else:
        assert found == expected
    assert prompts == data["prompt"][:]  # a column that TRL reads too


def test_components_of_a_composition_get_their_columns(dense_model: Path, run_arguments: dict) -> None:
    components = [{"type": f"{__name__}:Weighted", "weight": 0.5}, {"type": "sft"}]
    config = run_arguments | {"max_steps": 1, "per_device_train_batch_size": 4}
    trainer = custom(dense_model, config, {"type": "composed", "components": components})
    start = weights(trainer)
    trainer.train()
    assert any((p != start[name]).any() for name, p in weights(trainer).items())
    assert {"Weighted_loss", "sft_loss"} <= logged(trainer)[0].keys()
    assert_saw_its_rows(trainer.loss_function.leaves()[0], trainer, times=1, batch_size=4)
