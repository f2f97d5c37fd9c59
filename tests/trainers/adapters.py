"""Adapters for tests: made by hand, saved, and what a preference loss should be, computed from models alone."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests import tiny

from .parity import perturb

LOG_2 = math.log(2)

#: Options of a `LoraConfig` that make adapters of different kinds.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "all-linear": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
}

#: Command-line words of every run of a script here.
ON_CPU = ["--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--report_to", "none", "--disable_tqdm", "true"]
ON_CPU += ["--logging_steps", "1", "--gradient_checkpointing", "false", "--save_strategy", "no"]


def lora(**options: Any) -> LoraConfig:
    """A small LoRA configuration without dropout."""
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options)


def trained(base: Path | nn.Module, config: PeftConfig | None = None, seed: int = 2, scale: float = 0.2) -> PeftModel:
    """A model with an adapter that is not at its start."""
    model = tiny.load_model(base) if isinstance(base, Path) else base
    torch.manual_seed(seed)
    model = get_peft_model(model, lora() if config is None else config)
    perturb(model, scale=scale, seed=seed)
    return model


def save_adapter(folder: Path, base: Path, config: PeftConfig | None = None, seed: int = 2) -> Path:
    """Write an adapter of the model at `base` as training leaves it, with the tokenizer; returns the folder."""
    trained(base, config, seed).save_pretrained(str(folder))
    tiny.tokenizer().save_pretrained(str(folder))
    return folder


def with_reference(base: Path, folder: Path, config: PeftConfig | None = None) -> PeftModel:
    """A model whose adapter "default" is to train and whose adapter "ref", another one, is the reference."""
    save_adapter(folder, base, config, seed=7)
    model = trained(base)
    model.load_adapter(str(folder), "ref")
    return model


def write_rows(path: Path, rows: Dataset) -> str:
    """Write rows as JSON lines; returns the path."""
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def words(folder: Path, model: Path, data: Dataset, steps: int = 1, **options: Any) -> list[str]:
    """The command line of a training script."""
    options = {"dataset_name": write_rows(folder / "data.jsonl", data), "output_dir": folder / "out"} | options
    given = {"model_name_or_path": model, "max_steps": steps, **options}
    return [*ON_CPU, *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


def sums(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probability of each completion, (2B,), from the logits of the model as it is."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    chosen = logits.float().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (chosen * batch["completion_mask"][:, 1:]).sum(1)


def dpo_by_hand(policy: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """Mean DPO loss from the sums of policy and reference."""
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


@functools.cache
def _loaded(base: Path) -> nn.Module:
    return tiny.load_model(base)


def from_folder(base: Path, folder: Path) -> PeftModel:
    """The adapter in `folder` on its base, loaded as anyone would."""
    return PeftModel.from_pretrained(copy.deepcopy(_loaded(base)), str(folder)).eval()


def parameters_of(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """A copy of the weights of one adapter."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if adapter in name.split(".")}
