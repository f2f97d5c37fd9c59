"""The gradient monitor in real runs: against autograd, without any effect, after a resume, and refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trl import DPOTrainer

from tests import tiny
from trl_custom_losses import CustomDPOConfig, CustomDPOTrainer, LossConfigError
from trl_custom_losses.callbacks import GradientMonitorCallback
from trl_custom_losses.reductions import reduce_loss

from .grpo_parity import build_custom, rollout, without_times
from .parity import lora

PAIR = [{"type": "sigmoid", "name": "pref", "beta": 0.5}, {"type": "sft", "weight": 0.3}]
COMPOSED = {"type": "composed", "components": PAIR}
POLICIES = {"type": "composed", "components": [{"type": "grpo", "name": "a"}, {"type": "cispo", "weight": 0.5}]}
OURS = ("grad_norm/", "grad_norm_weighted/", "grad_norm_layer/", "grad_cosine/", "clipped_sequences")


def dpo(model: Path, arguments: dict, loss: Any, monitor: Any = None, **options: Any) -> CustomDPOTrainer:
    """Two steps of two micro-batches of two pairs."""
    config = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "optim": "sgd"}
    peft = options.pop("peft_config", None)
    policy = options.pop("policy", None) or tiny.load_model(model, seed=1)
    return CustomDPOTrainer(
        model=policy,
        ref_model=None if peft else tiny.load_model(model),
        args=CustomDPOConfig(**arguments | config | {"learning_rate": 0.01} | options),
        train_dataset=tiny.preference_data(8),
        eval_dataset=tiny.preference_data(4),
        processing_class=tiny.tokenizer(),
        loss_function=copy.deepcopy(loss),
        peft_config=peft,
        callbacks=[monitor] if monitor else [],
    )


def grpo(model: Path, arguments: dict, loss: Any, monitor: Any = None, **options: Any) -> Any:
    """Steps on completions that were sampled up to four steps before, so that ratios leave the clip range."""
    config = {"max_steps": 6, "num_iterations": 4, "gradient_accumulation_steps": 2, "optim": "sgd"}
    trainer = build_custom(
        model,
        arguments,
        loss_function=copy.deepcopy(loss),
        trainer={"rollout_func": rollout},
        **config | {"learning_rate": 2.0, "max_grad_norm": 0.5} | options,
    )
    if monitor:
        trainer.add_callback(monitor)
    return trainer


def steps(trainer: Any, kept: bool) -> list[dict[str, float]]:
    """The logged steps: what the monitor added (`kept`), or the rest."""
    entries = [without_times(entry) for entry in trainer.state.log_history if "loss" in entry]
    return [{k: v for k, v in entry.items() if any(own in k for own in OURS) == kept} for entry in entries]


# What it reports


def test_norms_are_those_of_autograd(dense_model: Path, run_arguments: dict) -> None:
    """Of a whole optimizer step, from the trainer's own outputs."""
    run = dpo(dense_model, run_arguments, COMPOSED, GradientMonitorCallback(every=1))
    found: list[dict[str, list[Tensor]]] = []

    def look(loss: nn.Module, inputs: tuple, result: tuple) -> None:
        batch, outputs = inputs
        gradients = {}
        for name, part in loss.components():
            contribution = reduce_loss(part, part(batch, outputs)[0], batch)
            (gradients[name],) = torch.autograd.grad(contribution, outputs.per_token_logps, retain_graph=True)
        # The Trainer divides by the two micro-batches.
        found.append({name: (gradient / 2).flatten() for name, gradient in gradients.items()})

    run.loss_function.register_forward_hook(look)
    run.train()
    assert len(found) == 4
    for number, entry in enumerate(steps(run, kept=True)):
        step = found[2 * number : 2 * number + 2]
        pref, sft = (torch.cat([micro_batch[name] for micro_batch in step]) for name in ("pref", "sft"))
        assert entry == pytest.approx(
            {
                "grad_norm/pref": float(pref.norm()),
                "grad_norm/sft": float(sft.norm()),
                "grad_norm_weighted/pref": float(pref.norm()),
                "grad_norm_weighted/sft": 0.3 * float(sft.norm()),
                "grad_norm/total": float((pref + 0.3 * sft).norm()),
                "grad_cosine/pref/sft": float(torch.cosine_similarity(pref, sft, dim=0)),
            },
            rel=1e-5,
        )
        assert abs(entry["grad_cosine/pref/sft"]) > 0.01


