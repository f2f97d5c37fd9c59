"""What a loss declares in `requires` is computed right, with its gradient; what it does not declare is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from trl_custom_losses import MissingFieldError, ModelOutputs, PreferenceBatch, PreferenceLoss
from trl_custom_losses.losses.preference.sigmoid import SigmoidLoss

from .parity import assert_metrics_contain, assert_same_tensors, composed, custom, first_batch, measure

ADAPTERS = [None, "lora", "continued", "prompt"]


class Requires(PreferenceLoss):
    """Keeps what it saw; its value is what `read` makes of it, (2B,)."""

    def __init__(self, *requires: str, read: Callable[[Any], Tensor] = lambda outputs: outputs.logps) -> None:
        super().__init__()
        self.requires = frozenset(requires)
        self.read = read
        self.batch: PreferenceBatch
        self.outputs: ModelOutputs

    def forward(self, batch: PreferenceBatch, outputs: ModelOutputs) -> tuple[Tensor, dict[str, Tensor]]:
        self.batch, self.outputs = batch, outputs
        return self.read(outputs), {}


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits of positions that predict the tokens after the first, (2B, T, V), from the model's own forward."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[:, -batch["input_ids"].size(1) :][:, :-1]


def per_token_logps(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability of each completion token, 0 elsewhere, (2B, T)."""
    chosen = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return chosen * batch["completion_mask"][:, 1:]


@contextmanager
def reference_of(trainer: Any, adapter: str | None) -> Iterator[nn.Module]:
    """The model that TRL takes as reference, made by hand."""
    if adapter is None:
        yield trainer.ref_model
    elif adapter == "continued":
        trainer.model.set_adapter("ref")
        yield trainer.model
        trainer.model.set_adapter("default")
    else:
        with trainer.model.disable_adapter():
            yield trainer.model


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_reference_log_probabilities_of_tokens_are_the_references(
    adapter: str | None, dense_model: Path, run_arguments: dict
) -> None:
    loss = Requires("ref_per_token_logps")
    trainer = custom(dense_model, run_arguments, loss, adapter=adapter)
    batch = first_batch(trainer)
    with torch.no_grad(), reference_of(trainer, adapter) as reference:
        expected = per_token_logps(logits_of(reference, batch), batch)
    measure(trainer, batch)
    found = loss.outputs.ref_per_token_logps
    assert not found.requires_grad and not loss.outputs.ref_logps.requires_grad
    torch.testing.assert_close(found * loss.batch.mask, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((found * loss.batch.mask).sum(1), loss.outputs.ref_logps)
    assert (loss.outputs.log_ratios.abs() > 1e-3).all(), "the policy must differ from the reference"


def test_reference_tokens_sum_to_length_desensitised_sums(dense_model: Path, run_arguments: dict) -> None:
    loss = Requires("ref_per_token_logps")
    measure(custom(dense_model, run_arguments | {"ld_alpha": 0.25}, loss))
    outputs, mask = loss.outputs, loss.batch.mask
    shorter = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
    weights = torch.where(mask.cumsum(1) > shorter[:, None], 0.25, 1.0) * mask
    assert (weights == 0.25).any()
    torch.testing.assert_close((weights * outputs.ref_per_token_logps).sum(1), outputs.ref_logps)
    torch.testing.assert_close((weights * outputs.per_token_logps).sum(1), outputs.logps)


def pooled_by_hand(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the last hidden state over completion tokens, (2B, H)."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -inputs["input_ids"].size(1) :]
    mask = batch["completion_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_pooled_hidden_is_the_completion_mean_with_its_gradient(
    adapter: str | None, checkpointing: bool, dense_model: Path, run_arguments: dict
) -> None:
    loss = Requires("pooled_hidden", read=lambda outputs: outputs.pooled_hidden.pow(2).sum(1))
    config = run_arguments | {"gradient_checkpointing": checkpointing}
    trainer = custom(dense_model, config, loss, adapter=adapter)
    batch = first_batch(trainer)
    trainer.model.train()
    expected = pooled_by_hand(trainer.model, batch)
    expected.pow(2).sum(1).mean().backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is not None}
    if checkpointing:  # the Trainer switches it on in `train`
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        base = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
        passes = []
        base.model.layers[0].input_layernorm.register_forward_hook(lambda *_: passes.append(1))
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    step = measure(trainer, batch)
    torch.testing.assert_close(loss.outputs.pooled_hidden, expected, rtol=1e-5, atol=1e-6)
    assert loss.outputs.pooled_hidden.dtype == torch.float32
    assert_same_tensors({name: step.gradients[name] for name in gradients}, gradients)
    if checkpointing:
        references = 0 if adapter is None else 1  # forward passes of the same module as reference
        assert len(passes) == 2 + references, "checkpointing runs the forward again in the backward pass"


def test_pooled_hidden_in_training_with_checkpointing_equals_training_without(
    dense_model: Path, run_arguments: dict
) -> None:
    records = []
    for checkpointing in (False, True):
        config = run_arguments | {"gradient_checkpointing": checkpointing, "max_steps": 2, "optim": "sgd"}
        config |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.05}
        loss = Requires("pooled_hidden", read=lambda outputs: outputs.pooled_hidden.pow(2).sum(1))
        trainer = custom(dense_model, config, loss)
        trainer.train()
        records.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert records[0] == pytest.approx(records[1], rel=1e-5)


