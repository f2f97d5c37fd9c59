"""Whole runs: the same history and the same weights as TRL's, with a loss function and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from trl_custom_losses.trainers import CustomGRPOConfig, CustomGRPOTrainer

from .grpo_parity import (
    assert_logs,
    build,
    build_custom,
    build_pair,
    numbered_prompts,
    rollout,
    tool_rollout,
    weights,
)

# Plain SGD without clipping: a gradient of the wrong scale shows in the weights, where Adam would hide it.
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
SMALL_BATCH = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}

# TRL type -> what makes its run differ from the others.
RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"steps_per_generation": 4, "beta": 0.1, "mask_truncated_completions": True},
    "dapo": {"num_iterations": 2, "off_policy_mask_threshold": 0.5, "temperature": 0.8},
    "bnpo": {"steps_per_generation": 4, "num_iterations": 2, "beta": 0.1, "logging_steps": 3, "max_steps": 5},
    "dr_grpo": {"steps_per_generation": 6, "gradient_accumulation_steps": 3, "use_adaptive_entropy": True},
    "luspo": {"steps_per_generation": 6, "gradient_accumulation_steps": 4, "importance_sampling_level": "sequence"},
    "cispo": {"steps_per_generation": 1, "gradient_accumulation_steps": 4, "epsilon_high": 1.1},
    "sapo": {"num_iterations": 2, "scale_rewards": "none", "entropy_coef": 0.05, "reward_weights": [1.0, 0.3]},
    "vespo": {"steps_per_generation": 4, "beta": 0.1, "top_entropy_quantile": 0.5},
}


def train(trainer: GRPOTrainer, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Run it; returns history and final weights."""
    set_seed(0)  # TRL shuffles generation batches with the global generator
    trainer.train(**options)
    return trainer.state.log_history, weights(trainer)