@pytest.mark.parametrize("adapter", [False, True])
def test_norms_of_layers_are_those_of_the_model(dense_model: Path, run_arguments: dict, adapter: bool) -> None:
    seen: list[dict[str, Tensor]] = []

    class Recording(GradientMonitorCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().on_pre_optimizer_step(*args, **kwargs)
            seen.append({n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None})

    options = {"peft_config": lora(), "max_grad_norm": 1e9} if adapter else {"max_grad_norm": 0.1}
    run = dpo(dense_model, run_arguments, "sigmoid", Recording(every=1, layers=True), **options)
    run.train()
    layers = {"layers.0", "layers.1"} | (set() if adapter else {"embedding", "norm", "head"})
    for entry, gradients in zip(steps(run, kept=True), seen, strict=True):
        assert set(entry) == {"grad_norm/sigmoid"} | {f"grad_norm_layer/{layer}" for layer in layers}
        second = [gradient.flatten() for name, gradient in gradients.items() if ".layers.1." in name]
        assert entry["grad_norm_layer/layers.1"] == pytest.approx(float(torch.cat(second).norm()), rel=1e-5)
        norms = [value for name, value in entry.items() if name.startswith("grad_norm_layer/")]
        every = torch.cat([gradient.flatten() for gradient in gradients.values()])
        assert math.hypot(*norms) == pytest.approx(float(every.norm()), rel=1e-5) and min(norms) > 0
        if not adapter:
            assert math.hypot(*norms) == pytest.approx(0.1, rel=1e-3), "after clipping"


def test_clipped_sequences_in_a_run(dense_model: Path, run_arguments: dict) -> None:
    run = grpo(dense_model, run_arguments, {"type": "grpo", "epsilon": 0.001}, GradientMonitorCallback(every=1))
    run.train()
    for entry, other in zip(steps(run, kept=True), steps(run, kept=False), strict=True):
        assert set(entry) == {"grad_norm/grpo", "clipped_sequences"}
        assert (entry["clipped_sequences"] > 0) == (other["clip_ratio/region_mean"] > 0)
        assert other["clip_ratio/region_mean"] <= entry["clipped_sequences"] <= 1
    shares = [entry["clipped_sequences"] for entry in steps(run, kept=True)]
    assert shares[0] == 0 < max(shares), "the first step is on-policy"


def test_the_mean_over_the_monitored_steps_is_in_the_next_log(dense_model: Path, run_arguments: dict) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 6}
    monitor = GradientMonitorCallback(every=1)
    every = dpo(dense_model, run_arguments, COMPOSED, monitor, **options)
    every.train()
    norms = [entry["grad_norm/pref"] for entry in steps(every, kept=True)]
    some = dpo(dense_model, run_arguments, COMPOSED, GradientMonitorCallback(every=2), logging_steps=4, **options)
    some.train()
    logged = [entry.get("grad_norm/pref") for entry in steps(some, kept=True)]
    assert logged == [pytest.approx((norms[1] + norms[3]) / 2)], "step 6 is in no log of a loss"
    state = (Path(run_arguments["output_dir"]) / "checkpoint-6" / "trainer_state.json").read_text()
    assert "grad_norm_weighted/sft" in state


# What it does not do

