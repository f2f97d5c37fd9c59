"""Columns that a data set lacks, made by scoring its texts once, before training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from datasets import Dataset, IterableDataset
from trl.data_utils import extract_prompt
from trl.trainer.utils import global_then_local_main_first

from ..adapters import import_loss
from ..base import Loss
from ..errors import LossConfigError
from .columns import column_names

#: Texts that a scorer gets at a time.
_AT_A_TIME = 64

_COMPLETIONS = ("chosen", "rejected")


def fill_columns(loss: Loss, dataset: Any, which: str) -> Any:
    """The data set with those columns that it lacks and the loss can have made (`Loss.column_scorers`).

    Columns that are there stay as they are. A map-style data set is scored here, once, and cached as any `map` of
    `datasets`; a stream is scored as it is read.

    Args:
        loss: The loss.
        dataset: Map-style, iterable, a dict of them, or None.
        which: Name of the data set, for messages.

    Raises:
        LossConfigError: The data set lacks the texts too, or the scorer returns anything but numbers from 0 to 1, one
            a text.
    """
    if dataset is None or not loss.column_scorers:
        return dataset
    if isinstance(dataset, dict):
        return {name: fill_columns(loss, part, f"{which}[{name!r}]") for name, part in dataset.items()}
    names = column_names(dataset)
    missing = {column: found for column, found in loss.column_scorers.items() if column not in names}
    if not missing:
        return dataset
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise LossConfigError(
            f"the columns {', '.join(missing)} can be filled in a data set of `datasets`; `{which}` is a "
            f"{type(dataset).__name__}: add them to it"
        )
    for column, (source, path) in missing.items():
        if source not in names:
            raise LossConfigError(
                f"the column '{column}' is filled by {path!r} from the column '{source}', which `{which}` lacks; it "
                f"has {', '.join(names)}"
            )
    # As TRL does, which trains on what is left.
    implicit_prompt = "prompt" not in names and all(name in names for name in _COMPLETIONS)
    score = _Scores(missing, implicit_prompt)
    options: dict[str, Any] = {"batched": True, "batch_size": _AT_A_TIME, "input_columns": score.inputs}
    if isinstance(dataset, Dataset):  # streams take no description
        options["desc"] = f"Scoring {which}"
    with global_then_local_main_first():  # so that the other processes find the first one's cache
        return dataset.map(score, **options)


class _Scores:
    """What `map` calls: columns of texts in, columns of scores out.

    Args:
        scorers: Column -> (column of texts, import path).
        implicit_prompt: Whether the completions still begin with their prompts.
    """

    def __init__(self, scorers: Mapping[str, tuple[str, str]], implicit_prompt: bool) -> None:
        self.scorers = dict(scorers)
        self.implicit_prompt = implicit_prompt
        sources = dict.fromkeys(source for source, _ in scorers.values())
        self.inputs = [*dict.fromkeys((*_COMPLETIONS, *sources))] if implicit_prompt else [*sources]
        # Part of the fingerprint under which `datasets` caches the result: a scorer that was changed scores again.
        self.code = [_code(import_loss(path)) for _, path in scorers.values()]

    def __call__(self, *columns: Sequence[Any]) -> dict[str, list[float]]:
        texts: dict[str, Sequence[Any]] = dict(zip(self.inputs, columns, strict=True))
        if self.implicit_prompt:
            pairs = zip(texts["chosen"], texts["rejected"], strict=True)
            extracted = [extract_prompt({"chosen": chosen, "rejected": rejected}) for chosen, rejected in pairs]
            texts |= {name: [pair[name] for pair in extracted] for name in _COMPLETIONS}
        return {
            column: _scored(import_loss(path), path, [text_of(value) for value in texts[source]])
            for column, (source, path) in self.scorers.items()
        }


def _code(scorer: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(inspect.getmodule(scorer) or scorer)
    except (OSError, TypeError):  # it was not written in Python
        return ""


def _scored(scorer: Callable[[list[str]], Any], path: str, texts: list[str]) -> list[float]:
    scores = scorer(texts)
    if hasattr(scores, "tolist"):  # an array or tensor
        scores = scores.tolist()
    if not isinstance(scores, (list, tuple)) or len(scores) != len(texts):
        found = f"{len(scores)} of them" if isinstance(scores, (list, tuple)) else repr(scores)
        raise LossConfigError(f"the scorer {path!r} returns one number a text, {len(texts)} here; found {found}")
    for text, score in zip(texts, scores, strict=True):
        if isinstance(score, bool) or not isinstance(score, Real) or not 0 <= score <= 1:
            raise LossConfigError(
                f"the scorer {path!r} returns numbers from 0 to 1, found {score!r} ({type(score).__name__}) for the "
                f"text {text[:80]!r}"
            )
    return [float(score) for score in scores]


def text_of(value: Any) -> str:
    """The text of a completion: itself, or that of the assistant's turns of a conversation, a line between them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(message, Mapping) and "role" in message for message in value):
        return "\n".join(_content(message.get("content")) for message in value if message["role"] == "assistant")
    raise LossConfigError(f"a scored column holds texts or lists of messages, found {value!r}")


def _content(content: Any) -> str:
    """A message's text; of a list of parts, that of its text parts. A message that only calls tools has none."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""