class SigmoidWithLogits(SigmoidLoss):
    requires = SigmoidLoss.requires | {"logits"}

    def forward(self, batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.outputs, self.batch = outputs, batch
        return super().forward(batch, outputs)


@pytest.mark.parametrize("options", [{}, {"use_weighting": True, "ld_alpha": 0.5}], ids=["plain", "weighted"])
@pytest.mark.parametrize("adapter", [*ADAPTERS, "moe"])
def test_asking_for_logits_changes_no_loss_gradient_or_metric(
    adapter: str | None, options: dict, dense_model: Path, moe_model: Path, run_arguments: dict
) -> None:
    path, adapter = (moe_model, None) if adapter == "moe" else (dense_model, adapter)
    loss = SigmoidWithLogits(beta=0.1)
    with_logits = measure(custom(path, run_arguments | options, loss, adapter=adapter))
    without = measure(custom(path, run_arguments | options, "sigmoid", adapter=adapter))
    torch.testing.assert_close(with_logits.loss, without.loss, rtol=1e-5, atol=1e-6)
    assert_same_tensors(with_logits.gradients, without.gradients)
    assert with_logits.metrics.keys() == without.metrics.keys()
    assert_metrics_contain(with_logits.metrics, without.metrics)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_logits_are_those_of_the_log_probabilities(adapter: str | None, dense_model: Path, run_arguments: dict) -> None:
    loss = SigmoidWithLogits(beta=0.1)
    trainer = custom(dense_model, run_arguments, loss, adapter=adapter)
    batch = first_batch(trainer)
    measure(trainer, batch)
    logits, outputs, mask = loss.outputs.logits, loss.outputs, loss.batch.mask
    assert logits.requires_grad and logits.shape[:2] == mask.shape
    torch.testing.assert_close(logits, logits_of(trainer.model, batch), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(per_token_logps(logits, batch), outputs.per_token_logps * mask, rtol=1e-5, atol=1e-5)
    log_probs = logits.log_softmax(-1)
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(outputs.entropies * mask, entropies * mask, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("requires", [("entropies",), ("entropies", "logits")])
def test_entropies_are_the_models_with_their_gradient(
    requires: tuple[str, ...], dense_model: Path, run_arguments: dict
) -> None:
    def mean_entropy(outputs: Any) -> Tensor:
        return (outputs.entropies * outputs.mask).sum(1) / outputs.lengths

    loss = Requires(*requires, read=mean_entropy)
    trainer = custom(dense_model, run_arguments, loss)
    batch = first_batch(trainer)
    log_probs = logits_of(trainer.model, batch).log_softmax(-1)
    mask = batch["completion_mask"][:, 1:]
    expected = (-(log_probs.exp() * log_probs).sum(-1) * mask).sum(1) / mask.sum(1)
    expected.mean().backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    step = measure(trainer, batch)
    torch.testing.assert_close(step.loss, expected.mean().detach())
    assert_same_tensors(step.gradients, gradients)


def test_all_requirements_go_together_and_through_a_composition(dense_model: Path, run_arguments: dict) -> None:
    everything = Requires("ref_per_token_logps", "pooled_hidden", "logits", "entropies", "ref_logps")
    batch = first_batch(trainer := custom(dense_model, run_arguments, everything))
    measure(trainer, batch)
    assert all(everything.outputs.has(name) for name in everything.requires - {"ref_logps"})
    torch.testing.assert_close(everything.outputs.pooled_hidden, pooled_by_hand(trainer.model, batch))

    names = [f"{__name__}:NeedsHidden", f"{__name__}:NeedsLogits"]
    step = measure(custom(dense_model, run_arguments, composed(names, [1.0, 0.5])))
    parts = [measure(custom(dense_model, run_arguments, name)).loss for name in names]
    torch.testing.assert_close(step.loss, parts[0] + 0.5 * parts[1])


def test_no_hook_stays_on_the_model(dense_model: Path, run_arguments: dict) -> None:
    """Neither after a forward pass nor after one that failed."""
    trainer = custom(dense_model, run_arguments, Requires("pooled_hidden"))
    hooks = [module._forward_hooks for module in trainer.model.modules()]
    before = [len(kept) for kept in hooks]
    batch = first_batch(trainer)
    measure(trainer, batch)
    with pytest.raises(IndexError):
        trainer.compute_loss(trainer.model, batch | {"input_ids": batch["input_ids"] + 1000})
    assert [len(kept) for kept in hooks] == before


class NeedsHidden(PreferenceLoss):
    requires = frozenset({"pooled_hidden"})

    def forward(self, batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return outputs.pooled_hidden.norm(dim=1), {}


class NeedsLogits(PreferenceLoss):
    requires = frozenset({"logits"})

    def forward(self, batch: Any, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return outputs.logits.logsumexp(-1), {}


@pytest.mark.parametrize("name", ["logits", "pooled_hidden", "ref_per_token_logps", "old_per_token_logps", "lgits"])
def test_reading_a_field_that_was_not_declared_explains_itself(
    name: str, dense_model: Path, run_arguments: dict
) -> None:
    trainer = custom(dense_model, run_arguments, Requires("ref_logps", read=lambda outputs: getattr(outputs, name)))
    with pytest.raises(MissingFieldError, match=name):
        measure(trainer)
