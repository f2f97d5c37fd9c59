"""Columns that a loss can have made are filled by its scorer, once, before training."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch import Tensor

from tests import tiny
from trl_custom_losses import CustomDPOConfig, CustomDPOTrainer, LossConfigError, LossFunctionRegistry, PreferenceLoss
from trl_custom_losses.trainers.column_scores import fill_columns

from .parity import custom, logged, weights

SEEN: list[str] = []


def length_scorer(texts: list[str]) -> list[float]:
    SEEN.extend(texts)
    return [min(len(text) / 10, 1.0) for text in texts]


def too_few(texts: list[str]) -> list[float]:
    return [0.5] * (len(texts) - 1)


def too_large(texts: list[str]) -> list[float]:
    return [1.5] * len(texts)


def not_numbers(texts: list[str]) -> list[Any]:
    return ["unsafe"] * len(texts)


def truths(texts: list[str]) -> list[Any]:
    return [True] * len(texts)


def undefined(texts: list[str]) -> list[float]:
    return [float("nan")] * len(texts)


def one_number(texts: list[str]) -> Any:
    return 0.5


def array(texts: list[str]) -> Any:
    return np.full(len(texts), 0.25, dtype=np.float32)


def tensor(texts: list[str]) -> Any:
    return torch.full((len(texts),), 0.25)


def numpy_numbers(texts: list[str]) -> list[Any]:
    return [np.float32(0.25)] * len(texts)


@pytest.fixture(autouse=True)
def seen() -> list[str]:
    SEEN.clear()
    return SEEN


def safety(scorer: Callable[..., Any] | None = length_scorer) -> dict[str, Any]:
    return {"type": "safety"} | ({} if scorer is None else {"scorer": f"{__name__}:{scorer.__name__}"})


def filled(dataset: Any, scorer: Callable[..., Any] | None = length_scorer) -> Any:
    """The data set with the columns of `safety`."""
    return fill_columns(LossFunctionRegistry.build(safety(scorer)), dataset, "train_dataset")


def expected_scores(texts: list[str]) -> list[float]:
    return pytest.approx([min(len(text) / 10, 1.0) for text in texts])


# Training


class Reads(PreferenceLoss):
    """Keeps the labels it saw."""

    columns = ("chosen_unsafe", "rejected_unsafe")
    column_scorers = {column: (column[:-7], f"{__name__}:length_scorer") for column in columns}

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[list[float], list[float]]] = []

    def forward(self, batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append((batch["chosen_unsafe"].tolist(), batch["rejected_unsafe"].tolist()))
        return outputs.logps, {}


def as_stream(data: Dataset) -> IterableDataset:
    return data.to_iterable_dataset()


def as_generator(data: Dataset) -> IterableDataset:
    def examples() -> Iterator[dict[str, Any]]:
        yield from data

    return IterableDataset.from_generator(examples)


def unchanged(data: Dataset) -> Dataset:
    return data


@pytest.mark.parametrize("kind", [unchanged, as_stream, as_generator])
def test_scores_reach_the_loss_in_training_and_evaluation(
    kind: Callable[[Dataset], Any], dense_model: Path, run_arguments: dict
) -> None:
    loss, data = Reads(), tiny.preference_data(4)
    config = run_arguments | {"max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4}
    evaluation = {"first": kind(tiny.preference_data(4)), "second": kind(tiny.preference_data(4))}
    trainer = custom(dense_model, config, loss, train_dataset=kind(data), eval_dataset=evaluation)
    trainer.train()
    chosen, rejected = zip(*loss.seen, strict=True)
    for labels, texts in ((chosen, data["chosen"]), (rejected, data["rejected"])):
        assert sorted(itertools.chain(*labels)) == expected_scores(sorted(texts, key=len))
    loss.seen.clear()
    trainer.evaluate()
    assert len(loss.seen) == 2
    for chosen_labels, rejected_labels in loss.seen:
        assert chosen_labels == expected_scores(data["chosen"])
        assert rejected_labels == expected_scores(data["rejected"])


def test_a_map_style_data_set_is_scored_once(dense_model: Path, run_arguments: dict, seen: list[str]) -> None:
    data = tiny.preference_data(4)
    config = run_arguments | {"max_steps": 4, "per_device_train_batch_size": 2}
    trainer = custom(dense_model, config, safety(), train_dataset=data)
    assert sorted(seen) == sorted([*data["chosen"], *data["rejected"]])
    seen.clear()
    start = weights(trainer)
    trainer.train()
    assert not seen
    assert all(record["unsafe_fraction"] > 0 for record in logged(trainer) if "loss" in record)
    assert any((value != start[name]).any() for name, value in weights(trainer).items())


def test_data_given_to_evaluate_are_scored_too(dense_model: Path, run_arguments: dict) -> None:
    loss, data = Reads(), tiny.preference_data(3)
    trainer = custom(dense_model, run_arguments, loss)
    trainer.evaluate(data)
    assert [label for labels, _ in loss.seen for label in labels] == expected_scores(data["chosen"])
    loss.seen.clear()
    trainer.evaluate({"other": data})
    assert [label for _, labels in loss.seen for label in labels] == expected_scores(data["rejected"])


def test_safety_lowers_the_unsafe_completions_alone(dense_model: Path, run_arguments: dict) -> None:
    data = tiny.preference_data(2).add_column("chosen_unsafe", [0.0, 0.0]).add_column("rejected_unsafe", [1.0, 1.0])
    config = run_arguments | {"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 5e-3}
    trainer = custom(dense_model, config | {"lr_scheduler_type": "constant"}, safety(None), train_dataset=data)
    trainer.train()
    records = [record for record in logged(trainer) if "loss" in record]
    assert records[-1]["logps/rejected"] < records[0]["logps/rejected"] - 1
    assert records[-1]["loss"] < records[0]["loss"]


# Texts


def _conversation(prompt: str, *answers: str) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": prompt}]
    for answer in answers:
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "go on"}]
    return messages[:-1]


def test_completions_are_scored_without_their_prompts(seen: list[str]) -> None:
    data = Dataset.from_list([{"prompt": "say?", "chosen": " yes", "rejected": " never ever"}])
    scored = filled(data)
    assert (scored["chosen_unsafe"][:], scored["rejected_unsafe"][:]) == ([0.4], [1.0])
    assert seen == [" yes", " never ever"]


def test_a_prompt_inside_of_the_completions_is_left_out(seen: list[str]) -> None:
    filled(Dataset.from_list([{"chosen": "say? yes", "rejected": "say? no"}]))
    assert seen == [" yes", " no"]


def test_of_a_conversation_the_assistants_turns_are_scored(seen: list[str]) -> None:
    prompt = [{"role": "user", "content": "say?"}]
    rows = {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [
            {"role": "assistant", "content": "no"},
            {"role": "user", "content": "why?"},
            {"role": "assistant", "content": "so"},
        ],
    }
    filled(Dataset.from_list([rows]))
    assert seen == ["yes", "no\nso"]


def test_a_prompt_inside_of_conversations_is_left_out(seen: list[str]) -> None:
    row = {"chosen": _conversation("say?", "before", "yes"), "rejected": _conversation("say?", "before", "no")}
    filled(Dataset.from_list([row]))
    assert seen == ["yes", "no"]


def test_text_parts_of_a_message_are_scored(seen: list[str]) -> None:
    def answer(text: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": [{"type": "text", "text": text}, {"type": "text", "text": "!"}]}]

    filled(Dataset.from_list([{"prompt": "?", "chosen": answer("yes"), "rejected": answer("no")}]))
    assert seen == ["yes!", "no!"]


def test_a_message_without_content_is_an_empty_text(seen: list[str]) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    filled(Dataset.from_list([{"prompt": "?", "chosen": [call], "rejected": [call]}]))
    assert seen == ["", ""]


# What is there already


def test_columns_that_are_there_stay(seen: list[str]) -> None:
    data = tiny.preference_data(3).add_column("chosen_unsafe", [0.1, 0.2, 0.3])
    scored = filled(data)
    assert scored["chosen_unsafe"][:] == [0.1, 0.2, 0.3]
    assert scored["rejected_unsafe"][:] == expected_scores(data["rejected"])
    assert seen == data["rejected"][:]
    assert filled(scored) is scored
    assert scored.column_names == [*data.column_names, "rejected_unsafe"]


def test_losses_without_a_scorer_leave_data_sets_alone() -> None:
    data = tiny.preference_data(2)
    assert filled(data, scorer=None) is data
    assert filled(None) is None


def test_several_data_sets_are_filled_one_by_one() -> None:
    scored = filled(DatasetDict(a=tiny.preference_data(2), b=tiny.preference_data(3)))
    assert {name: len(part["chosen_unsafe"]) for name, part in scored.items()} == {"a": 2, "b": 3}


def test_scores_are_cached_until_the_scorer_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewriting the scorer's module scores anew; only loading the data set again does not."""
    tiny.preference_data(2).save_to_disk(str(tmp_path / "data"))
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for code in ("0.25", "0.25", "0.75"):
        (tmp_path / "changing_scorer.py").write_text(
            f"CALLS = []\ndef score(texts):\n    CALLS.append(1)\n    return [{code}] * len(texts)\n"
        )
        importlib.invalidate_caches()
        module = importlib.reload(importlib.import_module("changing_scorer"))
        loss = LossFunctionRegistry.build({"type": "safety", "scorer": "changing_scorer:score"})
        scored = fill_columns(loss, Dataset.load_from_disk(str(tmp_path / "data")), "train_dataset")
        found.append((scored["chosen_unsafe"][0], bool(module.CALLS)))
    assert found == [(0.25, True), (0.25, False), (0.75, True)]


