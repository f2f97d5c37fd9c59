"""Preference pairs as tokens, the same as TRL's DPO trainer makes of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ..errors import LossConfigError

#: Columns that decide the tokens; TRL's trainer reads no others.
PAIR_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")


def tokenize_pairs(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Args:
        rows: In any of TRL's preference formats.
        tokenizer: Applies its chat template to messages; text ends with its end token.
        max_length: Pairs whose prompt alone has as many tokens are left out, as in training; None keeps all.

    Raises:
        LossConfigError: The rows cannot be tokenized, or none is left.
    """
    rows = rows.select_columns([name for name in PAIR_COLUMNS if name in rows.column_names])
    # TRL's own preparation, which reads nothing of its trainer but the tokenizer: the tokens cannot differ.
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    owner: Any = SimpleNamespace(_tokenizer=tokenizer)
    try:
        tokens = DPOTrainer._prepare_dataset(owner, rows, tokenizer, arguments, "pairs")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LossConfigError(f"the pairs cannot be tokenized: {error}") from error
    if not len(tokens):
        raise LossConfigError(f"no pair is left: every prompt alone has `max_length` {max_length} tokens or more")
    return tokens


def pair_collator(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> DataCollatorForPreference:
    """What pads tokenized pairs to a batch of chosen, then rejected rows, cut to `max_length` from the end."""
    return DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=max_length)
