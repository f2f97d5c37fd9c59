"""How much the completions of a model differ, overall and for the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import datasets
import evaluate
import numpy as np

from trl_custom_losses.metrics.statistics import check_entries, grouped, whole_number

_DESCRIPTION = """\
Diversity of completions: distinct n-grams over all of them, and how much those of the same prompt differ.
"""

_INPUTS = """
Args:
    predictions: completions, either a list of strings a prompt, or a flat list of strings with `groups`.
    groups (list, optional): with a flat list, the prompt that each completion belongs to.
    n (int, default 3): largest n of distinct-n, at least 1.
    similarity_n (int, default 2): largest n-grams that the pairwise diversity compares, at least 1.
    unit (str, default "words"): what n-grams are made of: "words" (split at white space, case kept) or "characters"
        (for languages without spaces).

Returns:
    distinct_1 ... distinct_<n>: number of different n-grams / number of n-grams, over all completions together. Li et
        al. divide by the number of tokens, which for n > 1 gives less: a completion has n - 1 fewer n-grams than
        tokens. It falls as more text is counted, so compare models on the same prompts and number of completions. NaN
        where no completion has n units.
    pairwise_diversity: mean over the pairs of completions of a prompt of 1 - |A and B| / |A or B| (Jaccard), A and B
        the sets of all n-grams of 1 to `similarity_n` units of the two; then the mean over prompts. 0: all alike; 1:
        nothing in common. Two empty completions are alike. Prompts with one completion have no pair and are left out;
        NaN if all do.
    unique: number of different completions of each prompt, summed / number of completions.
    completions, prompts: their numbers.
"""

_CITATION = """\
@inproceedings{li2016diversity,
  title={A Diversity-Promoting Objective Function for Neural Conversation Models},
  author={Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill},
  booktitle={Proceedings of NAACL-HLT},
  year={2016},
  note={arXiv:1510.03055}
}
"""

_UNITS = {"words": str.split, "characters": tuple}


class Diversity(evaluate.Metric):
    """distinct-n, pairwise diversity and unique completions; see `inputs_description`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                # The flat one first: a string would pass for a sequence of characters.
                datasets.Features({"predictions": datasets.Value("string")}),
                datasets.Features({"predictions": datasets.Sequence(datasets.Value("string"))}),
            ],
            reference_urls=["https://arxiv.org/abs/1510.03055"],
        )

    def _infer_feature_from_batch(self, batch: dict[str, Any]) -> datasets.Features:
        check_entries(batch["predictions"], str, "predictions")
        return super()._infer_feature_from_batch(batch)

    def _compute(
        self,
        predictions: list[Any],
        groups: Sequence[Any] | None = None,
        n: int = 3,
        similarity_n: int = 2,
        unit: str = "words",
    ) -> dict[str, float]:
        largest = whole_number(n, "n", least=1)
        compared = whole_number(similarity_n, "similarity_n", least=1)
        if unit not in _UNITS:
            raise ValueError(f"`unit` must be one of {', '.join(_UNITS)}, not {unit!r}")
        prompts = grouped(predictions, groups, "predictions")
        units = [[_UNITS[unit](text) for text in group] for group in prompts]
        results = {f"distinct_{order}": _distinct(units, order) for order in range(1, largest + 1)}
        by_prompt = [pairwise_diversity(group, compared) for group in units if len(group) > 1]
        total = sum(len(group) for group in prompts)
        return {
            **results,
            "pairwise_diversity": float(np.mean(by_prompt)) if by_prompt else float("nan"),
            "unique": sum(len(set(group)) for group in prompts) / total,
            "completions": total,
            "prompts": len(prompts),
        }


def _n_grams(units: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(units[start : start + order]) for start in range(len(units) - order + 1)]


def _distinct(prompts: list[list[Sequence[str]]], order: int) -> float:
    found = [gram for group in prompts for units in group for gram in _n_grams(units, order)]
    return len(set(found)) / len(found) if found else float("nan")


def pairwise_diversity(completions: Sequence[Sequence[str]], n: int) -> float:
    """Mean of 1 - Jaccard similarity over the pairs of at least two completions, each a sequence of words."""
    sets = [{gram for order in range(1, n + 1) for gram in _n_grams(units, order)} for units in completions]
    return float(np.mean([1 - len(a & b) / len(a | b) if a | b else 0.0 for a, b in combinations(sets, 2)]))
