"""A beta that moves, in real runs: logged step by step, still in evaluation, continued exactly."""

from __future__ import annotations

from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from trl_custom_losses import CustomDPOConfig, CustomDPOTrainer, CustomGRPOConfig, CustomGRPOTrainer, LossConfigError

from .parity import perturb, weights

STEPS = 6
SCHEDULE = {"beta": 0.5, "final_beta": 0.05, "warmup_steps": 3}
MARGIN = {"strategy": "margin", "beta": 0.5, "margin_scale": 0.2}
KL = {"strategy": "kl", "beta": 0.5, "target_kl": 0.5, "horizon": 50}


def trainer(model: Path, arguments: dict, loss: dict, **options: Any) -> CustomDPOTrainer:
    options = {"per_device_train_batch_size": 2, "max_steps": STEPS, "learning_rate": 2e-2} | options
    built = CustomDPOTrainer(
        model=tiny.load_model(model),
        args=CustomDPOConfig(**{**arguments, **options}, loss_function={"type": "adaptive_dpo", **loss}),
        train_dataset=tiny.preference_data(),
        eval_dataset=tiny.preference_data(4),
        processing_class=tiny.tokenizer(),
    )
    perturb(built.model)  # or the first margins would all be 0
    return built


def train(*arguments: Any, **options: Any) -> tuple[CustomDPOTrainer, list[dict[str, float]]]:
    """A trained trainer and what it logged at each step."""
    run = trainer(*arguments, **options)
    run.train()
    return run, [record for record in run.state.log_history if "adaptive_beta" in record]


def column(records: list[dict[str, float]], name: str) -> list[float]:
    return [record[name] for record in records]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_schedule_counts_optimizer_steps(accumulation: int, dense_model: Path, run_arguments: dict) -> None:
    _, records = train(dense_model, run_arguments, SCHEDULE, gradient_accumulation_steps=accumulation)
    expected = [0.05, 0.2, 0.35, 0.5, *(0.05 + 0.45 * (1 + cos(pi * t / 3)) / 2 for t in (1, 2))]
    assert column(records, "adaptive_beta") == pytest.approx(expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_beta_follows_the_margin_of_the_whole_step(accumulation: int, dense_model: Path, run_arguments: dict) -> None:
    _, records = train(dense_model, run_arguments, MARGIN, gradient_accumulation_steps=accumulation)
    margins, expected, average = column(records, "adaptive_margin"), [0.5], None
    for margin in margins[:-1]:
        average = margin if average is None else 0.9 * average + 0.1 * margin
        expected.append(max(0.5 * (1 + 0.2 * (margin - average)), 0.001))
    betas = column(records, "adaptive_beta")
    assert betas == pytest.approx(expected) and len({round(beta, 3) for beta in betas}) > 3
    # The rewards have the beta of their step.
    rewards = [beta * margin for beta, margin in zip(betas, margins, strict=True)]
    assert column(records, "rewards/margins") == pytest.approx(rewards, rel=1e-5)


def test_beta_follows_the_margin_at_hand(dense_model: Path, run_arguments: dict) -> None:
    _, records = train(dense_model, run_arguments, MARGIN | {"lag": 0})
    expected, average = [], None
    for margin in column(records, "adaptive_margin"):
        average = margin if average is None else 0.9 * average + 0.1 * margin
        expected.append(max(0.5 * (1 + 0.2 * (margin - average)), 0.001))
    assert column(records, "adaptive_beta") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_beta_is_controlled_by_the_kl_of_the_whole_step(
    accumulation: int, dense_model: Path, run_arguments: dict
) -> None:
    _, records = train(dense_model, run_arguments, KL, gradient_accumulation_steps=accumulation)
    beta, expected = 0.5, []
    for kl in column(records, "adaptive_kl"):
        expected.append(beta)
        beta *= 1 + min(max(kl / 0.5 - 1, -0.2), 0.2) * 4 * accumulation / 50
    assert column(records, "adaptive_beta") == pytest.approx(expected, rel=1e-6)
    assert expected[-1] != pytest.approx(0.5, rel=1e-3)


def test_kl_is_that_of_the_models(dense_model: Path, run_arguments: dict) -> None:
    run = trainer(dense_model, run_arguments, KL, max_steps=1, per_device_train_batch_size=8)
    batch = next(iter(run.get_train_dataloader()))
    ids, scored = batch["input_ids"], batch["completion_mask"][:, 1:]
    with torch.no_grad():
        logps = []
        for model in (run.model, run.ref_model):
            logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
            logps.append(logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1))
        d = logps[0] - logps[1]
        expected = ((torch.exp(-d) - 1 + d) * scored).sum(1).mean().item()
    run.train()
    assert run.state.log_history[0]["adaptive_kl"] == pytest.approx(expected, rel=1e-4) and expected > 0.01


