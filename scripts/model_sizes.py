"""Sizes of the recipes' models: parameters, adapters, and what autograd keeps of a layer. Nothing is downloaded."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from trl_custom_losses.errors import LossConfigError

_SAMPLE = 32  # tokens
_ADAPTER = ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora")

_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8}
#: The published configs of the recipes' models.
MODELS: dict[str, PretrainedConfig] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-0.6B": Qwen3Config(
        **_QWEN3,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-8B": Qwen3Config(
        **_QWEN3,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
}


def model_config(recipe: dict[str, Any], path: str | None = None) -> PretrainedConfig:
    """The config of a recipe's model, or the one at `path`."""
    name = recipe["model_name_or_path"]
    if path is not None:
        return AutoConfig.from_pretrained(path)
    if name not in MODELS:
        raise LossConfigError(f"the size of '{name}' is not in the table: give its config.json by --model_config")
    return MODELS[name]


def adapter_of(recipe: dict[str, Any]) -> str:
    """The keys of a recipe that make its adapter, as text."""
    return json.dumps({key: recipe[key] for key in _ADAPTER if key in recipe})


def parameters(config: PretrainedConfig, recipe: dict[str, Any]) -> tuple[int, int, int]:
    """How many parameters are trained, how many are frozen, and how many of both a decoder layer has."""
    return _parameters(config.to_json_string(), type(config), adapter_of(recipe))


@functools.cache
def _parameters(config: str, kind: type[PretrainedConfig], adapter: str) -> tuple[int, int, int]:
    recipe = json.loads(adapter)
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(kind(**json.loads(config)), dtype=torch.bfloat16)
    model: nn.Module = get_peft_model(causal, lora_config(recipe)) if recipe.get("use_peft") else causal
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    return trained, every - trained, sum(parameter.numel() for parameter in causal.model.layers[0].parameters())


def lora_config(recipe: dict[str, Any]) -> LoraConfig:
    """As TRL's `get_peft_config` makes it."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.get("lora_r", 16),
        lora_alpha=recipe.get("lora_alpha", 32),
        lora_dropout=recipe.get("lora_dropout", 0.05),
        target_modules=recipe.get("lora_target_modules"),
        use_dora=recipe.get("use_dora", False),
        use_rslora=recipe.get("use_rslora", False),
    )


def saved_by_a_layer(config: PretrainedConfig, recipe: dict[str, Any], residual: int, tokens: int) -> float:
    """Bytes that autograd keeps of one decoder layer: a line through what it keeps of two short inputs.

    Args:
        config: Of the model.
        recipe: For its adapter.
        residual: Bytes of an element of the residual stream, 2 or 4.
        tokens: Of a micro-batch.
    """
    short, long = _kept(config.to_json_string(), type(config), adapter_of(recipe), residual)
    return short + (long - short) / _SAMPLE * (tokens - _SAMPLE)


@functools.cache
def _kept(config: str, kind: type[PretrainedConfig], adapter: str, residual: int) -> tuple[int, int]:
    """Bytes kept of a layer of full width on `_SAMPLE` and on twice as many tokens."""
    small = kind(**{**json.loads(config), "num_hidden_layers": 1, "layer_types": None, "vocab_size": 8})
    recipe = json.loads(adapter)
    dtype = torch.float32 if residual == 4 else torch.bfloat16
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(small, dtype=dtype)
    model: nn.Module = get_peft_model(causal, lora_config(recipe)) if recipe.get("use_peft") else causal
    model.to_empty(device="cpu").train()  # whatever values lie there: only sizes count
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = []
    for tokens in (_SAMPLE, 2 * _SAMPLE):
        kept: dict[int, torch.UntypedStorage] = {}  # storages held, so that no two have the same address

        def keep(tensor: torch.Tensor, kept: dict[int, torch.UntypedStorage] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return tensor

        hidden = torch.zeros(1, tokens, small.hidden_size, dtype=dtype, requires_grad=True)
        positions = torch.arange(tokens).unsqueeze(0)
        rotary = type(causal.model.rotary_emb)(small)(hidden, positions)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept), torch.autocast("cpu", torch.bfloat16):
            causal.model.layers[0](hidden, position_ids=positions, position_embeddings=rotary)
        sizes.append(sum(storage.nbytes() for storage in kept.values()))
    return sizes[0], sizes[1]
