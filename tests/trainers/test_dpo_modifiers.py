"""TRL's switches around the objective act on the registry's losses as they act on TRL's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny

from .parity import (
    assert_parity,
    assert_same_logs,
    assert_same_tensors,
    composed,
    custom,
    first_batch,
    lora,
    measure,
    stock,
    weights,
)

MPO = {"types": ("sigmoid", "bco_pair", "sft"), "weights": (0.8, 0.2, 1.0)}


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


ALPHA = {"f_divergence_type": "alpha_divergence"}
CASES = [
    Case(("sigmoid",), {"beta": 0.01}),
    Case(("sigmoid",), {"beta": 5.0}),
    Case(("robust",), {"label_smoothing": 0.4, "beta": 1.0}),
    Case(("exo_pair",), {"label_smoothing": 1e-3, "beta": 0.5}),
    Case(("aot",), {"label_smoothing": 0.3}),
    # WPO
    Case(("sigmoid",), {"use_weighting": True}),
    Case(("ipo",), {"use_weighting": True}, adapter="lora"),
    Case(("apo_down",), {"use_weighting": True, "beta": 0.4}),
    Case(("sigmoid", "nca_pair"), {"use_weighting": True}, weights=(0.3, 2.0)),
    Case(("sigmoid",), {"use_weighting": True}, moe=True),
    # LD-DPO
    Case(("sigmoid",), {"ld_alpha": 0.0}),
    Case(("sigmoid",), {"ld_alpha": 0.5}),
    Case(("sigmoid",), {"ld_alpha": 1.0}),
    Case(("sigmoid_norm",), {"ld_alpha": 0.5}, adapter="continued"),
    Case(("sft",), {"ld_alpha": 0.0}),  # unaffected: supervised fine-tuning is not a log-ratio
    Case(("aot_unpaired",), {"ld_alpha": 0.5, "label_smoothing": 0.2}),
    Case(("sigmoid",), {"ld_alpha": 0.5, "use_weighting": True}),
    # f-divergences
    Case(("sigmoid",), {"f_divergence_type": "forward_kl"}),
    Case(("hinge",), {"f_divergence_type": "js_divergence"}),
    Case(("ipo",), {"f_divergence_type": "js_divergence", "ld_alpha": 0.5}),
    Case(("sigmoid",), dict(**ALPHA, f_alpha_divergence_coef=0.3)),
    Case(("sigmoid_norm",), dict(**ALPHA, f_alpha_divergence_coef=0.3)),
    Case(("discopop",), dict(**ALPHA, f_alpha_divergence_coef=1.0, discopop_tau=0.5)),
    Case(("exo_pair",), dict(**ALPHA, f_alpha_divergence_coef=1.5, label_smoothing=0.1), adapter="lora"),
    Case(("sft",), {"f_divergence_type": "forward_kl"}),
    Case(("sigmoid", "sft"), {"f_divergence_type": "js_divergence"}),
    # Precomputed reference
    Case(("sigmoid",), {"precompute_ref_log_probs": True}),
    Case(("aot",), {"precompute_ref_log_probs": True, "label_smoothing": 0.1}),
    Case(("sigmoid",), {"precompute_ref_log_probs": True, "ld_alpha": 0.5, "use_weighting": True}),
    Case(("ipo",), {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}, moe=True),
    Case(("sigmoid",), {"precompute_ref_log_probs": True}, adapter="continued"),
    # Lists of losses
    Case(**MPO),
    Case(**MPO, adapter="lora"),
    Case(**MPO, moe=True),
    Case(**MPO, options={"ld_alpha": 0.5, "precompute_ref_log_probs": True}),
    Case(("sigmoid", "sft")),
    Case(("robust", "aot", "sppo_hard", "sft"), {"label_smoothing": 0.2}, weights=(0.5, 0.25, 1e-3, -0.1)),
    # Mixture of experts
    Case(("hinge",), {"router_aux_loss_coef": 0.5}, moe=True),
    Case(("hinge",), {"router_aux_loss_coef": 0.0}, moe=True),
    # Truncation
    Case(("sigmoid",), {"max_length": 9}),
    Case(("sft", "sigmoid_norm"), {"max_length": 9}, weights=(0.5, 2.0)),
    Case(("sigmoid",), {"max_length": 8, "truncation_mode": "keep_end"}),
    Case(("sft",), {"max_length": 8, "truncation_mode": "keep_end", "pad_to_multiple_of": 16}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_modifiers_equal_trl(case: Case, dense_model: Path, moe_model: Path, run_arguments: dict) -> None:
    stock_config: dict[str, Any] = {"loss_type": list(case.types)}
    if case.weights is not None:
        stock_config["loss_weights"] = list(case.weights)
    path = moe_model if case.moe else dense_model
    assert_parity(path, run_arguments | case.options, case.loss_function, stock_config, adapter=case.adapter)


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
def test_length_normalised_losses_equal_trl_where_truncation_leaves_no_prompt(
    loss_type: str, dense_model: Path, run_arguments: dict
) -> None:
    config = run_arguments | {"max_length": 8, "truncation_mode": "keep_end"}
    assert_parity(dense_model, config, loss_type, {"loss_type": [loss_type]})


@pytest.mark.parametrize("adapter", [None, "lora"])
@pytest.mark.parametrize("precompute", [False, True])
def test_explicit_reference_model_equals_trl(
    adapter: str | None, precompute: bool, dense_model: Path, run_arguments: dict
) -> None:
    config = run_arguments | {"precompute_ref_log_probs": precompute}
    with_own_reference = assert_parity(dense_model, config, "sigmoid", {"loss_type": ["sigmoid"]}, adapter=adapter)
    step = assert_parity(
        dense_model,
        config,
        "sigmoid",
        {"loss_type": ["sigmoid"]},
        adapter=adapter,
        ref_model=lambda: tiny.load_model(dense_model, seed=7, scale=0.2),
    )
    difference = step.metrics["rewards/margins"] - with_own_reference.metrics["rewards/margins"]
    assert abs(difference) > 1e-2, "the explicit reference must matter"


def test_reference_model_is_synchronised_as_in_trl(dense_model: Path, run_arguments: dict) -> None:
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    config = run_arguments | {"max_steps": 3, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.1}
    theirs, ours = stock(dense_model, config | sync), custom(dense_model, config | sync, "sigmoid")
    before = {name: p.clone() for name, p in ours.ref_model.named_parameters()}
    theirs.train()
    ours.train()
    assert_same_logs(ours, theirs)
    assert_same_tensors(weights(ours), weights(theirs))
    references = [dict(trainer.ref_model.named_parameters()) for trainer in (ours, theirs)]
    assert_same_tensors(*references)
    assert all((p - before[name]).abs().max() > 1e-3 for name, p in references[0].items()), "nothing was synchronised"


def test_dropout_draws_the_same_random_numbers_as_in_trl(dense_model: Path, run_arguments: dict) -> None:
    config = run_arguments | {"disable_dropout": False}
    steps = []
    for make, seed in ((stock, 0), (lambda *a, **k: custom(*a, "sigmoid", **k), 0), (stock, 1)):
        trainer = make(dense_model, config, adapter="lora", peft_config=lora(lora_dropout=0.3))
        torch.manual_seed(seed)
        steps.append(measure(trainer))
    torch.testing.assert_close(steps[1].loss, steps[0].loss, rtol=1e-6, atol=0)
    assert_same_tensors(steps[1].gradients, steps[0].gradients)
    assert abs(steps[2].loss - steps[0].loss) > 1e-4, "dropout must be at work"


def wpo_weights(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """WPO's weight of each pair, from the model's own logits, (B,)."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    log_probs = logits[:, :-1].log_softmax(-1)
    chosen = log_probs.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    mask = batch["completion_mask"][:, 1:]
    aligned = (chosen - (2 * log_probs).logsumexp(-1)) * mask
    return torch.stack((aligned.sum(1) / mask.sum(1)).exp().chunk(2)).prod(0)


