"""Scorers for the `safety` loss: a list of texts to a list of numbers, 1 = unsafe."""

from __future__ import annotations

import functools
from typing import Any

from transformers import pipeline


@functools.cache
def _classifier() -> Any:
    return pipeline("text-classification", model="unitary/toxic-bert", top_k=None, function_to_apply="sigmoid")


def toxicity(texts: list[str]) -> list[float]:
    """Probability that each text is toxic, by a classifier of 110M parameters (downloaded on first use)."""
    results = _classifier()(list(texts), truncation=True, batch_size=32)
    return [next(label["score"] for label in labels if label["label"] == "toxic") for labels in results]
