"""What a loss declares in `requires` is computed, right and with gradient, whatever the trainer's options are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_custom_losses import MissingFieldError, ModelOutputs, PolicyBatch, PolicyLoss
from trl_custom_losses.losses.policy import DAPOLoss, GRPOLoss
from trl_custom_losses.trainers import CustomGRPOTrainer

from .. import tiny
from .grpo_parity import (
    assert_gradients,
    build_custom,
    logged,
    loss_and_gradients,
    make_inputs,
    rollout,
    weights,
)

TRAINING = {"max_steps": 3, "num_iterations": 2, "optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 1.0}


class PullsToReference(PolicyLoss):
    """Squared log-ratio to the reference; keeps every batch and outputs that it saw."""

    requires = frozenset({"ref_per_token_logps"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[PolicyBatch, ModelOutputs]] = []

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        self.seen.append((batch, model_outputs))
        ratio = model_outputs.per_token_logps - model_outputs.ref_per_token_logps
        return ratio.square() - batch.advantages * model_outputs.per_token_logps, {}


class Pooled(PolicyLoss):
    """Mean square of the pooled hidden state, one value per sequence."""

    requires = frozenset({"pooled_hidden"})
    surrogate = False

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        self.pooled = model_outputs.pooled_hidden
        return self.pooled.square().mean(1), {}


class LogitsGRPO(GRPOLoss):
    """GRPO that asks for logits and keeps what it saw."""

    requires = GRPOLoss.requires | {"logits"}

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        self.seen = batch, model_outputs
        return super().forward(batch, model_outputs)


@torch.no_grad()
def by_hand(path: Path, batch: PolicyBatch, temperature: float = 1.0) -> Tensor:
    """The saved model's log-probabilities of the completion tokens, without TRL."""
    model = tiny.load_model(path).eval()
    pad = tiny.tokenizer().pad_token_id
    ids = torch.cat((batch.prompt_ids, batch.completion_ids), dim=1)
    attention = torch.cat((batch.prompt_ids != pad, batch.mask.bool()), dim=1).long()
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1] / temperature
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return logps[:, -batch.completion_ids.size(1) :]


@pytest.mark.parametrize("kind", ["dense", "lora"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_reference_is_the_initial_model_at_beta_0(
    dense_model: Path, run_arguments: dict, kind: str, temperature: float
) -> None:
    loss = PullsToReference()
    trainer = build_custom(
        dense_model,
        run_arguments,
        kind=kind,
        perturbed=False,
        loss_function=loss,
        trainer={"rollout_func": rollout},
        beta=0.0,
        temperature=temperature,
        **TRAINING,
    )
    assert (trainer.ref_model is None) == (kind == "lora")
    trainer.train()
    assert trainer.beta == trainer.args.beta == 0.0
    assert not any("kl" in entry for entry in trainer.state.log_history), "a KL term was added"
    for batch, outputs in loss.seen:
        mask = batch.mask.bool()
        expected = by_hand(dense_model, batch, temperature)
        torch.testing.assert_close(outputs.ref_per_token_logps[mask], expected[mask], rtol=1e-4, atol=1e-5)
        assert not outputs.ref_per_token_logps.requires_grad
    first, last = loss.seen[0][1], loss.seen[-1][1]
    assert (first.log_ratios.abs() < 1e-4).all()
    assert (last.log_ratios.abs() > 1e-2).any(), "the policy did not move, so the test saw nothing"


def test_reference_of_a_continued_adapter_is_that_adapter_at_beta_0(dense_model: Path, run_arguments: dict) -> None:
    loss = PullsToReference()
    options = {"kind": "continued", "perturbed": False, "trainer": {"rollout_func": rollout}, **TRAINING}
    trainer = build_custom(dense_model, run_arguments, loss_function=loss, beta=0.0, **options)
    trainer.train()
    assert trainer.beta == trainer.args.beta == 0.0
    assert (loss.seen[0][1].log_ratios.abs() < 1e-4).all()
    mask = loss.seen[0][0].mask.bool()
    found, base = loss.seen[0][1].ref_per_token_logps[mask], by_hand(dense_model, loss.seen[0][0])[mask]
    assert (found - base).abs().max() > 1e-3, "the reference is the model without its adapter"


def test_reference_exists_in_evaluation_at_beta_0(dense_model: Path, run_arguments: dict) -> None:
    loss = PullsToReference()
    trainer = {"rollout_func": rollout, "eval_dataset": tiny.prompt_data(4)}
    built = build_custom(dense_model, run_arguments, perturbed=False, loss_function=loss, trainer=trainer)
    metrics = built.evaluate()
    assert "eval_kl" not in metrics
    batch, outputs = loss.seen[0]
    mask = batch.mask.bool()
    torch.testing.assert_close(outputs.ref_per_token_logps[mask], by_hand(dense_model, batch)[mask])


def test_no_reference_is_built_for_a_loss_that_needs_none(dense_model: Path, run_arguments: dict) -> None:
    trainer = build_custom(dense_model, run_arguments, loss_function="grpo", beta=0.0)
    assert trainer.ref_model is None


def test_reference_and_kl_term_together_at_positive_beta(dense_model: Path, run_arguments: dict) -> None:
    without, with_kl = (
        build_custom(dense_model, run_arguments, loss_function=PullsToReference(), beta=beta) for beta in (0.0, 0.5)
    )
    inputs = make_inputs(without)
    (plain, _), (loss, _) = loss_and_gradients(without, inputs), loss_and_gradients(with_kl, inputs)
    kl = logged(with_kl)["kl"]
    tokens = inputs["completion_mask"].sum() / inputs["num_items_in_batch"]
    torch.testing.assert_close(loss, plain + 0.5 * kl * tokens)


def hidden_by_hand(trainer: CustomGRPOTrainer, inputs: dict[str, Tensor]) -> Tensor:
    """Mean last hidden state over the policy's completion tokens, from the backbone itself."""
    model = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
    ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), dim=1)
    attention = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), dim=1)
    hidden = model.model(input_ids=ids, attention_mask=attention).last_hidden_state
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    rows = [hidden[row, inputs["prompt_ids"].size(1) :][mask[row].bool()].mean(0) for row in range(ids.size(0))]
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["dense", "lora", "moe"])
def test_pooled_hidden_is_the_mean_over_completion_tokens_and_has_its_gradient(
    dense_model: Path, moe_model: Path, run_arguments: dict, kind: str
) -> None:
    path, kind = (moe_model, "dense") if kind == "moe" else (dense_model, kind)
    loss = Pooled()
    trainer = build_custom(path, run_arguments, kind=kind, loss_function=loss, router_aux_loss_coef=None)
    trainer.aux_loss_enabled = False
    inputs = make_inputs(trainer, tool_mask=True)
    value, gradients = loss_and_gradients(trainer, inputs)
    gradients = {name: None if gradient is None else gradient.clone() for name, gradient in gradients.items()}
    expected = hidden_by_hand(trainer, inputs)
    torch.testing.assert_close(loss.pooled, expected)
    trainer.model.zero_grad(set_to_none=True)
    expected.square().mean(1).mean().backward()
    torch.testing.assert_close(value, expected.square().mean(1).mean().detach())
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)
        else:  # the head, which only the unused log-probabilities reach
            assert gradients[name] is None or not gradients[name].any()


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_pooled_hidden_trains_alike_with_gradient_checkpointing(
    dense_model: Path, run_arguments: dict, kind: str
) -> None:
    trained = []
    for checkpointing in (False, True):
        trainer = build_custom(
            dense_model,
            {**run_arguments, "gradient_checkpointing": checkpointing},
            kind=kind,
            loss_function=Pooled(),
            trainer={"rollout_func": rollout},
            **TRAINING,
        )
        start = weights(trainer)
        torch.manual_seed(0)
        trainer.train()
        trained.append(weights(trainer))
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-5, atol=1e-6)
    assert any((trained[1][name] - tensor).abs().max() > 1e-4 for name, tensor in start.items())


