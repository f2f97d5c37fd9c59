"""Runs stock TRL and the custom DPO trainer on the same model and data, and compares what they computed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from tests import tiny
from trl_custom_losses import CustomDPOConfig, CustomDPOTrainer

LOSS_TYPES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"]
LOSS_TYPES += ["aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]

#: What TRL logs for every DPO run.
TRL_METRICS = {
    "entropy",
    "num_tokens",
    "mean_token_accuracy",
    *(f"{name}/{side}" for name in ("logits", "logps", "rewards") for side in ("chosen", "rejected")),
    "rewards/accuracies",
    "rewards/margins",
}

#: What the custom trainer logs besides.
OUR_METRICS = {"rewards/margins/std", "rewards/margins/min", "rewards/margins/max"}

#: Differ between two equal runs.
_TIMINGS = ("runtime", "per_second", "preparation_time", "total_flos")

RTOL = 1e-5


def lora(**options: Any) -> LoraConfig:
    """A small LoRA adapter on the attention."""
    targets = ["q_proj", "v_proj", "o_proj"]
    return LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)


def perturb(model: nn.Module, scale: float = 0.1, seed: int = 3) -> None:
    """Move the trainable weights, so that a policy differs from the reference that shares its base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@functools.cache
def _loaded(path: Path) -> PreTrainedModel:
    return tiny.load_model(path)


def build(trainer_class: type, path: Path, config: Any, *, adapter: str | None = None, **arguments: Any) -> DPOTrainer:
    """A trainer whose policy differs from its reference.

    Args:
        trainer_class: Stock or custom.
        path: Saved model.
        config: Config object.
        adapter: None trains the whole model, "lora" a new adapter, "continued" an adapter trained before, "prompt" a
            soft prompt.
        **arguments: Further arguments of the trainer.
    """
    arguments.setdefault("train_dataset", tiny.preference_data())
    model = copy.deepcopy(_loaded(path))
    if adapter == "continued":
        torch.manual_seed(0)
        model = get_peft_model(model, lora())
        perturb(model, seed=2)
    elif adapter == "lora":
        arguments.setdefault("peft_config", lora())
    elif adapter == "prompt":
        arguments["peft_config"] = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    trainer = trainer_class(model, args=config, **arguments)
    perturb(trainer.model, scale=0.05 if adapter is None else 0.1)  # after the reference was made or precomputed
    return trainer


def stock(path: Path, config: Mapping[str, Any], **arguments: Any) -> DPOTrainer:
    """TRL's trainer."""
    return build(DPOTrainer, path, DPOConfig(**config), **arguments)


def custom(path: Path, config: Mapping[str, Any], loss_function: Any, **arguments: Any) -> CustomDPOTrainer:
    """The custom trainer; a `loss_function` that is no text or dict is passed as the trainer's argument."""
    if loss_function is None or isinstance(loss_function, (str, dict)):
        return build(CustomDPOTrainer, path, CustomDPOConfig(**config, loss_function=loss_function), **arguments)
    return build(CustomDPOTrainer, path, CustomDPOConfig(**config), loss_function=loss_function, **arguments)


def composed(types: Iterable[str], weights: Iterable[float]) -> dict[str, Any]:
    """The composition that TRL writes as lists of `loss_type` and `loss_weights`."""
    return {
        "type": "composed",
        "components": [{"type": type_, "weight": weight} for type_, weight in zip(types, weights, strict=True)],
    }


def first_batch(trainer: DPOTrainer) -> dict[str, Any]:
    """The first batch that the trainer would train on."""
    return next(iter(trainer.get_train_dataloader()))


@dataclass(frozen=True)
class Step:
    """Loss, gradients of all trainable parameters and logged metrics of one batch."""

    loss: Tensor
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def measure(trainer: DPOTrainer, batch: dict[str, Any] | None = None) -> Step:
    """Loss, gradients and metrics on `batch`, by default the trainer's first one."""
    batch = first_batch(trainer) if batch is None else batch
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    trainer.log({})
    parameters = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in parameters.items()
    }
    return Step(loss.detach(), gradients, logged(trainer)[-1])


def logged(trainer: DPOTrainer) -> list[dict[str, float]]:
    """Everything that was logged, without timings."""
    return [
        {key: value for key, value in record.items() if not any(timing in key for timing in _TIMINGS)}
        for record in trainer.state.log_history
    ]


def weights(trainer: DPOTrainer) -> dict[str, Tensor]:
    """A copy of the trainable weights."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = RTOL) -> None:
    """Equal up to rounding, which is relative to the largest entry: small gradients are differences of large terms."""
    assert found.keys() == expected.keys()
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    assert largest > 1e-4, "nothing to compare"
    _assert_close(found, expected, rtol, 0.1 * rtol * largest)


def _assert_close(found: Mapping[str, Any], expected: Mapping[str, Any], rtol: float, atol: float) -> None:
    wrong = []
    for name, value in expected.items():
        try:
            torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


def assert_identical(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal to the last bit."""
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def assert_metrics_contain(found: Mapping[str, float], expected: Mapping[str, float], rtol: float = RTOL) -> None:
    """Every expected metric was logged with the same value."""
    missing = expected.keys() - found.keys()
    assert not missing, f"not logged: {sorted(missing)}"
    _assert_close(found, expected, rtol, rtol)


def assert_same_logs(found: DPOTrainer, expected: DPOTrainer, rtol: float = RTOL) -> None:
    """The two logged at the same steps, each record of `found` containing that of `expected`."""
    assert len(logged(found)) == len(logged(expected))
    for ours, theirs in zip(logged(found), logged(expected), strict=True):
        assert_metrics_contain(ours, theirs, rtol)


def assert_same_step(found: Step, expected: Step, rtol: float = RTOL) -> None:
    """Equal loss, gradients and metrics, up to rounding; fails too if the comparison says nothing."""
    assert expected.metrics.keys() >= TRL_METRICS
    assert abs(expected.metrics["rewards/margins"]) > 1e-3, "the policy must differ from the reference"
    torch.testing.assert_close(found.loss, expected.loss, rtol=rtol, atol=0.1 * rtol)
    assert_same_tensors(found.gradients, expected.gradients, rtol)
    assert_metrics_contain(found.metrics, expected.metrics, rtol)


def assert_parity(
    path: Path, config: Mapping[str, Any], loss_function: Any, stock_config: Mapping[str, Any], **arguments: Any
) -> Step:
    """The custom trainer with `config` and `loss_function` computes on the same batch what TRL does with
    `stock_config`; returns what the custom one computed.

    Args:
        path: Saved model.
        config: Config fields of both.
        loss_function: Of the custom trainer.
        stock_config: Config fields of TRL's trainer only: its `loss_type` and what it depends on.
        **arguments: Further arguments of `build`; a callable is called for each trainer.
    """
    fresh = [{name: value() if callable(value) else value for name, value in arguments.items()} for _ in range(2)]
    theirs = stock(path, {**config, **stock_config}, **fresh[0])
    ours = custom(path, config, loss_function, **fresh[1])
    their_batch, our_batch = first_batch(theirs), first_batch(ours)
    assert their_batch.keys() == our_batch.keys()
    for name, value in their_batch.items():
        torch.testing.assert_close(our_batch[name], value)
    found = measure(ours, our_batch)
    assert_same_step(found, measure(theirs, their_batch))
    return found


def ragged_data(rows: int) -> Dataset:
    """Pairs sorted by length, so that micro-batches have very different numbers of tokens."""
    data = tiny.preference_data(rows)
    return data.select(sorted(range(rows), key=lambda i: len(data[i]["chosen"])))