def assert_equal_runs(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert_logs(found[0], expected[0], tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("loss", RUNS)
def test_run_equals_trl(dense_model: Path, run_arguments: dict, loss: str) -> None:
    config = {**SGD, **SMALL_BATCH, "entropy_target": 3.0, **RUNS[loss]}
    roll = tool_rollout if loss in ("dr_grpo", "vespo") else rollout
    pair = build_pair(dense_model, run_arguments, loss, perturbed=False, trainer={"rollout_func": roll}, **config)
    start = weights(pair.custom)
    stock, custom = train(pair.stock), train(pair.custom)
    assert_equal_runs(custom, stock)
    assert pair.custom.entropy_coef == pytest.approx(pair.stock.entropy_coef)
    moved = max((custom[1][name] - tensor).abs().max().item() for name, tensor in start.items())
    assert moved > 1e-3, "nothing was trained"


@pytest.mark.parametrize("kind", ["lora", "continued"])
def test_run_with_an_adapter_equals_trl(dense_model: Path, run_arguments: dict, kind: str) -> None:
    config = {**SGD, **SMALL_BATCH, "beta": 0.1, "num_iterations": 2}
    pair = build_pair(
        dense_model, run_arguments, "grpo", kind=kind, perturbed=False, trainer={"rollout_func": rollout}, **config
    )
    assert_equal_runs(train(pair.custom), train(pair.stock))


def test_run_of_a_mixture_of_experts_equals_trl(moe_model: Path, run_arguments: dict) -> None:
    config = {**SGD, **SMALL_BATCH, "beta": 0.1, "num_iterations": 2}
    pair = build_pair(moe_model, run_arguments, "dapo", perturbed=False, trainer={"rollout_func": rollout}, **config)
    stock = train(pair.stock)
    assert "aux_loss" in stock[0][0]
    assert_equal_runs(train(pair.custom), stock)


@pytest.mark.parametrize("iterable", [False, True], ids=["map", "iterable"])
@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_run_with_evaluation_equals_trl(dense_model: Path, run_arguments: dict, loss: str, iterable: bool) -> None:
    data = numbered_prompts(12)
    datasets: dict[str, Any] = {"train_dataset": data, "eval_dataset": data.select(range(4))}
    if iterable:
        datasets = {name: dataset.to_iterable_dataset() for name, dataset in datasets.items()}
    config = {**SGD, **SMALL_BATCH, "steps_per_generation": 4, "beta": 0.1, "eval_strategy": "steps", "eval_steps": 2}
    config |= {"num_generations_eval": 4, "per_device_eval_batch_size": 8, "logging_steps": 3}
    trainer = {"rollout_func": rollout, **datasets}
    pair = build_pair(dense_model, run_arguments, loss, perturbed=False, trainer=trainer, **config)
    stock = train(pair.stock)
    assert sum("eval_kl" in entry for entry in stock[0]) == 2
    assert_equal_runs(train(pair.custom), stock)
    stock_metrics, metrics = (trainer.evaluate() for trainer in pair)
    assert_logs([metrics], [stock_metrics])
    assert_logs(pair.custom.state.log_history, pair.stock.state.log_history)


def test_evaluation_does_not_disturb_training(dense_model: Path, run_arguments: dict) -> None:
    """Metrics, entropy controller and accumulation of the training steps are those of a run without evaluation."""
    config = {**SGD, **SMALL_BATCH, "num_iterations": 2, "use_adaptive_entropy": True, "entropy_target": 3.0}

    def roll(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        set_seed(trainer.state.global_step)  # the evaluation's data loader draws from the global generator
        return rollout(prompts, trainer)

    trainer = {"rollout_func": roll, "eval_dataset": numbered_prompts(4), "loss_function": "grpo"}
    plain = build_custom(dense_model, run_arguments, perturbed=False, trainer=trainer, **config)
    evaluated = build_custom(
        dense_model, run_arguments, perturbed=False, trainer=trainer, eval_strategy="steps", eval_steps=1, **config
    )
    expected, (history, found) = train(plain), train(evaluated)
    history = [entry for entry in history if not any(key.startswith("eval_") for key in entry)]
    for entry in (*history, *expected[0]):  # evaluation counts no tokens
        entry.pop("num_tokens", None)
    assert_equal_runs((history, found), expected)
    assert evaluated.entropy_coef == plain.entropy_coef


@pytest.mark.parametrize("config_class", [GRPOConfig, CustomGRPOConfig])
@pytest.mark.parametrize("generated", [True, False], ids=["generated", "rollout"])
def test_without_a_loss_function_the_class_changes_nothing_to_the_last_bit(
    dense_model: Path, run_arguments: dict, config_class: type, generated: bool
) -> None:
    config: dict[str, Any] = {**SMALL_BATCH, "steps_per_generation": 4, "num_iterations": 2, "beta": 0.1}
    config |= {"max_steps": 5, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-2}
    config |= {"per_device_eval_batch_size": 4, "loss_type": "dr_grpo", "entropy_coef": 0.01}
    trainer: dict[str, Any] = {"eval_dataset": numbered_prompts(4)}
    if not generated:
        trainer["rollout_func"] = rollout
    options = {"perturbed": False, "trainer": trainer, **config}
    stock = build(GRPOTrainer, GRPOConfig, dense_model, run_arguments, **options)
    swapped = build(CustomGRPOTrainer, config_class, dense_model, run_arguments, **options)
    expected, found = train(stock), train(swapped)
    assert_logs(found[0], expected[0], tolerance=0)
    assert all(torch.equal(found[1][name], tensor) for name, tensor in expected[1].items())
    evaluations = []
    for each in (swapped, stock):
        set_seed(1)
        evaluations.append(each.evaluate())
    assert_logs(evaluations[:1], evaluations[1:], tolerance=0)


@pytest.mark.parametrize("loss", ["dapo", "vespo"])
def test_resumed_run_equals_the_uninterrupted_one(dense_model: Path, run_arguments: dict, loss: str) -> None:
    config = {**SMALL_BATCH, "num_iterations": 2, "beta": 0.1, "save_strategy": "steps", "save_steps": 2}
    config |= {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_coef_delta": 0.03, "entropy_target": 9.0}
    options = {**config, "perturbed": False, "learning_rate": 1e-2, "trainer": {"rollout_func": rollout}}
    whole = build_custom(dense_model, run_arguments, loss_function=loss, **options)
    expected = train(whole)
    resumed = build_custom(dense_model, run_arguments, loss_function=loss, **options)
    found = train(resumed, resume_from_checkpoint=str(Path(run_arguments["output_dir"]) / "checkpoint-2"))
    assert resumed.entropy_coef == whole.entropy_coef == pytest.approx(0.22)
    assert resumed._last_world_entropy == pytest.approx(whole._last_world_entropy, rel=1e-6)
    steps = [[entry for entry in history if "kl" in entry] for history in (found[0], expected[0])]
    assert_equal_runs((steps[0], found[1]), (steps[1], expected[1]))


@pytest.mark.parametrize(
    "loss",
    [
        "grpo",
        "dapo",
        "dr_grpo",
        "luspo",
        "vespo",
        {
            "type": "composed",
            "components": [
                {"type": "grpo", "weight": 0.5},
                {"type": "dapo", "name": "tokens"},
                {"type": f"{__name__}:likelihood", "weight": 0.1},
            ],
        },
    ],
    ids=lambda loss: loss if isinstance(loss, str) else "composed",
)
@pytest.mark.parametrize("steps", [1, 2], ids=["aligned", "two-steps-a-generation"])
def test_accumulated_micro_batches_equal_the_big_batch(
    dense_model: Path, run_arguments: dict, loss: Any, steps: int
) -> None:
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = build_custom(
            dense_model,
            run_arguments,
            perturbed=False,
            loss_function=loss,
            trainer={"rollout_func": tool_rollout},
            **{**SGD, "max_steps": 4, "beta": 0.2, "num_generations": 4},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=steps * accumulation,
        )
        runs.append(train(trainer))
    big, small = runs
    for name, tensor in big[1].items():
        torch.testing.assert_close(small[1][name], tensor, rtol=1e-5, atol=1e-6)
    for entry, reference in zip(small[0], big[0], strict=True):
        for key in {"loss", "grad_norm", "total_loss", "likelihood_loss", "tokens_loss"} & reference.keys():
            assert entry[key] == pytest.approx(reference[key], rel=1e-4, abs=1e-6), key


def likelihood(batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """An auxiliary term with one value per sequence."""
    return -outputs.mean_logps, {}


likelihood.family, likelihood.surrogate = "policy", False


def test_several_epochs_over_uneven_data_equal_trl(dense_model: Path, run_arguments: dict) -> None:
    """The last step of an epoch may hold fewer micro-batches than the others."""
    data = Dataset.from_list([{"prompt": f"{i}="} for i in range(7)])
    config = {**SGD, **SMALL_BATCH, "gradient_accumulation_steps": 4, "steps_per_generation": 2, "max_steps": -1}
    config |= {"num_train_epochs": 2, "beta": 0.1}
    trainer = {"rollout_func": rollout, "train_dataset": data}
    pair = build_pair(dense_model, run_arguments, "dapo", perturbed=False, trainer=trainer, **config)
    assert_equal_runs(train(pair.custom), train(pair.stock))
