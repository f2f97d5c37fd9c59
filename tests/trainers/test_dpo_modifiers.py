"""TRL's switches around the objective act on the registry's losses as they act on TRL's own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

from .parity import (
    assert_parity,
    assert_same_logs,
    assert_same_tensors,
    composed,
    custom,
    first_batch,
    measure,
    stock,
    weights,
)

MPO = dict(types=("sigmoid", "bco_pair", "sft"), weights=(0.8, 0.2, 1.0))


@dataclass(frozen=True)
class Case:
    types: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] | None = None
    adapter: str | None = None
    moe: bool = False

    @property
    def loss_function(self) -> Any:
        if len(self.types) == 1:
            return self.types[0]
        return composed(self.types, self.weights or [1.0] * len(self.types))

    def __str__(self) -> str:
        words = ["+".join(self.types), *(f"{name}={value}" for name, value in self.options.items())]
        words += [str(list(self.weights))] if self.weights else []
        return "-".join(words + [word for word in (self.adapter, "moe" * self.moe) if word])


ALPHA = dict(f_divergence_type="alpha_divergence")
CASES = [
    Case(("sigmoid",), dict(beta=0.01)),
    Case(("sigmoid",), dict(beta=5.0)),
    Case(("robust",), dict(label_smoothing=0.4, beta=1.0)),
    Case(("exo_pair",), dict(label_smoothing=1e-3, beta=0.5)),
    Case(("aot",), dict(label_smoothing=0.3)),
    # WPO
    Case(("sigmoid",), dict(use_weighting=True)),
    Case(("ipo",), dict(use_weighting=True), adapter="lora"),
    Case(("apo_down",), dict(use_weighting=True, beta=0.4)),
    Case(("sigmoid", "nca_pair"), dict(use_weighting=True), weights=(0.3, 2.0)),
    Case(("sigmoid",), dict(use_weighting=True), moe=True),
    # LD-DPO
    Case(("sigmoid",), dict(ld_alpha=0.0)),
    Case(("sigmoid",), dict(ld_alpha=0.5)),
    Case(("sigmoid",), dict(ld_alpha=1.0)),
    Case(("sigmoid_norm",), dict(ld_alpha=0.5), adapter="continued"),
    Case(("sft",), dict(ld_alpha=0.0)),  # unaffected: supervised fine-tuning is not a log-ratio
    Case(("aot_unpaired",), dict(ld_alpha=0.5, label_smoothing=0.2)),
    Case(("sigmoid",), dict(ld_alpha=0.5, use_weighting=True)),
    # f-divergences
    Case(("sigmoid",), dict(f_divergence_type="forward_kl")),
    Case(("hinge",), dict(f_divergence_type="js_divergence")),
    Case(("ipo",), dict(f_divergence_type="js_divergence", ld_alpha=0.5)),
    Case(("sigmoid",), dict(**ALPHA, f_alpha_divergence_coef=0.3)),
    Case(("sigmoid_norm",), dict(**ALPHA, f_alpha_divergence_coef=0.3)),
    Case(("discopop",), dict(**ALPHA, f_alpha_divergence_coef=1.0, discopop_tau=0.5)),
    Case(("exo_pair",), dict(**ALPHA, f_alpha_divergence_coef=1.5, label_smoothing=0.1), adapter="lora"),
    Case(("sft",), dict(f_divergence_type="forward_kl")),
    Case(("sigmoid", "sft"), dict(f_divergence_type="js_divergence")),
    # Precomputed reference
    Case(("sigmoid",), dict(precompute_ref_log_probs=True)),
    Case(("aot",), dict(precompute_ref_log_probs=True, label_smoothing=0.1)),
    Case(("sigmoid",), dict(precompute_ref_log_probs=True, ld_alpha=0.5, use_weighting=True)),
    Case(("ipo",), dict(precompute_ref_log_probs=True, precompute_ref_batch_size=3), moe=True),
    # Lists of losses
    Case(**MPO),
    Case(**MPO, adapter="lora"),
    Case(**MPO, moe=True),
    Case(**MPO, options=dict(ld_alpha=0.5, precompute_ref_log_probs=True)),
    Case(("sigmoid", "sft")),
    Case(("robust", "aot", "sppo_hard", "sft"), dict(label_smoothing=0.2), weights=(0.5, 0.25, 1e-3, -0.1)),
    # Mixture of experts
    Case(("hinge",), dict(router_aux_loss_coef=0.5), moe=True),
    Case(("hinge",), dict(router_aux_loss_coef=0.0), moe=True),
    # Truncation
    Case(("sigmoid",), dict(max_length=9)),
    Case(("sft", "sigmoid_norm"), dict(max_length=9), weights=(0.5, 2.0)),
    Case(("sigmoid",), dict(max_length=8, truncation_mode="keep_end")),
    Case(("sft",), dict(max_length=8, truncation_mode="keep_end", pad_to_multiple_of=16)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_modifiers_equal_trl(case: Case, dense_model: Path, moe_model: Path, run_arguments: dict) -> None:
    stock_config: dict[str, Any] = {"loss_type": list(case.types)}
    if case.weights is not None:
        stock_config["loss_weights"] = list(case.weights)
    path = moe_model if case.moe else dense_model
    assert_parity(path, run_arguments | case.options, case.loss_function, stock_config, adapter=case.adapter)
