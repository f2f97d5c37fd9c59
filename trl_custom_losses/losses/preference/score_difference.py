"""What the losses on the chosen-minus-rejected score share: beta and the f-divergence of the scores."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...hyperparameters import check_choice
from ...types import ModelOutputs
from .log_ratio import LogRatioLoss

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

# exp() is held there, where TRL holds the alpha-divergence scores; float32 overflows beyond exp(88).
_LARGEST_EXPONENT = 80.0


class ScoreDifferenceLoss(LogRatioLoss):
    """Base of losses that see a pair through the difference of its scores.

    score = f'(u),  u = policy / reference probability of the completion;  reverse KL: score = log u = log_ratio

    f-DPO defines differences of scores only. `ipo` and `sigmoid_norm` divide each score by its own length, where a
    constant in f' no longer cancels; the constants of `f_prime`, which are TRL's, are part of their definition.

    Args:
        beta: Strength of the constraint towards the reference, > 0, per nat.
        f_divergence_type: The divergence whose derivative f' makes the scores.
        f_alpha_divergence_coef: TRL's coefficient c of the alpha-divergence: reverse KL at 1, forward KL at 0. It is
            1 - alpha in the paper's notation.

    Source: Wang et al. 2023, arXiv:2309.16240 (f-DPO).
    """

    f_divergence = "hyperparameter"
    #: Scores are computed with exponents up to this.
    largest_exponent = _LARGEST_EXPONENT

    def __init__(
        self,
        *,
        f_divergence_type: FDivergence = "reverse_kl",
        f_alpha_divergence_coef: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.f_divergence_type = check_choice("f_divergence_type", f_divergence_type, FDivergence)
        self.f_alpha_divergence_coef = f_alpha_divergence_coef

    def scores(self, outputs: ModelOutputs) -> tuple[Tensor, Tensor]:
        """Scores of chosen and rejected completions, each (B,), before beta."""
        chosen, rejected = f_prime(
            outputs.log_ratios,
            self.f_divergence_type,
            self.f_alpha_divergence_coef,
            largest_exponent=self.largest_exponent,
        ).chunk(2)
        return chosen, rejected

    def margin(self, outputs: ModelOutputs) -> Tensor:
        """beta times the difference of the scores, (B,)."""
        chosen, rejected = self.scores(outputs)
        return self.beta * (chosen - rejected)

    def mean_margin(self, outputs: ModelOutputs) -> Tensor:
        """The difference of the scores per completion token, (B,), before beta."""
        chosen, rejected = self.scores(outputs)
        chosen_lengths, rejected_lengths = outputs.lengths.chunk(2)
        return chosen / chosen_lengths - rejected / rejected_lengths


def f_prime(
    log_ratios: Tensor,
    divergence: FDivergence,
    coefficient: float,
    *,
    largest_exponent: float = _LARGEST_EXPONENT,
) -> Tensor:
    """f'(exp(log_ratios)) of an f-divergence.

    reverse KL: log u;  forward KL: 1 - 1/u;  Jensen-Shannon: log(2u / (1 + u));  alpha: (u^(c - 1) - 1) / (c - 1)

    Args:
        log_ratios: log u, any shape, nats.
        divergence: Which f.
        coefficient: c of the alpha-divergence.
        largest_exponent: Where exponents are held.
    """
    if divergence == "forward_kl":
        return 1 - bounded_exp(-log_ratios, largest_exponent)
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratios)
    if divergence == "alpha_divergence" and abs(coefficient - 1) >= 1e-6:  # its limit at 1 is reverse KL
        power = coefficient - 1
        return (bounded_exp(power * log_ratios, largest_exponent) - 1) / power
    return log_ratios


def bounded_exp(exponent: Tensor, largest: float = _LARGEST_EXPONENT) -> Tensor:
    """exp, constant from exp(largest) on, so that neither value nor gradient overflows."""
    return torch.exp(torch.clamp(exponent, max=largest))
