"""DPO with auxiliary objectives trains, with each of them at work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from trl_custom_losses import CustomDPOConfig, CustomDPOTrainer, LossConfigError

from .parity import custom, logged, lora, weights

SCORER = f"{__name__}:length_scorer"


def length_scorer(texts: list[str]) -> list[float]:
    return [min(len(text) / 10, 1.0) for text in texts]


def objectives(**consistency: Any) -> dict[str, Any]:
    return {
        "type": "multi_objective_dpo",
        "auxiliary_losses": {"perplexity": {}, "consistency": consistency, "safety": {"scorer": SCORER}},
        "auxiliary_weights": {"perplexity": 0.1, "consistency": 0.05, "safety": 0.2},
    }


def with_dropout(path: Path, dropout: float = 0.3) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attention_dropout=dropout)


def trainer_of(model: Any, run_arguments: dict, loss_function: Any, **arguments: Any) -> CustomDPOTrainer:
    config = CustomDPOConfig(**run_arguments, loss_function=loss_function)
    data = {"train_dataset": tiny.preference_data(), "processing_class": tiny.tokenizer()}
    return CustomDPOTrainer(model, args=config, **data, **arguments)


def assert_total_is_the_weighted_sum(record: dict[str, float]) -> None:
    parts = [name.removesuffix("_loss") for name in record if name.startswith("auxiliary_") and name.endswith("_loss")]
    assert sorted(parts) == ["auxiliary_consistency", "auxiliary_perplexity", "auxiliary_safety"]
    expected = record["main_dpo_loss"] + sum(record[f"{part}_weight"] * record[f"{part}_loss"] for part in parts)
    assert record["total_loss"] == pytest.approx(expected, rel=1e-5)
    assert record["loss"] == pytest.approx(record["total_loss"], rel=1e-3)


def test_all_auxiliaries_train_together(dense_model: Path, run_arguments: dict) -> None:
    config = run_arguments | {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = custom(dense_model, config, objectives(threshold=-1.0), eval_dataset=tiny.preference_data(4))
    start = weights(trainer)
    trainer.train()
    records = [record for record in logged(trainer) if "loss" in record]
    assert len(records) == 2
    for record in records:
        assert_total_is_the_weighted_sum(record)
        assert record["auxiliary_consistency_loss"] > 0 and record["consistency_neighbours"] == pytest.approx(3)
        assert record["auxiliary_safety_loss"] > 0 and 0 < record["unsafe_fraction"] < 1
        assert record["perplexity"] == pytest.approx(math.exp(record["auxiliary_perplexity_loss"]), rel=1e-5)
    assert any((value != start[name]).any() for name, value in weights(trainer).items())
    assert trainer.evaluate()["eval_auxiliary_safety_loss"] > 0


def test_perplexity_of_an_evaluation_is_that_of_all_its_tokens(dense_model: Path, run_arguments: dict) -> None:
    data = tiny.preference_data(5)
    found = []
    for batch_size in (1, 2, 5):
        config = run_arguments | {"per_device_eval_batch_size": batch_size}
        found.append(custom(dense_model, config, "perplexity", eval_dataset=data).evaluate())
    whole = math.exp(found[-1]["eval_loss"])  # one batch
    assert [record["eval_perplexity"] for record in found] == pytest.approx([whole] * 3, rel=1e-4)
    assert found[0]["eval_loss"] != pytest.approx(found[-1]["eval_loss"], rel=1e-3)  # a mean of means


def test_rdrop_trains_with_dropout(dense_model: Path, run_arguments: dict) -> None:
    config = run_arguments | {"max_steps": 2, "disable_dropout": False, "per_device_train_batch_size": 2}
    trainer = trainer_of(
        with_dropout(dense_model), config, objectives(mode="rdrop"), eval_dataset=tiny.preference_data(2)
    )
    start = weights(trainer)
    trainer.train()
    records = [record for record in logged(trainer) if "loss" in record]
    for record in records:
        assert_total_is_the_weighted_sum(record)
        assert record["auxiliary_consistency_loss"] > 0
    assert any((value != start[name]).any() for name, value in weights(trainer).items())
    assert trainer.evaluate()["eval_auxiliary_consistency_loss"] == 0


def test_rdrop_trains_an_adapter_with_dropout(dense_model: Path, run_arguments: dict) -> None:
    config = run_arguments | {"max_steps": 1, "disable_dropout": False, "per_device_train_batch_size": 2}
    trainer = trainer_of(
        with_dropout(dense_model, 0.0),
        config,
        {"type": "consistency", "mode": "rdrop"},
        peft_config=lora(lora_dropout=0.5, init_lora_weights=False),  # which would start at 0
    )
    trainer.train()
    assert logged(trainer)[0]["loss"] > 0


@pytest.mark.parametrize("loss_function", [objectives(mode="rdrop"), {"type": "consistency", "mode": "rdrop"}])
def test_rdrop_refuses_a_model_without_dropout(loss_function: Any, dense_model: Path, run_arguments: dict) -> None:
    with pytest.raises(LossConfigError, match="two forward passes with different dropout, but the model has none"):
        trainer_of(with_dropout(dense_model, 0.0), run_arguments | {"disable_dropout": False}, loss_function)


def test_neighbours_need_more_than_one_pair(dense_model: Path, run_arguments: dict) -> None:
    config = run_arguments | {"per_device_train_batch_size": 1}
    with pytest.raises(LossConfigError, match="compares at least 2 pairs of a micro-batch"):
        trainer_of(with_dropout(dense_model), config, objectives())


@pytest.mark.parametrize("name", ["safe_dpo", "bfpo"])
def test_preference_losses_with_safety_labels_train(name: str, dense_model: Path, run_arguments: dict) -> None:
    data = tiny.preference_data(4).add_column("chosen_unsafe", [0, 0, 1, 1]).add_column("rejected_unsafe", [0, 1, 0, 1])
    config = run_arguments | {"max_steps": 1, "per_device_train_batch_size": 4}
    trainer = custom(dense_model, config, name, train_dataset=data)
    start = weights(trainer)
    trainer.train()
    assert any((value != start[key]).any() for key, value in weights(trainer).items())
    if name == "safe_dpo":
        assert logged(trainer)[0]["swapped_fraction"] == logged(trainer)[0]["dropped_fraction"] == 0.25
