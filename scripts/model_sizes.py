"""Sizes of the recipes' models, without a download: parameters, adapters, and what autograd keeps of a layer."""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config
from trl import ModelConfig

from trl_custom_losses import CustomDPOConfig, CustomGRPOConfig
from trl_custom_losses.errors import LossConfigError

_SAMPLE = 32  # tokens
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
_ADAPTER = (
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_modules_to_save",
    "use_dora",
    "use_rslora",
)

_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "dtype": "bfloat16"}
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
        dtype="bfloat16",
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


class Sizes(NamedTuple):
    """Numbers of parameters."""

    trained: int
    frozen: int
    layer: int  # of both, in one decoder layer
    copies: int  # of the trained ones, those in whole copies of modules (`lora_modules_to_save`)
    trains_head: bool  # whether the output embedding is trained


def is_grpo(recipe: dict[str, Any]) -> bool:
    """Whether a recipe is for GRPO: its keys say so."""
    return any(key in recipe for key in ("reward_funcs", "num_generations", "max_completion_length"))


def setting(recipe: dict[str, Any], key: str) -> Any:
    """A recipe's value of a key, or else the default of the config that it fills."""
    if key in recipe:
        return recipe[key]
    configs = (CustomGRPOConfig if is_grpo(recipe) else CustomDPOConfig, ModelConfig)
    return next(fields[key].default for fields in (c.__dataclass_fields__ for c in configs) if key in fields)


def weight_width(recipe: dict[str, Any], config: PretrainedConfig) -> int:
    """Bytes of a weight as it is loaded; "auto" is the dtype that the model's config names."""
    name = setting(recipe, "dtype")
    found = str(config.dtype).removeprefix("torch.") if name == "auto" else name
    if found not in WIDTHS:
        raise LossConfigError(f"`dtype` must be one of {', '.join(WIDTHS)} for an estimate; found {name} ({found})")
    return WIDTHS[found]


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


def parameters(config: PretrainedConfig, recipe: dict[str, Any]) -> Sizes:
    """How many parameters a recipe trains and how many it freezes."""
    return _parameters(config.to_json_string(), type(config), adapter_of(recipe))


@functools.cache
def _parameters(config: str, kind: type[PretrainedConfig], adapter: str) -> Sizes:
    recipe = json.loads(adapter)
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(kind(**json.loads(config)), dtype=torch.bfloat16)
    model: nn.Module = get_peft_model(causal, lora_config(recipe)) if recipe.get("use_peft") else causal
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in causal.model.layers[0].parameters())
    copies = sum(weight.numel() for name, weight in model.named_parameters() if "modules_to_save" in name)
    trains_head = any(weight.requires_grad for weight in causal.get_output_embeddings().parameters())
    return Sizes(trained, every - trained, layer, copies, trains_head)


def lora_config(recipe: dict[str, Any]) -> LoraConfig:
    """As TRL's `get_peft_config` makes it."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.get("lora_r", 16),
        lora_alpha=recipe.get("lora_alpha", 32),
        lora_dropout=recipe.get("lora_dropout", 0.05),
        target_modules=recipe.get("lora_target_modules"),
        modules_to_save=recipe.get("lora_modules_to_save"),
        use_dora=recipe.get("use_dora", False),
        use_rslora=recipe.get("use_rslora", False),
    )


def saved_by_a_layer(
    config: PretrainedConfig, recipe: dict[str, Any], residual: int, tokens: int, adapter: int = 4
) -> float:
    """Bytes that autograd keeps of one decoder layer: a line through what it keeps of two short inputs.

    Args:
        config: Of the model.
        recipe: For its adapter.
        residual: Bytes of an element of the residual stream, 2 or 4.
        tokens: Of a micro-batch.
        adapter: Bytes of an element of the adapter's weights, 2 or 4.
    """
    short, long = _kept(config.to_json_string(), type(config), adapter_of(recipe), residual, adapter)
    return short + (long - short) / _SAMPLE * (tokens - _SAMPLE)


@functools.cache
def _kept(config: str, kind: type[PretrainedConfig], adapter: str, residual: int, width: int) -> tuple[int, int]:
    """Bytes kept of a layer of full width on `_SAMPLE` and on twice as many tokens."""
    small = kind(**{**json.loads(config), "num_hidden_layers": 1, "layer_types": None, "vocab_size": 8})
    recipe = json.loads(adapter)
    recipe.pop("lora_modules_to_save", None)  # copies of embeddings and head are no part of a layer
    dtype = torch.float32 if residual == 4 else torch.bfloat16
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(small, dtype=dtype)
    model: nn.Module = causal
    if recipe.get("use_peft"):
        model = get_peft_model(causal, lora_config(recipe), autocast_adapter_dtype=width == 4)
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
