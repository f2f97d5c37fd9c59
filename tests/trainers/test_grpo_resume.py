"""GRPO resumed: the prompts and the generation batches of a run that was never stopped."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tests import tiny
from trl_custom_losses import CustomGRPOConfig, CustomGRPOTrainer


def grpo(model: Path, arguments: dict, rows: int = 8, **options) -> CustomGRPOTrainer:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "per_device_train_batch_size": 4}
    generating = {"num_generations": 4, "max_completion_length": 6, "loss_function": "grpo"}
    return CustomGRPOTrainer(
        model=tiny.load_model(model, seed=1),
        args=CustomGRPOConfig(**{**arguments, **saving, **generating, **options}),
        train_dataset=tiny.prompt_data(rows),
        reward_funcs=tiny.count_reward,
        processing_class=tiny.tokenizer(),
    )


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"steps_per_generation": 2}])
def test_grpo_resumes_bit_for_bit_between_generation_batches(dense_model, run_arguments, options):
    whole = grpo(dense_model, run_arguments, **options)
    whole.train()
    resumed = grpo(dense_model, run_arguments, **options)
    resumed.train(resume_from_checkpoint=str(Path(run_arguments["output_dir"]) / "checkpoint-2"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("step", [3, 4, 7, 9])
def test_grpo_resumes_bit_for_bit_in_a_later_epoch(dense_model, run_arguments, step):
    """Each epoch has an order of its own."""
    options = {"rows": 3, "max_steps": 11, "learning_rate": 1e-2}
    whole = grpo(dense_model, run_arguments, **options)
    whole.train()
    resumed = grpo(dense_model, run_arguments, **options)
    resumed.train(resume_from_checkpoint=str(Path(run_arguments["output_dir"]) / f"checkpoint-{step}"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("step", [2, 4])
def test_grpo_resumes_after_an_epoch_that_ended_in_a_short_accumulation(dense_model, run_arguments, caplog, step):
    """Three micro-batches make a generation batch and an epoch, two an optimizer step."""
    options = {"rows": 3, "steps_per_generation": 3, "gradient_accumulation_steps": 2, "max_steps": 6}
    whole = grpo(dense_model, run_arguments, **options)
    whole.train()
    resumed = grpo(dense_model, run_arguments, **options)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=Path(run_arguments["output_dir"]) / f"checkpoint-{step}")
    assert "middle of a generation batch" not in caplog.text
    assert resumed._step == whole._step
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_grpo_resumed_within_a_generation_batch_says_so_and_keeps_prompts_in_step(dense_model, run_arguments, caplog):
    seen: list[list[str]] = []

    def noting(prompts: list[str], completions: list[str], **columns) -> list[float]:
        seen.append(prompts)
        return tiny.count_reward(completions)

    options = {"steps_per_generation": 2, "num_iterations": 1}
    whole = grpo(dense_model, run_arguments, **options)
    whole.reward_funcs = [noting]
    whole.train()
    expected, seen[:] = list(seen), []
    resumed = grpo(dense_model, run_arguments, **options)
    resumed.reward_funcs = [noting]
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(Path(run_arguments["output_dir"]) / "checkpoint-1"))
    assert "in the middle of a generation batch" in caplog.text and "are 2 micro-batches" in caplog.text
    assert len(expected) == 2 and seen == expected  # the first batch again, the second as before
