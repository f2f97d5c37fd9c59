"""One micro-batch: loss, gradients and log of every TRL type, and of every option around it, equal TRL's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from . import grpo_parity as harness
from .grpo_parity import TYPES, assert_parity, build_pair, make_inputs

# What TRL logs for each type besides `entropy`.
CLIPPED = {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
CLIPPED |= {"clip_ratio/low_min", "clip_ratio/high_max"}
KEYS = dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo", "luspo"), CLIPPED)
KEYS |= {"cispo": {"cispo_clip_ratio"}, "sapo": set(), "vespo": {"vespo/phi_seq_mean"}}


@pytest.mark.parametrize("loss", TYPES)
@pytest.mark.parametrize("advantages", ["sequence", "token"])
def test_loss_gradients_and_log_equal_trl_off_policy(
    dense_model: Path, run_arguments: dict, loss: str, advantages: str
) -> None:
    pair = build_pair(dense_model, run_arguments, loss)
    metrics = assert_parity(pair, make_inputs(pair.stock, advantages=advantages))
    assert KEYS[loss] | {"entropy"} <= metrics.keys()
    if loss in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):  # else the test would not see the clipping
        assert metrics["clip_ratio/low_mean"] > 0
        assert metrics["clip_ratio/high_mean"] > 0


@pytest.mark.parametrize("loss", TYPES)
@pytest.mark.parametrize("advantages", ["sequence", "token"])
def test_loss_gradients_and_log_equal_trl_when_generation_is_aligned(
    dense_model: Path, run_arguments: dict, loss: str, advantages: str
) -> None:
    pair = build_pair(dense_model, run_arguments, loss, beta=0.2)
    metrics = assert_parity(pair, make_inputs(pair.stock, advantages=advantages, old=False))
    assert metrics["kl"] > 0


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "luspo", "cispo", "vespo"])
def test_loss_and_gradients_equal_trl_with_an_adapter(dense_model: Path, run_arguments: dict, loss: str) -> None:
    pair = build_pair(dense_model, run_arguments, loss, kind="lora", beta=0.2)
    assert_parity(pair, make_inputs(pair.stock))
    trained = [name for name, parameter in pair.custom.model.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)


def test_loss_and_gradients_equal_trl_with_a_continued_adapter(dense_model: Path, run_arguments: dict) -> None:
    pair = build_pair(dense_model, run_arguments, "grpo", kind="continued", beta=0.2)
    assert "ref" in pair.custom.model.peft_config
    assert_parity(pair, make_inputs(pair.stock))


@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_half_precision_equals_trl(dense_model: Path, run_arguments: dict, precision: str) -> None:
    arguments = {**run_arguments, "bf16": precision == "autocast"}
    config = {"beta": 0.2, "entropy_coef": 0.1, "top_entropy_quantile": 0.5}
    if precision == "weights":
        config["model_init_kwargs"] = {"dtype": "bfloat16"}
    pair = build_pair(dense_model, arguments, "grpo", **config)
    assert_parity(pair, make_inputs(pair.stock))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("coefficient", [None, 0.3, 0.0])
def test_mixture_of_experts_equals_trl(
    moe_model: Path, run_arguments: dict, coefficient: float | None, mode: str
) -> None:
    pair = build_pair(moe_model, run_arguments, "dapo", router_aux_loss_coef=coefficient)
    for trainer in pair:
        trainer.current_gradient_accumulation_steps = 3
    metrics = assert_parity(pair, make_inputs(pair.stock), mode)
    prefix = "eval_" if mode == "eval" else ""
    assert (f"{prefix}aux_loss" in metrics) == (coefficient != 0.0)


# (id, loss, config, inputs); "vllm" and "accumulation" are set on the constructed trainers.
OPTIONS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("kl", "grpo", {"beta": 0.3}, {}),
    ("kl", "dr_grpo", {"beta": 0.3}, {"advantages": "token"}),
    ("kl-corrected", "dapo", {"beta": 0.3, "use_bias_correction_kl": True}, {}),
    ("kl-corrected-delta", "grpo", {"beta": 0.3, "use_bias_correction_kl": True, "delta": 1.1}, {}),
    ("kl-corrected", "vespo", {"beta": 0.3, "use_bias_correction_kl": True}, {}),
    (
        "kl-corrected-sequence",
        "luspo",
        {"beta": 0.3, "use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
        {},
    ),
    ("gspo", "grpo", {"importance_sampling_level": "sequence", "epsilon": 0.05}, {"tool_mask": True}),
    ("sequence", "dapo", {"importance_sampling_level": "sequence", "epsilon": 0.05}, {}),
    ("sequence", "cispo", {"importance_sampling_level": "sequence", "epsilon_high": 1.05}, {"advantages": "token"}),
    ("sequence", "sapo", {"importance_sampling_level": "sequence"}, {}),
    ("sequence", "luspo", {"importance_sampling_level": "sequence", "epsilon": 0.05}, {}),
    ("sequence", "vespo", {"importance_sampling_level": "sequence"}, {}),
    ("delta", "dapo", {"delta": 1.3}, {}),
    ("delta-below-epsilon", "bnpo", {"delta": 1.1, "epsilon_high": 0.3}, {}),
    ("epsilons", "dr_grpo", {"epsilon": 0.1, "epsilon_high": 0.4}, {}),
    ("epsilons", "cispo", {"epsilon": 0.1, "epsilon_high": 1.2}, {}),
    ("off-policy", "grpo", {"off_policy_mask_threshold": 0.05}, {}),
    ("off-policy-sampler", "dapo", {"off_policy_mask_threshold": 0.05, "beta": 0.2}, {"sampling": True}),
    ("off-policy-token", "bnpo", {"off_policy_mask_threshold": 0.05}, {"advantages": "token", "sampling": True}),
    ("off-policy-tool", "luspo", {"off_policy_mask_threshold": 0.05}, {"tool_mask": True, "sampling": True}),
    ("zero-advantage", "vespo", {}, {"lengths": (7, 3, 5, 1, 4), "drift": 0.1}),
    ("high-entropy", "grpo", {"top_entropy_quantile": 0.4, "beta": 0.2}, {}),
    ("high-entropy-sequence", "luspo", {"top_entropy_quantile": 0.4, "importance_sampling_level": "sequence"}, {}),
    (
        "high-entropy-off-policy",
        "dr_grpo",
        {"top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.05},
        {"tool_mask": True},
    ),
    ("entropy-bonus", "grpo", {"entropy_coef": 0.2}, {}),
    ("entropy-bonus", "dapo", {"entropy_coef": 0.2, "beta": 0.1}, {}),
    ("entropy-bonus-high", "dr_grpo", {"entropy_coef": 0.2, "top_entropy_quantile": 0.5}, {"masked_rows": (1,)}),
    ("vllm-token", "grpo", {"beta": 0.2}, {"ratio": "token", "sampling": True}),
    ("vllm-sequence", "dapo", {"beta": 0.2}, {"ratio": "sequence", "sampling": True}),
    ("vllm-token", "vespo", {"beta": 0.2}, {"ratio": "token", "drift": 0.1}),
    (
        "vllm-sequence-masks",
        "luspo",
        {"importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.05},
        {"ratio": "sequence", "sampling": True},
    ),
    ("vllm-without-correction", "grpo", {"vllm_importance_sampling_correction": False}, {"ratio": "token"}),
    ("tool-mask", "grpo", {"beta": 0.2}, {"tool_mask": True}),
    ("tool-mask", "vespo", {}, {"tool_mask": True, "advantages": "token", "drift": 0.1}),
    ("truncated-row", "grpo", {"beta": 0.2}, {"masked_rows": (1,)}),
    ("truncated-row", "luspo", {"importance_sampling_level": "sequence"}, {"masked_rows": (1,), "tool_mask": True}),
    ("truncated-row", "sapo", {"off_policy_mask_threshold": 0.05}, {"masked_rows": (1, 2)}),
    ("temperature", "dapo", {"temperature": 0.7, "beta": 0.2, "entropy_coef": 0.1}, {}),
    ("gates", "sapo", {"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 2.5}, {"advantages": "token"}),
    (
        "weights",
        "vespo",
        {"vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_k_neg": 0.5, "vespo_lambda_neg": 1.5},
        {"advantages": "token", "drift": 0.1},
    ),
    ("dr-length", "dr_grpo", {"max_completion_length": 19}, {}),
    ("one-token", "grpo", {"beta": 0.2}, {"lengths": (1, 1, 1, 1)}),
    ("denominator-below-one", "dapo", {"beta": 0.2}, {"lengths": (1,), "items": 1}),
    ("denominator-of-nothing", "vespo", {"beta": 0.2}, {"masked_rows": (0, 1, 2, 3), "items": 0}),
]


@pytest.mark.parametrize(
    ("loss", "config", "inputs"), [case[1:] for case in OPTIONS], ids=[f"{case[1]}-{case[0]}" for case in OPTIONS]
)
def test_option_around_the_surrogate_equals_trl(
    dense_model: Path, run_arguments: dict, loss: str, config: dict, inputs: dict
) -> None:
    pair = build_pair(dense_model, run_arguments, loss, **{"steps_per_generation": 6, **config})
    for trainer in pair:
        trainer.current_gradient_accumulation_steps = 3
        trainer.use_vllm = "ratio" in inputs
    batch = make_inputs(pair.stock, **inputs)
    assert_parity(pair, batch)
    assert_parity(pair, batch, mode="eval")


@pytest.mark.parametrize("tool_mask", [False, True])
def test_the_micro_batch_is_one_that_off_policy_masks_act_on(
    dense_model: Path, run_arguments: dict, tool_mask: bool
) -> None:
    trainer = harness.build_custom(dense_model, run_arguments)
    inputs = make_inputs(trainer, sampling=True, tool_mask=tool_mask)
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    logps, advantages = harness.per_token_logps(trainer, inputs), inputs["advantages"].unsqueeze(1)
    for name, kept in (("old_per_token_logps", [1, 1, 0, 1]), ("sampling_per_token_logps", [1, 0, 1, 1])):
        found = trainer.get_off_policy_mask(advantages, logps, inputs[name], mask, 0.05)
        assert found.flatten().tolist() == kept
        if tool_mask:  # the tool's tokens would tip the balance
            wrong = trainer.get_off_policy_mask(advantages, logps, inputs[name], inputs["completion_mask"], 0.05)
            assert wrong.flatten().tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("loss", TYPES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_normaliser_under_accumulation_equals_trl(dense_model: Path, run_arguments: dict, loss: str, mode: str) -> None:
    """Also that the accumulation acts in training alone: the evaluation's loss is not divided."""
    pair = build_pair(dense_model, run_arguments, loss, steps_per_generation=6)
    inputs = make_inputs(pair.stock)
    single = [harness.loss_and_gradients(trainer, inputs, mode)[0] for trainer in pair]
    for trainer in pair:
        trainer.current_gradient_accumulation_steps = 3
    assert_parity(pair, inputs, mode)
    divided = harness.loss_and_gradients(pair.custom, inputs, mode)[0]
    torch.testing.assert_close(divided, single[1] / (3 if mode == "train" else 1))


