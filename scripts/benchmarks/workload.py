"""Models, data and trainers that the benchmarks run on."""

from __future__ import annotations

import random
import string
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from trl_custom_losses import CustomDPOConfig, CustomDPOTrainer, CustomGRPOConfig, CustomGRPOTrainer

_WORDS = string.ascii_lowercase + string.digits + " "


@dataclass(frozen=True)
class Workload:
    """A model of random weights and the batches that it is trained on.

    Lengths are in tokens; `pairs` and `completions` count those of one micro-batch.
    """

    name: str
    device: str
    model: dict[str, int]
    prompt: int
    completion: int
    pairs: int
    completions: int
    generations: int = 4
    options: dict[str, Any] = field(default_factory=dict)

    def new_model(self) -> Qwen2ForCausalLM:
        """The same random weights each time."""
        torch.manual_seed(0)
        tokens = tokenizer()
        ids = {"pad_token_id": tokens.pad_token_id, "eos_token_id": tokens.eos_token_id, "bos_token_id": None}
        model = Qwen2ForCausalLM(Qwen2Config(**({"vocab_size": len(tokens)} | self.model), **ids))
        return model.to(self.device)


TINY = Workload(
    name="0.86M parameters, float32",
    device="cpu",
    model={
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 384,
        "max_position_embeddings": 256,
    },
    prompt=32,
    completion=32,
    pairs=8,
    completions=16,
    options={"use_cpu": True, "bf16": False},
)

#: So small that a step is mostly bookkeeping.
MICRO = replace(
    TINY,
    name="0.013M parameters, float32",
    model=TINY.model | {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64},
    prompt=16,
    completion=16,
)

HALF_BILLION = Workload(
    name="0.49B parameters, bf16",
    device="cuda",
    model={
        "vocab_size": 151_936,
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "max_position_embeddings": 2048,
    },
    prompt=256,
    completion=256,
    pairs=8,
    completions=16,
    options={"bf16": True},
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, so that a text's length is known."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *_WORDS])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def texts(count: int, longest: int, seed: int) -> list[str]:
    """Random texts of half to all of `longest` characters."""
    generator = random.Random(seed)
    lengths = [generator.randint(longest // 2, longest) for _ in range(count)]
    return ["".join(generator.choices(_WORDS, k=length)) for length in lengths]


def few_vowels(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [-sum(letter in "aeiou" for letter in completion) / (len(completion) + 1) for completion in completions]


class Stopwatch(TrainerCallback):
    """Remembers when each optimizer step ended."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ends: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.ends = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        # Waiting for the device at every step would hide what waits for it anyway; the last one waits.
        self.ends.append(time.perf_counter())

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
            self.ends[-1] = time.perf_counter()


def dpo_trainer(work: Workload, loss: Any = None, **options: Any) -> Trainer:
    """A DPO trainer with an explicit reference: TRL's without a loss, else ours."""
    pairs = work.pairs * 64
    data = Dataset.from_dict(
        {
            "prompt": texts(pairs, work.prompt, 1),
            "chosen": texts(pairs, work.completion, 2),
            "rejected": texts(pairs, work.completion, 3),
        }
    )
    config = {"per_device_train_batch_size": work.pairs, "max_length": work.prompt + work.completion + 2}
    trainer, config_class = (DPOTrainer, DPOConfig) if loss is None else (CustomDPOTrainer, CustomDPOConfig)
    return _trainer(trainer, config_class, work, loss, data, config | options, ref_model=work.new_model())


def grpo_trainer(work: Workload, loss: Any = None, **options: Any) -> Trainer:
    """A GRPO trainer whose completions all have the full length, so that both contenders do the same work."""
    config = {
        "per_device_train_batch_size": work.completions,
        "num_generations": work.generations,
        "max_completion_length": work.completion,
        "generation_kwargs": {"suppress_tokens": [tokenizer().eos_token_id]},
    }
    data = Dataset.from_dict({"prompt": texts(work.completions * 64, work.prompt, 1)})
    trainer, config_class = (GRPOTrainer, GRPOConfig) if loss is None else (CustomGRPOTrainer, CustomGRPOConfig)
    return _trainer(trainer, config_class, work, loss, data, config | options, reward_funcs=few_vowels)


#: How either family's trainer is made, the loss that it is compared with, and that loss in TRL's arguments.
MAKERS: dict[str, Callable[..., Trainer]] = {"dpo": dpo_trainer, "grpo": grpo_trainer}
LOSSES = {"dpo": "sigmoid", "grpo": "grpo"}
STOCK: dict[str, dict[str, Any]] = {"dpo": {"loss_type": ["sigmoid"]}, "grpo": {"loss_type": "grpo"}}


def _trainer(
    trainer: type, config: type, work: Workload, loss: Any, data: Dataset, options: dict[str, Any], **arguments: Any
) -> Trainer:
    settings = {
        "output_dir": tempfile.mkdtemp(prefix="benchmark-"),
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
        **work.options,
        **options,
    }
    if loss is not None:
        settings["loss_function"] = loss
    built = trainer(
        model=work.new_model(),
        args=config(**settings),
        train_dataset=data,
        processing_class=tokenizer(),
        **arguments,
    )
    for callback in (PrinterCallback, ProgressCallback):
        built.remove_callback(callback)
    return built


def step_timer(trainer: Trainer, steps: int, warm_up: int, device: str = "cpu") -> Callable[[], float]:
    """A function that trains for some steps and returns the mean seconds of those after the warm-up."""
    watch = Stopwatch(device)
    trainer.add_callback(watch)
    trainer.args.max_steps = warm_up + steps

    def run() -> float:
        trainer.train()
        return (watch.ends[-1] - watch.ends[warm_up - 1]) / steps

    return run