@pytest.mark.parametrize("loss", [SCHEDULE, MARGIN, MARGIN | {"lag": 0}, KL], ids=["schedule", "margin", "lag 0", "kl"])
def test_evaluation_does_not_move_beta(loss: dict, dense_model: Path, run_arguments: dict) -> None:
    quiet, still = train(dense_model, run_arguments, loss)
    evaluated, records = train(dense_model, run_arguments, loss, eval_strategy="steps", eval_steps=1)
    assert column(records, "adaptive_beta") == column(still, "adaptive_beta")
    for name, tensor in weights(quiet).items():
        assert torch.equal(tensor, weights(evaluated)[name])
    in_evaluation = [record["eval_adaptive_beta"] for record in evaluated.state.log_history if "eval_loss" in record]
    if loss.get("lag") != 0:
        assert in_evaluation == pytest.approx(column(records, "adaptive_beta"))


@pytest.mark.parametrize("loss", [SCHEDULE, MARGIN, MARGIN | {"lag": 0}, KL], ids=["schedule", "margin", "lag 0", "kl"])
def test_a_resumed_run_continues_bit_for_bit(loss: dict, dense_model: Path, run_arguments: dict) -> None:
    """From the middle of the warm-up, or of the running mean."""
    saving = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole, expected = train(dense_model, run_arguments, loss, **saving)
    resumed = trainer(dense_model, run_arguments, loss, **saving)
    resumed.train(resume_from_checkpoint=str(Path(run_arguments["output_dir"]) / "checkpoint-2"))
    records = [record for record in resumed.state.log_history if "adaptive_beta" in record]
    for name in ("adaptive_beta", "loss", "grad_norm"):
        assert column(records, name) == column(expected, name)
    for name, value in whole.loss_function.state_dict().items():
        assert torch.equal(resumed.loss_function.state_dict()[name], value)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor)


def test_an_evaluation_before_the_first_step_sees_where_beta_stands(dense_model: Path, run_arguments: dict) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    first, records = train(dense_model, run_arguments, MARGIN, eval_strategy="steps", eval_on_start=True, **saving)
    resumed = trainer(dense_model, run_arguments, MARGIN, eval_strategy="steps", eval_on_start=True)
    resumed.train(resume_from_checkpoint=str(Path(run_arguments["output_dir"]) / "checkpoint-2"))
    for run, step in ((first, 0), (resumed, 2)):
        at_start = [r for r in run.state.log_history if "eval_adaptive_beta" in r and r["step"] == step]
        assert at_start[-1]["eval_adaptive_beta"] == pytest.approx(records[step]["adaptive_beta"])
    assert records[2]["adaptive_beta"] != records[0]["adaptive_beta"]


def test_the_kl_strategy_needs_more_than_precomputed_sums(dense_model: Path, run_arguments: dict) -> None:
    with pytest.raises(LossConfigError, match="'adaptive_dpo' needs per-token reference log-probabilities"):
        trainer(dense_model, run_arguments, KL, precompute_ref_log_probs=True)
    _, records = train(dense_model, run_arguments, MARGIN, precompute_ref_log_probs=True, max_steps=2)
    assert len(records) == 2


def test_as_a_component_and_in_the_rewards(dense_model: Path, run_arguments: dict) -> None:
    run = CustomDPOTrainer(
        model=tiny.load_model(dense_model),
        args=CustomDPOConfig(
            **{**run_arguments, "max_steps": 3, "per_device_train_batch_size": 2},
            loss_function={
                "type": "composed",
                "components": [{"type": "sft", "weight": 0.1}, {"type": "adaptive_dpo", "name": "pref", **SCHEDULE}],
            },
        ),
        train_dataset=tiny.preference_data(),
        processing_class=tiny.tokenizer(),
    )
    perturb(run.model)
    run.train()
    records = run.state.log_history[:3]
    assert column(records, "adaptive_beta") == pytest.approx([0.05, 0.2, 0.35])
    assert {"pref_loss", "pref_weight"} <= records[0].keys()


def test_on_the_pairs_of_a_rollout(dense_model: Path, run_arguments: dict) -> None:
    run = CustomGRPOTrainer(
        model=tiny.load_model(dense_model),
        reward_funcs=tiny.count_reward,
        args=CustomGRPOConfig(
            **{**run_arguments, "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 2e-2},
            num_generations=4,
            gradient_accumulation_steps=2,
            max_completion_length=8,
            loss_function={"type": "composed_dpo_grpo", "dpo": {"type": "adaptive_dpo", **MARGIN}, "grpo": "grpo"},
        ),
        train_dataset=tiny.prompt_data(),
        processing_class=tiny.tokenizer(),
    )
    run.train()
    records = [record for record in run.state.log_history if "adaptive_beta" in record]
    margins, expected, average = column(records, "adaptive_margin"), [0.5], None
    for margin in margins[:-1]:
        average = margin if average is None else 0.9 * average + 0.1 * margin
        expected.append(max(0.5 * (1 + 0.2 * (margin - average)), 0.001))
    assert len(records) == 4 and column(records, "adaptive_beta") == pytest.approx(expected)
    assert margins == pytest.approx(column(records, "pair_margin"), abs=1e-6) and any(margins)
