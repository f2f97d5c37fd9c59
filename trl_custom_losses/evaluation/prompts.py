"""Prompts: completions that a model generates for them, their rewards, diversity and length."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainerState, set_seed
from trl import is_conversational

from .. import metrics
from ..errors import LossConfigError
from ..metrics.diversity.diversity import pairwise_diversity
from ..metrics.statistics import clustered_error
from .figures import Figures
from .template import template_options

Reward = Callable[..., list[float | None]]

#: Columns that TRL keeps from reward functions; `completion_ids` would stand against its own argument of that name.
_OWN_COLUMNS = ("prompt", "completion", "completion_ids")


@dataclass(frozen=True)
class Sampling:
    """How completions are generated.

    Attributes:
        num_generations: Completions a prompt; 1 where `temperature` is 0, since all would be the same.
        max_completion_length: Largest number of generated tokens.
        temperature: Of the softmax; 0 takes the likeliest token.
        batch_size: Completions generated at once. Part of what determines them, like the seed.
        seed: Set anew for every model.
    """

    num_generations: int = 4
    max_completion_length: int = 64
    temperature: float = 1.0
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """Completions of one model, prompt by prompt.

    Attributes:
        texts: Decoded, without special tokens.
        ids: Their tokens up to and with the end token.
        finished: Whether each ended with an end token.
        scores: Their rewards; NaN where the reward function gave None.
    """

    texts: list[str]
    ids: list[list[int]]
    finished: list[bool]
    scores: list[float]


class Prompts:
    """Prompts and the columns that the reward function reads.

    Args:
        rows: Data set with the column `prompt`, text or messages.
        tokenizer: Applies its chat template to messages and begins the assistant's turn, as TRL's GRPO does.
        template: Arguments of the chat template for every row, GRPO's `chat_template_kwargs`; a row's own, in the
            column of that name, come before them.

    Raises:
        LossConfigError: There is no column `prompt`, no row, or messages meet a tokenizer without a template.
    """

    def __init__(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any] | None = None
    ) -> None:
        if "prompt" not in rows.column_names:
            raise LossConfigError(f"the prompts have no column 'prompt'; they have {', '.join(rows.column_names)}")
        if not len(rows):
            raise LossConfigError("the prompts are empty; at least one is needed")
        self.rows: list[dict[str, Any]] = list(rows)
        self.tokenizer, self.template = tokenizer, template or {}
        self.conversational = is_conversational({"prompt": self.rows[0]["prompt"]})
        try:
            self.ids = [self._tokenize(row) for row in self.rows]
        except (ValueError, TypeError, KeyError) as error:
            raise LossConfigError(f"the prompts cannot be tokenized: {error}") from error
        if not all(self.ids):
            raise LossConfigError(f"the prompt of row {self.ids.index([])} has no tokens")

    def __len__(self) -> int:
        return len(self.rows)

    def _tokenize(self, row: dict[str, Any]) -> list[int]:
        if not self.conversational:
            return self.tokenizer(text=row["prompt"])["input_ids"]
        encoded = self.tokenizer.apply_chat_template(
            row["prompt"],
            tools=row.get("tools"),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **template_options(row, self.template),
        )
        return encoded["input_ids"]

    def generate(self, model: nn.Module, config: GenerationConfig, sampling: Sampling, reward: Reward) -> Generated:
        """Completions for each prompt, with their rewards.

        Args:
            model: A causal language model, with an adapter or without. None of its own generation defaults is used.
            config: What `generation_config` gives, the same for every model.
            sampling: What `config` was made of.
            reward: With the signature of TRL's reward functions.

        Raises:
            LossConfigError: The reward function gives another number of rewards.
        """
        set_seed(sampling.seed)
        ends = set(config.eos_token_id)
        texts, kept, finished = [], [], []
        for batch in self._batches(sampling):
            for ids in _complete(model, batch, self.tokenizer, config):
                length = next((position + 1 for position, token in enumerate(ids) if token in ends), len(ids))
                kept.append(ids[:length])
                finished.append(ids[length - 1] in ends)
                texts.append(self.tokenizer.decode(ids[:length], skip_special_tokens=True))
        return Generated(texts, kept, finished, self._score(texts, kept, sampling.num_generations, reward))

    def _batches(self, sampling: Sampling) -> Iterator[list[list[int]]]:
        repeated = [ids for ids in self.ids for _ in range(sampling.num_generations)]
        for start in range(0, len(repeated), sampling.batch_size):
            yield repeated[start : start + sampling.batch_size]

    def _score(self, texts: list[str], ids: list[list[int]], repeats: int, reward: Reward) -> list[float]:
        rows = [row for row in self.rows for _ in range(repeats)]
        completions: list[Any] = texts
        if self.conversational:
            completions = [[{"role": "assistant", "content": text}] for text in texts]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in _OWN_COLUMNS}
        # What TRL passes besides; outside of training there is nothing to log to.
        given = columns | {"trainer_state": TrainerState(), "log_extra": _nothing, "log_metric": _nothing}
        prompts = [row["prompt"] for row in rows]
        result = reward(prompts=prompts, completions=completions, completion_ids=ids, **given)
        scores = asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result
        if len(scores) != len(texts):
            raise LossConfigError(f"the reward function gave {len(scores)} rewards for {len(texts)} completions")
        return [float("nan") if score is None else float(score) for score in scores]

    def figures(self, generated: Generated, sampling: Sampling) -> Figures:
        """Figures of a model's completions.

        - `score`: mean reward; `accuracy`: share of reward 1; `pass@k` for k = 1, 2, 4, ... up to the number of
          generations. The last two only where all rewards are in [0, 1]. All are means over prompts of what is found
          for each one. Completions that the reward function did not score are left out and counted in `unscored`, and
          prompts with none that it did; pass@k then goes up to the fewest scored ones of a prompt.
        - `distinct_n`, `pairwise_diversity`, `unique`: what the metric `diversity` states.
        - `length`, `length_std`, `truncated`: in tokens, with the end token; the last is the share without one.
        """
        figures, repeats = Figures(), sampling.num_generations
        scores = np.array(generated.scores).reshape(len(self), repeats)  # (prompts, generations)
        _add_scores(figures, scores)
        figures.values["unscored"] = float(np.isnan(scores).mean())
        texts = [generated.texts[start : start + repeats] for start in range(0, len(generated.texts), repeats)]
        diversity = metrics.load("diversity").compute(predictions=texts)
        figures.values |= {name: diversity[name] for name in diversity if name not in ("completions", "prompts")}
        if repeats > 1:
            apart = np.array([pairwise_diversity([text.split() for text in group], 2) for group in texts])
            figures.mean_of("pairwise_diversity", apart)
        lengths = [len(ids) for ids in generated.ids]
        length = metrics.load("completion_length").compute(
            predictions=lengths, max_length=sampling.max_completion_length, finished=generated.finished
        )
        by_prompt = np.array(lengths, dtype=np.float64).reshape(len(self), repeats)
        figures.values |= {"length": length["mean"], "length_std": length["std"], "truncated": length["truncated"]}
        figures.errors["length"] = clustered_error(list(by_prompt))
        figures.examples["length"] = by_prompt.mean(axis=1)
        return figures


def _add_scores(figures: Figures, scores: np.ndarray) -> None:
    """Add what the rewards say, (prompts, generations), NaN where a completion was not scored."""
    scored = [row[~np.isnan(row)] for row in scores if not np.isnan(row).all()]
    if not scored:
        return
    figures.mean_of("score", _row_means(scores))
    flat = np.concatenate(scored)
    if not np.isfinite(flat).all() or flat.min() < 0 or flat.max() > 1:
        return
    fewest = min(len(row) for row in scored)
    orders = [2**power for power in range(fewest.bit_length())]
    found = metrics.load("verifiable_accuracy").compute(predictions=[row.tolist() for row in scored], k=orders)
    figures.mean_of("accuracy", _row_means(np.where(np.isnan(scores), np.nan, scores >= 1)))
    for name in (f"pass@{order}" for order in orders):
        figures.values[name], figures.errors[name] = found[name], found[f"{name}_se"]


def _row_means(values: np.ndarray) -> np.ndarray:
    """Mean of each row over what is not NaN; NaN where all is."""
    counts = (~np.isnan(values)).sum(axis=1)
    return np.divide(np.nansum(values, axis=1), counts, out=np.full(len(values), np.nan), where=counts > 0)


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: those in the model's generation defaults and the tokenizer's end token."""
    own = model.generation_config.eos_token_id
    return sorted({*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None})


