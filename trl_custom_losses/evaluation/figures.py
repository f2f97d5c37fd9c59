"""Figures of one model on one task, and paired differences between two models."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..metrics.statistics import standard_error


@dataclass
class Figures:
    """What was found for one model on one task.

    Attributes:
        values: Figures by name, in the order of the table.
        errors: Standard errors of those figures that have one.
        examples: Values by pair or prompt, for paired differences; NaN where there is none. Every prompt counts once in
            a figure and in its difference, however many of its completions were scored.
    """

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    examples: dict[str, np.ndarray] = field(default_factory=dict)

    def mean_of(self, name: str, examples: np.ndarray) -> None:
        """Add the mean of one value a pair or prompt over those that have one, its standard error, and the values."""
        present = examples[~np.isnan(examples)]
        self.values[name] = float(present.mean())
        self.errors[name] = standard_error(present)
        self.examples[name] = examples


def paired_differences(trained: Figures, base: Figures) -> dict[str, dict[str, float]]:
    """For every figure that both have by example: mean of trained - base over the examples and its standard error.

        d_i = trained_i - base_i;  difference = mean d,  se = sqrt(sum (d_i - difference)^2 / (n (n - 1)))

    The examples are the same for both, so what makes some of them harder than others cancels (Miller 2024,
    arXiv:2411.00640). Examples that lack a value in either are left out; `n` says how many remain.
    """
    found = {}
    for name, values in trained.examples.items():
        if name not in base.examples:
            continue
        differences = values - base.examples[name]
        differences = differences[~np.isnan(differences)]
        if len(differences):
            found[name] = {
                "difference": float(differences.mean()),
                "se": standard_error(differences),
                "n": len(differences),
            }
    return found
