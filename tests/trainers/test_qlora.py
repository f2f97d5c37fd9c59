"""Adapters on a model in 4 or 8 bits: what is frozen stays as it is, the adapter trains, the numbers are right."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import ModelConfig

from tests import tiny
from trl_custom_losses import LossConfigError
from trl_custom_losses.trainers import CustomDPOConfig, CustomDPOTrainer, launch

from .adapters import LOG_2, from_folder, lora, parameters_of, save_adapter, sums, words
from .grpo_parity import build_custom, rollout
from .parity import first_batch, measure, perturb
from .test_dpo_requires import Requires, pooled_by_hand
from .test_grpo_requirements import PullsToReference

pytest.importorskip("bitsandbytes")

BITS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": "true"},
    "nested": {"load_in_4bit": "true", "use_bnb_nested_quant": "true"},
    "fp4": {"load_in_4bit": "true", "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": "true"},
}
NEW = {"use_peft": "true", "lora_target_modules": "all-linear", "lora_dropout": 0, "learning_rate": 0.01}
#: Of the adapters, which train in bfloat16 on a quantised model.
ROUNDING = {"rtol": 2e-2, "atol": 2e-2}


def quantised(model: Path, bits: str) -> nn.Module:
    """The model as bitsandbytes stores it; in 4 bits a plain model with the weights that the codes stand for."""
    options = BITS[bits]
    if "load_in_8bit" in options:
        config = BitsAndBytesConfig(load_in_8bit=True)
        return AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.get("bnb_4bit_quant_type", "nf4"),
        bnb_4bit_use_double_quant="use_bnb_nested_quant" in options,
        bnb_4bit_compute_dtype=torch.float32,
    )
    found = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32).dequantize()
    assert not any(p.dtype == torch.uint8 for p in found.parameters())
    return found.float()


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the base model's weights, codes included."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora" not in name}


def watch(monkeypatch: pytest.MonkeyPatch, trainer_type: type) -> list[dict[str, Tensor]]:
    """Keep the frozen weights of every trainer as they are when its training starts."""
    kept: list[dict[str, Tensor]] = []
    train = trainer_type.train
    monkeypatch.setattr(
        trainer_type, "train", lambda self, *a, **k: kept.append(frozen(self.model)) or train(self, *a, **k)
    )
    return kept


def assert_only_the_adapter_moved(trainer: Any, before: dict[str, Tensor], codes: torch.dtype) -> None:
    after = frozen(trainer.model)
    assert sum(p.dtype == codes for p in after.values()) == 14, "seven linear layers in each of two blocks"
    assert all(torch.equal(p, before[name]) for name, p in after.items())
    second = {name: p for name, p in trainer.model.named_parameters() if "lora_B.default" in name}
    assert len(second) == 14 and all(p.any() for p in second.values()), "they start at zero"
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("bits", BITS)
def test_dpo_by_the_script_trains_the_adapter_only(
    bits: str, dense_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first loss, before the adapter does anything, is that of the model with quantised weights."""
    before = watch(monkeypatch, CustomDPOTrainer)
    options = {**NEW, **BITS[bits], "loss_function": "sft", "per_device_train_batch_size": 8}
    trainer = launch.train_dpo(words(tmp_path, dense_model, tiny.preference_data(), steps=3, **options))
    codes = torch.int8 if bits == "int8" else torch.uint8
    assert_only_the_adapter_moved(trainer, before[0], codes)
    batch = first_batch(trainer)
    tokens = batch["completion_mask"][:8, 1:].sum()
    by_hand, whole = (
        -(sums(model.train(), batch)[:8].sum() / tokens).item()  # in 8 bits, evaluation mode rounds differently
        for model in (quantised(dense_model, bits), tiny.load_model(dense_model))
    )
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[0] == pytest.approx(by_hand, rel=1e-4)
    assert abs(losses[0] - whole) > 3e-4, "the weights were not quantised"
    assert losses[-1] < losses[0] - 0.05
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_grpo_trains_the_adapter_with_the_quantised_model_as_reference(
    bits: str, dense_model: Path, run_arguments: dict
) -> None:
    loss = PullsToReference()
    config = launch.get_quantization_config(
        ModelConfig(**{name: value == "true" for name, value in BITS[bits].items()})
    )
    trainer = build_custom(
        str(dense_model),
        run_arguments,
        loss_function=loss,
        perturbed=False,
        beta=0.0,
        learning_rate=0.01,
        max_steps=3,
        trainer={
            "quantization_config": config,
            "peft_config": lora(target_modules="all-linear"),
            "rollout_func": rollout,
        },
    )
    before = frozen(trainer.model)
    trainer.train()
    assert_only_the_adapter_moved(trainer, before, torch.int8 if bits == "int8" else torch.uint8)
    batch, outputs = loss.seen[0]
    mask = batch.mask.bool()
    ids = torch.cat((batch.prompt_ids, batch.completion_ids), dim=1)
    attention = torch.cat((batch.prompt_ids != tiny.tokenizer().pad_token_id, mask), dim=1).long()
    with torch.no_grad():
        logits = quantised(dense_model, bits).eval()(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)[:, -mask.size(1) :][mask]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if bits == "nf4" else ROUNDING  # activations are quantised too
    torch.testing.assert_close(outputs.ref_per_token_logps[mask], expected, **tolerance)
    torch.testing.assert_close(outputs.per_token_logps[mask], outputs.ref_per_token_logps[mask])
    assert (loss.seen[-1][1].log_ratios.abs() > 1e-2).any()