LOSSES = {
    "composed": COMPOSED,
    "previous": COMPOSED | {"balancing": "upgrad"},
    "current": COMPOSED | {"balancing": {"type": "mgda", "gramian": "current"}},
    "learned": {
        "type": "dynamic_multi_objective",
        "objectives": {"pref": {"type": "sigmoid"}, "sft": {"type": "sft"}},
        "rule": "uncertainty",
    },
    "clipped": {"type": "clipped_loss", "base_loss": COMPOSED, "max_grad_norm": 0.01, "per": "sequence"},
    "adaptive": {"type": "adaptive_dpo", "strategy": "margin"},
}


@pytest.mark.parametrize("name", [*LOSSES, "dropout", "grpo"])
def test_training_is_the_same_to_the_last_bit(name: str, dense_model: Path, run_arguments: dict) -> None:
    make, options = (grpo, {}) if name == "grpo" else (dpo, {"max_steps": 4})
    if name == "dropout":
        options["peft_config"] = lora(lora_dropout=0.3)
    loss = POLICIES if name == "grpo" else LOSSES.get(name, COMPOSED)
    runs = []
    for monitor in (None, GradientMonitorCallback(every=1, layers=True)):
        torch.manual_seed(0)
        runs.append(make(dense_model, run_arguments, loss, monitor, **options))
        runs[-1].train()
    plain, watched = runs
    assert steps(watched, kept=False) == steps(plain, kept=False)
    for ours, theirs in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for key, value in plain.loss_function.state_dict().items():
        assert torch.equal(watched.loss_function.state_dict()[key], value)
    for with_, without in zip(steps(watched, kept=True), steps(plain, kept=True), strict=True):
        assert with_.items() > without.items(), "cosines that balancing logs stay as they are"
        assert any(key.startswith("grad_norm/") for key in with_)


def test_it_goes_on_after_a_resume(dense_model: Path, run_arguments: dict) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole, resumed = (
        dpo(dense_model, run_arguments, COMPOSED, GradientMonitorCallback(every=2, layers=True), **options)
        for _ in range(2)
    )
    whole.train()
    monitored = [entry["step"] for entry in whole.state.log_history if "grad_norm/pref" in entry]
    assert monitored == [2, 4, 6]
    layers = [entry["step"] for entry in whole.state.log_history if "grad_norm_layer/head" in entry]
    assert layers == monitored
    resumed.train(resume_from_checkpoint=str(Path(run_arguments["output_dir"]) / "checkpoint-3"))
    assert steps(resumed, kept=True) == steps(whole, kept=True)


def test_evaluation_is_not_monitored(dense_model: Path, run_arguments: dict) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    run = dpo(dense_model, run_arguments, COMPOSED, GradientMonitorCallback(every=1), **options)
    run.train()
    assert len([entry for entry in run.state.log_history if "eval_loss" in entry]) == 3
    assert not any(key.startswith("eval_grad") for entry in run.state.log_history for key in entry)
    run.evaluate()
    assert not any(part.watched for part in run.loss_function.tree())


# What it refuses


@pytest.mark.parametrize("trainer_class", [DPOTrainer, CustomDPOTrainer])
def test_a_trainer_without_a_loss_function_is_refused(
    trainer_class: type, dense_model: Path, run_arguments: dict
) -> None:
    trainer = trainer_class(
        model=str(dense_model),
        args=CustomDPOConfig(**run_arguments, max_steps=1),
        train_dataset=tiny.preference_data(4),
        callbacks=[GradientMonitorCallback()],
    )
    with pytest.raises(LossConfigError, match="needs one with a `loss_function`; this trainer has none"):
        trainer.train()


def test_two_monitors_are_refused(dense_model: Path, run_arguments: dict) -> None:
    run = dpo(dense_model, run_arguments, COMPOSED, GradientMonitorCallback())
    run.add_callback(GradientMonitorCallback(every=2))
    with pytest.raises(LossConfigError, match="takes one GradientMonitorCallback, found 2"):
        run.train()
