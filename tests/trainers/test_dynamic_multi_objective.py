"""Moving weights in real runs: logged weights against references in plain numbers, and resumed runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from trl_custom_losses import (
    CustomDPOConfig,
    CustomDPOTrainer,
    LossConfigError,
    ModelOutputs,
    PreferenceBatch,
    PreferenceLoss,
)

from .grpo_parity import build_custom, rollout
from .parity import assert_identical, logged, weights

Losses = list[list[float]]

_INITIAL = {"pref": 1.0, "sft": 0.4}
_OBJECTIVES = {"pref": {"type": "sigmoid", "beta": 1.0}, "sft": {"type": "sft"}}


# References: the weights of the step that follows the given losses, one row a step


def _softmax(scores: Sequence[float], initial: Sequence[float]) -> list[float]:
    exponentials = [math.exp(score) for score in scores]
    return [w * len(scores) * e / sum(exponentials) for w, e in zip(initial, exponentials, strict=True)]


def _trend(losses: Losses, initial: list[float], rate: float) -> list[float]:
    found = list(initial)
    for end in range(11, len(losses) + 1):
        for k in range(len(found)):
            history = [row[k] for row in losses[:end]]
            recent, before = sum(history[-10:]) / 10, sum(history[:-10]) / (end - 10)
            found[k] = max(found[k] * (1 + rate if recent < before else 1 - rate), 0.01)
    return found


def _dwa(losses: Losses, initial: list[float], temperature: float) -> list[float]:
    if len(losses) < 2:
        return initial
    ratios = [min(now / before, 10.0) for now, before in zip(losses[-1], losses[-2], strict=True)]
    return _softmax([ratio / temperature for ratio in ratios], initial)


def _softadapt(losses: Losses, initial: list[float], beta: float) -> list[float]:
    if len(losses) < 2:
        return initial
    return _softmax([beta * (now - before) for now, before in zip(losses[-1], losses[-2], strict=True)], initial)


def _relobralo(losses: Losses, initial: list[float], alpha: float, tau: float, remembers: list[bool]) -> list[float]:
    multipliers, ones = [1.0] * len(initial), [1.0] * len(initial)
    for step in range(1, len(losses)):

        def balanced(to: list[float], now: list[float] = losses[step]) -> list[float]:
            return _softmax([min(a / b, 10.0) / tau for a, b in zip(now, to, strict=True)], ones)

        past = multipliers if remembers[step] else balanced(losses[0])
        last = balanced(losses[step - 1])
        multipliers = [alpha * p + (1 - alpha) * b for p, b in zip(past, last, strict=True)]
    return [w * m for w, m in zip(initial, multipliers, strict=True)]


def _constraint(
    losses: Losses, initial: list[float], targets: list[float | None], eta: float, k_p: float
) -> list[float]:
    found, smoothed = list(initial), [None] * len(initial)
    for row in losses:
        for k, target in enumerate(targets):
            if target is None:
                continue
            error = row[k] - target
            before = error if smoothed[k] is None else smoothed[k]
            smoothed[k] = 0.9 * before + 0.1 * error
            found[k] = max(0.0, found[k] + eta * (error + k_p * (smoothed[k] - before)))
    return found


def _uncertainty(losses: Losses, initial: list[float], rate: float) -> list[float]:
    """Adam on log variances s, whose loss is exp(-s) L + s."""
    s, first, second = [-math.log(w) for w in initial], [0.0] * len(initial), [0.0] * len(initial)
    for t, row in enumerate(losses, 1):
        for k, loss in enumerate(row):
            gradient = 1 - math.exp(-s[k]) * loss
            first[k] = 0.9 * first[k] + 0.1 * gradient
            second[k] = 0.999 * second[k] + 0.001 * gradient**2
            s[k] -= rate * first[k] / (1 - 0.9**t) / (math.sqrt(second[k] / (1 - 0.999**t)) + 1e-8)
    return [math.exp(-x) for x in s]


class Rejected(PreferenceLoss):
    """The likelihood of rejected responses, against which preference losses pull."""

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[torch.Tensor, dict]:
        return -model_outputs.mean_logps.chunk(2)[1], {}


@dataclass(frozen=True)
class Case:
    """A rule in a run: its settings and the reference."""

    settings: dict[str, Any]
    reference: Callable[..., list[float]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 5


_CASES = {
    # Nothing moves before the eleventh loss.
    "trend": Case({"rule": "trend", "adaptation_rate": 0.2}, _trend, {"rate": 0.2}, steps=14),
    "dwa": Case({"rule": {"type": "dwa", "window": 1, "temperature": 1.0}}, _dwa, {"temperature": 1.0}),
    "softadapt": Case({"rule": "softadapt", "window": 1, "beta": 0.7}, _softadapt, {"beta": 0.7}),
    "relobralo": Case(
        {"rule": "relobralo", "alpha": 0.6, "tau": 0.7, "rho": 0.5, "seed": 3}, _relobralo, {"alpha": 0.6, "tau": 0.7}
    ),
    "constraint": Case(
        {"rule": "constraint", "targets": {"sft": 0.5}, "eta": 0.05, "k_p": 2.0},
        _constraint,
        {"targets": [None, 0.5], "eta": 0.05, "k_p": 2.0},
    ),
    "uncertainty": Case({"rule": "uncertainty", "learning_rate": 0.05}, _uncertainty, {"rate": 0.05}),
    "balanced": Case(
        {
            "objectives": {"pref": {"type": "sigmoid", "beta": 1.0}, "sft": {"type": f"{__name__}:Rejected"}},
            "rule": "softadapt",
            "window": 1,
            "balancing": {"type": "upgrad", "decay": 0.5},
        }
    ),
}


def _trainer(model: Path, output: Path, settings: dict[str, Any], **options: Any) -> CustomDPOTrainer:
    """Ten pairs in micro-batches of two, so that every third step of an epoch has a micro-batch alone."""
    config = tiny.run_arguments(output) | {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "constant",
        "learning_rate": 2e-3,
    }
    return CustomDPOTrainer(
        model=tiny.load_model(model, seed=1),
        ref_model=tiny.load_model(model),
        args=CustomDPOConfig(**config | options),
        train_dataset=tiny.preference_data(10),
        processing_class=tiny.tokenizer(),
        loss_function={
            "type": "dynamic_multi_objective",
            "objectives": _OBJECTIVES,
            "initial_weights": _INITIAL,
            **settings,
        },
    )


@pytest.fixture(scope="module", params=_CASES)
def finished(
    request: pytest.FixtureRequest, dense_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, CustomDPOTrainer, Path]:
    """A finished run, which wrote a checkpoint on its way."""
    case, output = _CASES[request.param], tmp_path_factory.mktemp(request.param)
    saving = {"max_steps": case.steps, "save_strategy": "steps", "save_steps": case.steps - 2}
    run = _trainer(dense_model, output, case.settings, **saving)
    run.train()
    return case, run, output / f"checkpoint-{case.steps - 2}"


def _history(run: Any, suffix: str, names: Sequence[str] = ("pref", "sft")) -> Losses:
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    return [[entry[f"{name}_{suffix}"] for name in names] for entry in entries]


def test_logged_weights_follow_from_logged_losses(finished: tuple[Case, CustomDPOTrainer, Path]) -> None:
    case, run, _ = finished
    if case.reference is None:
        return
    losses, found, options = _history(run, "loss"), _history(run, "weight"), dict(case.options)
    if case.reference is _relobralo:
        options["remembers"] = [run.loss_function.rule.remembers(step) for step in range(case.steps)]
        assert set(options["remembers"][1:-1]) == {True, False}
    assert len(found) == case.steps and found[0] == pytest.approx(list(_INITIAL.values()))
    for step in range(case.steps):
        expected = case.reference(losses[:step], list(_INITIAL.values()), **options)
        assert found[step] == pytest.approx(expected, rel=1e-4), f"step {step}"
    assert found[-1] != pytest.approx(found[0], rel=0.02), "the weights have moved"


def test_logged_losses_are_those_of_the_step(finished: tuple[Case, CustomDPOTrainer, Path]) -> None:
    """Weighed with the logged weights they make up the loss."""
    case, run, _ = finished
    for entry in run.state.log_history:
        if "loss" in entry:
            total = sum(entry[f"{name}_weight"] * entry[f"{name}_loss"] for name in _INITIAL)
            if case.reference is _uncertainty:
                total -= sum(math.log(entry[f"{name}_weight"]) for name in _INITIAL)
            assert entry["total_loss"] == pytest.approx(total, rel=1e-5) == pytest.approx(entry["loss"], rel=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    finished: tuple[Case, CustomDPOTrainer, Path], dense_model: Path, tmp_path: Path
) -> None:
    case, whole, checkpoint = finished
    resumed = _trainer(dense_model, tmp_path, case.settings, max_steps=case.steps)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_identical(weights(resumed), weights(whole))
    assert_identical(resumed.loss_function.state_dict(), whole.loss_function.state_dict())
    for ours, theirs in zip(logged(resumed), logged(whole), strict=True):
        if "loss" in theirs:  # TRL's `num_tokens` counts from the resume
            assert ours | {"num_tokens": 0} == theirs | {"num_tokens": 0}
    fresh = _trainer(dense_model, tmp_path, case.settings).loss_function.state_dict()
    state = whole.loss_function.state_dict()
    assert any(not torch.equal(value, fresh[name]) for name, value in state.items())
    if case.reference is None:
        assert any(factor != 1 for factor in whole.loss_function.factors.values())


class TokenKL(PreferenceLoss):
    """k3 estimate of the KL to the reference at each token."""

    requires = frozenset({"ref_per_token_logps"})
    reduction = "token_mean"

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[torch.Tensor, dict]:
        difference = model_outputs.ref_per_token_logps - model_outputs.per_token_logps
        return difference.exp() - difference - 1, {}


_HELD = {
    "objectives": {"pref": {"type": "sigmoid", "beta": 1.0}, "kl": {"type": f"{__name__}:TokenKL"}},
    "initial_weights": {"kl": 0.5},
    "rule": "constraint",
    "signal": {"kl": "kl"},
    "eta": 0.1,
    "k_p": 0.0,
}


@pytest.mark.parametrize("target, sign", [(0.01, 1), (5.0, -1)])
def test_a_constraint_holds_the_kl(target: float, sign: int, dense_model: Path, tmp_path: Path) -> None:
    """Its weight rises while the KL is above the target and falls while it is below, down to 0."""
    run = _trainer(dense_model, tmp_path, _HELD | {"targets": {"kl": target}}, max_steps=4)
    run.train()
    kls, found = _history(run, "loss", ["kl"]), _history(run, "weight", ["pref", "kl"])
    assert all((kl - target) * sign > 0 for (kl,) in kls)
    for step in range(4):
        # The objective is the very quantity that is followed.
        expected = _constraint(kls[:step], [0.5], [target], eta=0.1, k_p=0.0)
        assert found[step] == pytest.approx([1.0, *expected], rel=1e-4, abs=1e-9)
    assert (found[-1][1] - 0.5) * sign > 0


def test_a_signal_needs_what_the_run_must_compute(dense_model: Path, tmp_path: Path) -> None:
    message = "'dynamic_multi_objective' needs per-token reference log-probabilities"
    settings = {"rule": "constraint", "targets": {"sft": 0.1}, "signal": "kl"}
    with pytest.raises(LossConfigError, match=message):
        _trainer(dense_model, tmp_path, settings, precompute_ref_log_probs=True)


def test_signals_in_grpo(dense_model: Path, run_arguments: dict) -> None:
    """Each objective follows what TRL logs under another name."""
    signals = {"grpo": "reward", "luspo": "length", "entropic": "entropy"}
    targets = {"grpo": -0.2, "luspo": 4.5, "entropic": 2.0}
    run = build_custom(
        dense_model,
        run_arguments,
        loss_function={
            "type": "dynamic_multi_objective",
            "objectives": {"grpo": "grpo", "luspo": "luspo", "entropic": "dapo"},
            "rule": "constraint",
            "targets": targets,
            "signal": signals,
            "eta": 0.01,
        },
        trainer={"rollout_func": rollout},
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-2,
    )
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    followed = {"grpo": "reward", "luspo": "completions/mean_length"}
    found = _history(run, "weight", list(followed))
    for step in range(4):
        rows = [[entry[key] for key in followed.values()] for entry in entries[:step]]
        expected = _constraint(rows, [1.0, 1.0], [-0.2, 4.5], eta=0.01, k_p=10.0)
        assert found[step] == pytest.approx(expected, rel=1e-5)
    assert all(abs(end - 1) > 1e-4 for end in found[-1])
    entropic = [entry["entropic_weight"] for entry in entries]
    assert entropic == sorted(entropic) and entropic[-1] > 1.01, "its entropy is above 2 nats"


def test_a_rule_in_grpo_follows_the_losses(dense_model: Path, run_arguments: dict) -> None:
    run = build_custom(
        dense_model,
        run_arguments,
        loss_function={
            "type": "dynamic_multi_objective",
            "objectives": {"pref": {"type": "grpo"}, "sft": {"type": "dapo"}},
            "initial_weights": _INITIAL,
            "rule": "softadapt",
            "window": 1,
            "beta": 5.0,
        },
        trainer={"rollout_func": rollout},
        gradient_accumulation_steps=2,
        max_steps=4,
    )
    run.train()
    losses, found = _history(run, "loss"), _history(run, "weight")
    for step in range(4):
        assert found[step] == pytest.approx(_softadapt(losses[:step], list(_INITIAL.values()), beta=5.0), rel=1e-4)
    assert found[-1] != pytest.approx(found[0], rel=1e-3)
