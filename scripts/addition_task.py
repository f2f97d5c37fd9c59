"""Two-digit addition: the task, the tokenizer and the small base model of the quick start.

A problem is the text `aa+bb=` (zero-padded), its answer the three digits `ccc`. There are only 10,000 problems, so
a model of 0.86 million parameters learns about half of them from scratch in half a minute, and is judged exactly.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

PAD, EOS = "<pad>", "<eos>"
ALPHABET = "0123456789+="
ANSWER_TOKENS = 4  # three digits and the end-of-sequence token


@dataclass(frozen=True)
class Problem:
    """One sum: the `prompt` the model reads (such as "07+35=") and the `answer` it should give ("042")."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of problems: to train on, to decide when to stop pretraining, to report."""

    train: list[Problem]
    validation: list[Problem]
    held_out: list[Problem]


@dataclass(frozen=True)
class Task:
    """What the trainers need.

    Args:
        tokenizer: With a pad and an end-of-sequence token.
        split: The problems.
        max_new_tokens: Longest answer, in tokens, with the end-of-sequence token.
        new_model: Gives a fresh copy of the base model.
        eval_batch_size: Prompts answered at once in an evaluation.
        peft_config: How to train adapters in place of the whole model, if at all.
    """

    tokenizer: PreTrainedTokenizerBase
    split: Split
    max_new_tokens: int
    new_model: Callable[[], PreTrainedModel]
    eval_batch_size: int = 500
    peft_config: Any = None


def addition_problem(a: int, b: int) -> Problem:
    """The problem a + b, both in 0..99."""
    return Problem(prompt=f"{a:02d}+{b:02d}=", answer=f"{a + b:03d}")


def split_problems(problems: Sequence[Problem], seed: int, *, n_validation: int, n_held_out: int) -> Split:
    """Shuffle by `seed`, then cut into three sets that share no problem."""
    shuffled = list(problems)
    random.Random(seed).shuffle(shuffled)
    n_kept = n_held_out + n_validation
    return Split(
        train=shuffled[n_kept:],
        validation=shuffled[n_held_out:n_kept],
        held_out=shuffled[:n_held_out],
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each character, padding on the left."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left")


@torch.inference_mode()
def greedy_answers(model: PreTrainedModel, task: Task, problems: Sequence[Problem]) -> list[str]:
    """The model's greedy completion of each prompt, without special tokens."""
    was_training = model.training
    model.eval()
    tokenizer = task.tokenizer
    answers: list[str] = []
    for start in range(0, len(problems), task.eval_batch_size):
        prompts = [problem.prompt for problem in problems[start : start + task.eval_batch_size]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False, padding_side="left").to(
            model.device
        )
        tokens = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            do_sample=False,
            max_new_tokens=task.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        completions = tokens[:, batch.input_ids.shape[1] :]
        answers += tokenizer.batch_decode(completions, skip_special_tokens=True)
    model.train(was_training)
    return answers


def accuracy(answers: Sequence[str], problems: Sequence[Problem]) -> float:
    """Share (0..1) of answers that match exactly."""
    hits = sum(a.strip() == p.answer for a, p in zip(answers, problems, strict=True))
    return hits / len(problems)


@dataclass(frozen=True)
class PretrainConfig:
    """Size and pretraining of the base model; every field is part of the cache key.

    Pretraining stops when `target_accuracy` (share of validation problems solved) is reached, so that the base
    model is neither too weak nor too good for DPO and GRPO to show something.
    """

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 384
    max_steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    eval_every: int = 10
    target_accuracy: float = 0.45
    n_validation: int = 500
    n_held_out: int = 1500


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 decoder of the given size."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=32,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def answer_loss(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of the answer tokens; rows: (B, 10) ids of prompt, answer and end token.

    The operands are random digits that no model can predict, so they are left out.
    """
    logits = model(input_ids=rows[:, :-1], use_cache=False, logits_to_keep=ANSWER_TOKENS).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, -ANSWER_TOKENS:].flatten())


def untrained_task(config: PretrainConfig, seed: int) -> Task:
    """The addition task with a base model that is still random."""
    tokenizer = make_tokenizer()
    problems = [addition_problem(a, b) for a in range(100) for b in range(100)]
    return Task(
        tokenizer=tokenizer,
        split=split_problems(problems, seed, n_validation=config.n_validation, n_held_out=config.n_held_out),
        max_new_tokens=ANSWER_TOKENS,
        new_model=lambda: build_model(config, tokenizer),
    )


def pretrain(config: PretrainConfig, task: Task, seed: int) -> PreTrainedModel:
    """Train a base model from scratch on the training problems, with a progress bar."""
    torch.manual_seed(seed)
    model = task.new_model()
    rows = torch.tensor(task.tokenizer([p.prompt + p.answer + EOS for p in task.split.train]).input_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1 / config.warmup_steps, total_iters=config.warmup_steps
    )
    with tqdm(total=config.max_steps, desc="base model", dynamic_ncols=True) as bar:
        for step in range(1, config.max_steps + 1):
            loss = answer_loss(model, rows[torch.randint(len(rows), (config.batch_size,))])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            warmup.step()
            bar.update()
            if step % config.eval_every == 0:
                solved = accuracy(greedy_answers(model, task, task.split.validation), task.split.validation)
                bar.set_postfix(loss=f"{loss.item():.2f}", solved=f"{solved:.0%}")
                if solved >= config.target_accuracy:
                    bar.total = step
                    break
    return model


def cache_root() -> Path:
    """Where base models are kept: $TRL_CUSTOM_LOSSES_CACHE, else the user's cache folder."""
    if override := os.environ.get("TRL_CUSTOM_LOSSES_CACHE"):
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "trl_custom_losses"


def cache_key(config: PretrainConfig, seed: int) -> str:
    """A hash of all that shapes the base model: its settings, the seed, this file and the torch version."""
    settings = json.dumps({**asdict(config), "seed": seed, "torch": torch.__version__})
    return hashlib.sha256(settings.encode() + Path(__file__).read_bytes()).hexdigest()[:16]


def cached_base_model(config: PretrainConfig, task: Task, seed: int, cache: Path) -> Path:
    """The folder of the pretrained base model, which is trained first if it is not there yet."""
    target = cache / f"addition-seed{seed}-{cache_key(config, seed)}"
    if target.is_dir():
        return target
    model = pretrain(config, task, seed)
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=cache, prefix=".partial-"))
    try:
        model.save_pretrained(scratch)
        # A rename is atomic: a run that is interrupted never leaves half a model under the final name.
        scratch.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another run has finished the same model first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def addition_task(config: PretrainConfig, seed: int, cache: Path) -> Task:
    """The addition task with its pretrained base model, all determined by `seed`."""
    task = untrained_task(config, seed)
    folder = cached_base_model(config, task, seed, cache)
    return replace(task, new_model=lambda: Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32))
