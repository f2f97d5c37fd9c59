"""Preference pairs: log-probabilities of the completions, and what they say of a model and its base."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import metrics
from ..errors import LossConfigError
from ..trainers.pairs import pair_collator, tokenize_pairs
from .figures import Figures
from .template import TEMPLATE_COLUMN, template_options


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probabilities of completions under one model, in nats, one a pair."""

    chosen: np.ndarray
    rejected: np.ndarray


class Pairs:
    """Pairs with their tokens, the same as in training.

    Args:
        rows: Data set with the columns `chosen`, `rejected` and, unless both begin with it, `prompt`; text or messages,
            any of TRL's preference formats.
        tokenizer: Applies its chat template to messages; text ends with its end token.
        max_length: Tokens of prompt and completion that are kept, from the start, as in TRL; None keeps all.
        template: Arguments of the chat template for every row; a row's own, in the column `chat_template_kwargs`, come
            before them.

    Raises:
        LossConfigError: A column is missing, there is no pair, or messages meet a tokenizer without a template.
    """

    def __init__(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        missing = [name for name in ("chosen", "rejected") if name not in rows.column_names]
        if missing:
            raise LossConfigError(
                f"the pairs have no column {' and no '.join(repr(name) for name in missing)}; they have "
                f"{', '.join(rows.column_names) or 'none'}"
            )
        if not len(rows):
            raise LossConfigError("the pairs are empty; at least one is needed")
        if template:
            options = [template_options(row, template) for row in rows]
            others = [name for name in rows.column_names if name != TEMPLATE_COLUMN]
            rows = rows.select_columns(others).add_column(TEMPLATE_COLUMN, options)
        self.tokens = tokenize_pairs(rows, tokenizer, max_length)
        self.left_out = len(rows) - len(self.tokens)
        self.characters = {
            side: np.array([_characters(row, side, tokenizer, max_length) for row in self.tokens])
            for side in ("chosen", "rejected")
        }
        self.collate = pair_collator(tokenizer, max_length)
        lengths = [
            len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in self.tokens
        ]
        self.order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        self.truncated = 0 if max_length is None else sum(length > max_length for length in lengths)

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Positions and padded tokens of `batch_size` pairs at a time, the longest first."""
        for start in range(0, len(self.order), batch_size):
            positions = self.order[start : start + batch_size]
            yield positions, self.collate([self.tokens[position] for position in positions])

    @torch.no_grad()
    def logps(self, model: nn.Module, batch_size: int) -> PairLogps:
        """Summed log-probabilities of all completions under `model`, in float32 or better."""
        device = next(model.parameters()).device
        found = np.zeros((2, len(self)))
        for positions, batch in self.batches(batch_size):
            sums = _summed_logps(model, {name: values.to(device) for name, values in batch.items()})
            found[:, positions] = sums.view(2, len(positions)).double().cpu().numpy()
        if not np.isfinite(found).all():
            raise LossConfigError("a log-probability is not finite; try `--dtype float32`")
        return PairLogps(*found)

    def figures(self, own: PairLogps, base: PairLogps | None, beta: float, n_bins: int) -> Figures:
        """Figures of a model; with the log-probabilities of its base also those of the implicit reward.

        - `logp_accuracy`: log p(chosen) > log p(rejected), ties one half; `logp_margin`: their mean difference, nats.
        - `acc_per_character`: the same after dividing each by its number of characters, those that the tokens it sums
          over decode to without special tokens; 1 where there is none. Near to `acc_norm` of the LM Evaluation Harness,
          which leaves the end token, or what a chat template puts after the answer, out of the log-probability.
        - `logp_chosen`, `logp_rejected`: their means, nats a completion.
        - `reward_*`: of margins beta ((log p - log p_base)(chosen) - (log p - log p_base)(rejected)); what the metric
          `preference_accuracy` states.
        """
        figures = Figures()
        figures.mean_of("logp_accuracy", _wins(own.chosen - own.rejected))
        normalised = own.chosen / self.characters["chosen"] - own.rejected / self.characters["rejected"]
        figures.mean_of("acc_per_character", _wins(normalised))
        figures.mean_of("logp_margin", own.chosen - own.rejected)
        figures.mean_of("logp_chosen", own.chosen)
        figures.mean_of("logp_rejected", own.rejected)
        if base is not None:
            margins = beta * ((own.chosen - base.chosen) - (own.rejected - base.rejected))
            found = metrics.load("preference_accuracy").compute(margins=margins.tolist(), n_bins=n_bins)
            for name in ("accuracy", "margin"):
                figures.values[f"reward_{name}"] = found[name]
                figures.errors[f"reward_{name}"] = found[f"{name}_se"]
            figures.values |= {f"reward_{name}": found[name] for name in ("nll", "ece", "brier")}
        return figures


def _wins(margins: np.ndarray) -> np.ndarray:
    return (np.sign(margins) + 1) / 2


def _characters(row: Mapping[str, Any], side: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> float:
    """Characters of the completion's tokens that are kept, at least 1."""
    kept = None if max_length is None else max_length - len(row["prompt_ids"])
    text = tokenizer.decode(row[f"{side}_ids"][:kept], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return float(max(len(text), 1))


def _summed_logps(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sums of log-probabilities over completion tokens, (2B,), for a padded batch of TRL's collator."""
    input_ids, mask = batch["input_ids"], batch["completion_mask"].bool()  # (2B, T)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    keep = input_ids.shape[1]
    options = {}
    if "logits_to_keep" in inspect.signature(plain.forward).parameters:
        # A row of logits has the size of the vocabulary: none for the positions where all rows are still in the prompt.
        first = int(mask.any(dim=0).float().argmax())
        keep = options["logits_to_keep"] = input_ids.shape[1] - max(first - 1, 0)
    outputs = model(input_ids=input_ids, attention_mask=batch["attention_mask"], use_cache=False, **options)
    logits, targets, counted = outputs.logits[:, -keep:-1], input_ids[:, -keep + 1 :], mask[:, -keep + 1 :]
    sums = []
    for row, target, wanted in zip(logits, targets, counted, strict=True):  # one at a time: float32 copies are large
        logps = row[wanted].float().log_softmax(-1).gather(-1, target[wanted].unsqueeze(-1))
        sums.append(logps.sum())
    return torch.stack(sums)