def generation_config(ends: Sequence[int], tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> GenerationConfig:
    """Sampling from the whole distribution, for all models alike.

    Args:
        ends: Tokens that end a completion: the base's, so that a trained model's completions end where the base's do.
        tokenizer: Names padding and beginning.
        sampling: How many tokens, and the temperature.
    """
    chosen = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=sampling.max_completion_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(ends),
        repetition_penalty=1.0,
        **(chosen if sampling.temperature else {"do_sample": False}),
    )


@torch.no_grad()
def _complete(
    model: nn.Module, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, config: GenerationConfig
) -> list[list[int]]:
    """Generated tokens after each prompt, with whatever padding follows the end token."""
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    batch = {name: batch[name].to(next(model.parameters()).device) for name in ("input_ids", "attention_mask")}
    with _without_defaults(model, config):
        return model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :].tolist()


@contextmanager
def _without_defaults(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Inside, the model has no generation defaults but the special tokens.

    transformers fills what a given configuration leaves open (`min_p`, `num_beams`, `suppress_tokens`, ...) from the
    model's own, which a checkpoint brings along and the base may not have.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = plain.generation_config
    plain.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id
    )
    try:
        yield
    finally:
        plain.generation_config = own


async def _awaited(result: Any) -> Any:
    return await result


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for TRL's logging."""