def test_grpo_by_the_script_trains_with_a_loss_of_hidden_states(dense_model: Path, tmp_path: Path) -> None:
    options = {**NEW, **BITS["nf4"], "max_completion_length": 8, "num_generations": 2, "beta": 0.1}
    options |= {"loss_function": '{"type": "multi_objective_grpo", "diversity_weight": 1.0, "quality_weight": 0.0}'}
    options |= {"reward_funcs": "tests.tiny.count_reward", "per_device_train_batch_size": 4}
    trainer = launch.train_grpo(words(tmp_path, dense_model, tiny.prompt_data(), steps=2, **options))
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert records[0]["kl"] == pytest.approx(0, abs=1e-6) and records[1]["kl"] > 0
    assert records[0]["diversity_loss"] < 0


def test_pooled_hidden_of_a_quantised_model_has_its_gradient(dense_model: Path, run_arguments: dict) -> None:
    loss = Requires("pooled_hidden", read=lambda outputs: outputs.pooled_hidden.pow(2).sum(1))
    trainer = CustomDPOTrainer(
        str(dense_model),
        args=CustomDPOConfig(**run_arguments),
        loss_function=loss,
        train_dataset=tiny.preference_data(),
        quantization_config=launch.get_quantization_config(ModelConfig(load_in_4bit=True)),
        peft_config=lora(target_modules="all-linear"),
    )
    perturb(trainer.model, scale=0.05)
    batch = first_batch(trainer)
    step = measure(trainer, batch)
    by_hand = quantised(dense_model, "nf4")
    layers = dict(by_hand.named_modules())
    for name, module in trainer.model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            update = module.get_delta_weight("default").float()
            layers[name].weight.data += update.to(layers[name].weight.dtype)
    expected = pooled_by_hand(by_hand, batch)
    torch.testing.assert_close(loss.outputs.pooled_hidden, expected, **ROUNDING)
    assert (pooled_by_hand(quantised(dense_model, "nf4"), batch) - expected).abs().max() > 0.1
    # Along a step of the adapter the value changes as the gradient says.
    scale = 0.02
    with torch.no_grad():
        lengths = sum(gradient.float().pow(2).sum() for gradient in step.gradients.values())
        for name, parameter in trainer.model.named_parameters():
            if name in step.gradients:
                parameter.data = parameter.float() - scale * step.gradients[name].float() / lengths.sqrt()
    change = measure(trainer, batch).loss - step.loss
    assert change.item() == pytest.approx(-scale * lengths.sqrt().item(), rel=0.3)


@pytest.mark.parametrize("options", [{"precompute_ref_log_probs": True}, {"eval_strategy": "steps", "eval_steps": 1}])
def test_passes_in_evaluation_mode_leave_gradients_as_they_are(
    options: dict[str, Any], dense_model: Path, run_arguments: dict
) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes' layers would let none through after the first of them."""
    trained = []
    for more in ({}, options):
        config = CustomDPOConfig(**(run_arguments | {"max_steps": 3} | more), loss_function="sigmoid")
        trainer = CustomDPOTrainer(
            str(dense_model),
            args=config,
            train_dataset=tiny.preference_data(),
            eval_dataset=tiny.preference_data(2),
            quantization_config=launch.get_quantization_config(ModelConfig(load_in_4bit=True)),
            peft_config=lora(target_modules="all-linear"),
        )
        assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in trainer.model.modules())
        trainer.train()
        trained.append(parameters_of(trainer.model, "default"))
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_an_adapter_is_trained_further_on_a_quantised_base(bits: str, dense_model: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", dense_model, lora(target_modules="all-linear", use_dora=bits == "nf4"))
    options = {**BITS[bits], "loss_function": "sigmoid", "learning_rate": 0.01, "per_device_train_batch_size": 8}
    trainer = launch.train_dpo(words(tmp_path, adapter, tiny.preference_data(), steps=2, **options))
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[0] == pytest.approx(LOG_2, rel=1e-6), "policy and reference round differently"
    assert abs(losses[1] - LOG_2) > 1e-4
    types = {p.dtype for name, p in trainer.model.named_parameters() if "base_layer.weight" in name}
    assert types == {torch.int8 if bits == "int8" else torch.uint8}
    for end in ("default", "ref"):
        kinds = {p.dtype for n, p in parameters_of(trainer.model, end).items() if "magnitude" not in n}
        assert kinds == {torch.bfloat16}
    saved = parameters_of(from_folder(dense_model, tmp_path / "out"), "default")
    trained = parameters_of(trainer.model, "default")
    assert all(torch.equal(saved[name].to(p.dtype), p) for name, p in trained.items())


@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_quantised_weights_without_an_adapter_are_refused(option: str, dense_model: Path, tmp_path: Path) -> None:
    with pytest.raises(LossConfigError, match=rf"`{option}` freezes .* set `use_peft`"):
        launch.train_dpo(words(tmp_path, dense_model, tiny.preference_data(), **{option: "true"}))


def test_a_missing_library_is_named(dense_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(LossConfigError, match=r"needs bitsandbytes: pip install 'trl-custom-losses\[quantization\]'"):
        launch.train_dpo(words(tmp_path, dense_model, tiny.preference_data(), use_peft="true", load_in_4bit="true"))