# Mistakes


@pytest.mark.parametrize("scorer", [array, tensor, numpy_numbers])
def test_scores_may_be_arrays(scorer: Callable[..., Any]) -> None:
    assert filled(tiny.preference_data(2), scorer)["chosen_unsafe"][:] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (too_few, "too_few' returns one number a text, 4 here; found 3 of them"),
        (one_number, "one_number' returns one number a text, 4 here; found 0.5"),
        (too_large, "too_large' returns numbers from 0 to 1, found 1.5 .*for the text"),
        (not_numbers, r"not_numbers' returns numbers from 0 to 1, found 'unsafe' \(str\)"),
        (truths, "truths' returns numbers from 0 to 1, found True"),
        (undefined, "undefined' returns numbers from 0 to 1, found nan"),
    ],
)
def test_a_scorer_that_returns_something_else_is_refused(
    scorer: Callable[..., Any], message: str, run_arguments: dict
) -> None:
    config = CustomDPOConfig(**run_arguments, loss_function=safety(scorer))
    with pytest.raises(LossConfigError, match=message):
        CustomDPOTrainer("/nonexistent", args=config, train_dataset=tiny.preference_data(4))


def test_neither_columns_nor_scorer_is_refused(run_arguments: dict) -> None:
    auxiliary = {"type": "multi_objective_dpo", "auxiliary_losses": ["safety"]}
    message = "needs the column 'chosen_unsafe', which `train_dataset` lacks.*a `scorer` of the loss could fill it"
    for loss in (safety(None), auxiliary):
        config = CustomDPOConfig(**run_arguments, loss_function=loss)
        with pytest.raises(LossConfigError, match=message):
            CustomDPOTrainer("/nonexistent", args=config, train_dataset=tiny.preference_data(2))


def test_a_scorer_that_cannot_be_imported_is_refused_by_the_config(run_arguments: dict) -> None:
    loss = {"type": "multi_objective_dpo", "auxiliary_losses": {"safety": {"scorer": "no_such_module:score"}}}
    with pytest.raises(LossConfigError, match="could not import 'no_such_module'"):
        CustomDPOConfig(**run_arguments, loss_function=loss)


def test_texts_that_are_missing_are_named(run_arguments: dict) -> None:
    data = tiny.preference_data(2).remove_columns("rejected")
    with pytest.raises(LossConfigError, match="from the column 'rejected', which `train_dataset` lacks; it has prompt"):
        filled(data)


def test_a_column_of_numbers_is_not_scored() -> None:
    data = Dataset.from_list([{"prompt": "a", "chosen": 3, "rejected": 4}])
    with pytest.raises(LossConfigError, match="holds texts or lists of messages, found 3"):
        filled(data)


def test_other_data_sets_are_refused() -> None:
    with pytest.raises(LossConfigError, match="`train_dataset` is a list: add them to it"):
        filled([{"prompt": "a", "chosen": "b", "rejected": "c"}])