def test_weighted_sft_is_trl_sft_times_the_mean_pair_weight(dense_model: Path, run_arguments: dict) -> None:
    """TRL multiplies its expanded SFT loss in place, which fails for more than one pair; this is what it means."""
    theirs = stock(dense_model, run_arguments | {"loss_type": ["sft"]})
    ours = custom(dense_model, run_arguments | {"use_weighting": True}, "sft")
    factor = wpo_weights(theirs.model, first_batch(theirs)).mean().float()
    expected, found = measure(theirs), measure(ours)
    assert abs(factor - 1) > 0.1
    torch.testing.assert_close(found.loss, factor * expected.loss, rtol=1e-5, atol=0)
    assert_same_tensors(found.gradients, {name: factor * g for name, g in expected.gradients.items()})


def test_weighted_sft_of_one_pair_equals_trl(dense_model: Path, run_arguments: dict) -> None:
    config = run_arguments | {"use_weighting": True, "per_device_train_batch_size": 1}
    assert_parity(dense_model, config, "sft", {"loss_type": ["sft"]})


def test_weighted_composition_with_sft_weights_each_component(dense_model: Path, run_arguments: dict) -> None:
    ours = custom(dense_model, run_arguments | {"use_weighting": True}, composed(["sigmoid", "sft"], [0.5, 2.0]))
    parts = [custom(dense_model, run_arguments | {"use_weighting": True}, name) for name in ("sigmoid", "sft")]
    sigmoid, sft = (measure(part) for part in parts)
    found = measure(ours)
    torch.testing.assert_close(found.loss, 0.5 * sigmoid.loss + 2 * sft.loss, rtol=1e-5, atol=0)
    assert found.metrics["sigmoid_loss"] == pytest.approx(float(sigmoid.loss), rel=1e-5)
    assert found.metrics["sft_loss"] == pytest.approx(float(sft.loss), rel=1e-5)
    assert found.metrics["total_loss"] == pytest.approx(float(found.loss), rel=1e-5)
    assert (found.metrics["sigmoid_weight"], found.metrics["sft_weight"]) == (0.5, 2.0)
