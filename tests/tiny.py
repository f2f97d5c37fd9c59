"""Tiny random models, a character tokenizer and data, all made locally."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

_CHARACTERS = "0123456789+-=abcdefghijklmnopqrstuvwxyz .?!"
_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,  # large, so that probabilities, and with them losses, differ between tokens
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with padding, end and unknown tokens."""
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *_CHARACTERS])}
    tokenizer_ = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer_.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def save_model(path: Path, kind: str = "dense", seed: int = 0) -> Path:
    """Write a random model of `kind` ("dense" or "moe") with its tokenizer to `path`; returns it."""
    torch.manual_seed(seed)
    tokens = tokenizer()
    ids = {"vocab_size": len(tokens), "pad_token_id": tokens.pad_token_id, "eos_token_id": tokens.eos_token_id}
    model: PreTrainedModel
    if kind == "dense":
        model = Qwen2ForCausalLM(Qwen2Config(**_SIZES, **ids, bos_token_id=None))
    else:
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **_SIZES,
                **ids,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                head_dim=8,
                decoder_sparse_step=1,
                output_router_logits=True,
                router_aux_loss_coef=0.05,
                bos_token_id=None,
            )
        )
    model.save_pretrained(path)
    tokens.save_pretrained(path)
    return path


def load_model(path: Path, seed: int | None = None, scale: float = 0.05) -> PreTrainedModel:
    """Load a saved model; with a seed, perturb its weights, so that it differs from its reference."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        parameters = list(model.parameters())
        with torch.no_grad(), whole(parameters, modifier_rank=0):
            for parameter in parameters:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def whole(parameters: list[torch.nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager:
    """Whole parameters inside the context, also where ZeRO-3 has left each rank a part of them.

    Args:
        parameters: Of one model.
        modifier_rank: The rank whose changes to them are kept; None keeps nobody's.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


def preference_data(rows: int = 8) -> Dataset:
    """Pairs of ragged lengths, with numeric and text columns."""
    words = ["a", "bc", "def", "ghij", "klmno", "pqrstu", "vwxyz ab", "cdefghijk"]
    return Dataset.from_list(
        [
            {
                "prompt": f"say {words[i % 8]}?",
                "chosen": f" {words[(i + 3) % 8]}!",
                "rejected": f" {words[(5 * i + 1) % 8]}.",
                "weight": 0.5 + i,
                "label": f"row {i}",
            }
            for i in range(rows)
        ]
    )


def prompt_data(rows: int = 8) -> Dataset:
    """Prompts with numeric and text columns."""
    return Dataset.from_list(
        [{"prompt": f"{i}+{(3 * i) % 10}=", "answer": str(i + (3 * i) % 10), "weight": 0.5 + i} for i in range(rows)]
    )


def run_arguments(output_dir: Path) -> dict[str, Any]:
    """Arguments of a quiet run on a CPU in float32."""
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 0,
        "learning_rate": 1e-3,
    }


def count_reward(completions: list[str], **kwargs) -> list[float]:
    """Share of digits, so that rewards differ between completions."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def length_reward(completions: list[str], **kwargs) -> list[float | None]:
    """Minus the length; does not score empty completions."""
    return [-len(text) / 10 if text else None for text in completions]