@pytest.mark.parametrize("kind", ["dense", "lora", "moe"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logits_agree_with_the_log_probabilities_and_change_nothing(
    dense_model: Path, moe_model: Path, run_arguments: dict, kind: str, temperature: float
) -> None:
    path, kind = (moe_model, "dense") if kind == "moe" else (dense_model, kind)
    loss = LogitsGRPO()
    config: dict[str, Any] = {"temperature": temperature, "beta": 0.2, "entropy_coef": 0.1}
    config |= {"top_entropy_quantile": 0.6}
    fused = build_custom(path, run_arguments, kind=kind, loss_function=GRPOLoss(), **config)
    unfused = build_custom(path, run_arguments, kind=kind, loss_function=loss, **config)
    inputs = make_inputs(fused, tool_mask=True)
    (value, gradients), (found, found_gradients) = (loss_and_gradients(each, inputs) for each in (fused, unfused))
    torch.testing.assert_close(found, value)
    present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    assert_gradients({name: found_gradients[name] for name in present}, present, rtol=1e-4, atol=1e-5)
    batch, outputs = loss.seen
    assert outputs.logits.shape == (*batch.completion_ids.shape, len(tiny.tokenizer()))
    assert outputs.logits.requires_grad
    mask = batch.mask.bool()
    gathered = outputs.logits.log_softmax(-1).gather(-1, batch.completion_ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(gathered[mask], outputs.per_token_logps[mask])
    stock, metrics = logged(fused), logged(unfused)
    assert metrics == pytest.approx(stock, rel=1e-4, abs=1e-6)
    assert ("aux_loss" in metrics) == (path == moe_model)


@pytest.mark.parametrize("field", ["ref_per_token_logps", "pooled_hidden", "logits"])
def test_reading_an_undeclared_field_says_how_to_declare_it(dense_model: Path, run_arguments: dict, field: str) -> None:
    class Forgetful(DAPOLoss):
        def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Mapping[str, Tensor]]:
            return getattr(model_outputs, field), {}

    trainer = build_custom(dense_model, run_arguments, loss_function=Forgetful())
    inputs = make_inputs(trainer)
    del inputs["ref_per_token_logps"]
    with pytest.raises(MissingFieldError, match=rf"requires = \{{'{field}'\}}"):
        loss_and_gradients(trainer, inputs)