@pytest.mark.parametrize("loss", ["grpo", "dapo", "vespo"])
def test_a_micro_batch_without_a_valid_token_is_a_connected_zero(
    dense_model: Path, run_arguments: dict, loss: str
) -> None:
    pair = build_pair(dense_model, run_arguments, loss, beta=0.1)
    value, gradients = harness.loss_and_gradients(pair.custom, make_inputs(pair.stock, masked_rows=(0, 1, 2, 3)))
    assert value == 0
    reached = [gradient for gradient in gradients.values() if gradient is not None]
    assert reached
    assert not any(gradient.any() for gradient in reached)


def test_log_of_a_micro_batch_without_a_valid_token_equals_trl(dense_model: Path, run_arguments: dict) -> None:
    pair = build_pair(dense_model, run_arguments, "grpo", beta=0.1)
    assert_parity(pair, make_inputs(pair.stock, masked_rows=(0, 1, 2, 3)))


@pytest.mark.parametrize("loss", ["grpo", "dapo", "vespo"])
@pytest.mark.parametrize("quantile", [1.0, 0.5])
def test_adaptive_entropy_moves_as_trl_over_several_steps(
    dense_model: Path, run_arguments: dict, loss: str, quantile: float
) -> None:
    options = {"entropy_coef": 0.1, "entropy_coef_delta": 0.05, "entropy_coef_max": 0.22, "entropy_target": 3.15}
    pair = build_pair(
        dense_model, run_arguments, loss, use_adaptive_entropy=True, top_entropy_quantile=quantile, **options
    )
    state = pair.stock.accelerator.gradient_state
    coefficients = set()
    try:
        for index in range(8):  # two micro-batches a step
            state._set_sync_gradients(index % 2 == 1)
            for trainer in pair:
                trainer.current_gradient_accumulation_steps = 2
                # Both targets are crossed, so that the coefficient rises, is capped and falls.
                trainer.args.entropy_target = 9.0 if index < 6 else 0.5
            lengths = [(7, 3, 5, 1), (2, 2, 6, 4)][index % 2]
            assert_parity(pair, make_inputs(pair.stock, lengths=lengths, seed=index))
            assert_parity(pair, make_inputs(pair.stock, lengths=lengths, seed=index), mode="eval")
            for name in ("entropy_coef", "_last_world_entropy"):
                assert getattr(pair.custom, name) == pytest.approx(getattr(pair.stock, name), rel=1e-6)
            assert (pair.custom._entropy_window_stats is None) == (pair.stock._entropy_window_stats is None)
            coefficients.add(round(pair.custom.entropy_coef, 6))
    finally:
        state._set_sync_gradients(True)
    assert coefficients == {0.1, 0.15, 0.2, 0.22, 0.17}


def test_metrics_of_several_micro_batches_are_averaged_as_trl_does(dense_model: Path, run_arguments: dict) -> None:
    pair = build_pair(dense_model, run_arguments, "grpo", beta=0.2, entropy_coef=0.1)
    for seed, lengths in enumerate([(7, 3, 5, 1), (2, 2, 6, 4), (8, 8, 8, 8)]):
        inputs = make_inputs(pair.stock, lengths=lengths, seed=seed, masked_rows=(0,) if seed == 1 else ())
        for trainer in pair:
            harness.loss_and_gradients(trainer, inputs)
    stock, custom = (harness.logged(trainer) for trainer in pair)
    harness.assert_logs([custom], [stock])
    assert {"kl", "entropy", "policy_loss", "entropy_coef", *CLIPPED} <= custom.keys()
