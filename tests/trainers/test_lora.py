"""Adapters of all kinds: their options arrive, hidden states come from the right module, gradients reach them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig
from torch import Tensor, nn

from tests import tiny
from trl_custom_losses.losses.policy import DynamicGRPOLoss
from trl_custom_losses.trainers import CustomDPOConfig, CustomDPOTrainer, launch

from .adapters import KINDS, LOG_2, from_folder, lora, parameters_of, save_adapter, trained, words
from .grpo_parity import build_custom, loss_and_gradients, make_inputs, rollout
from .parity import assert_same_tensors, first_batch, measure
from .test_dpo_requires import Requires, pooled_by_hand
from .test_grpo_requirements import Pooled


@pytest.mark.parametrize("family", ["dpo", "grpo"])
@pytest.mark.parametrize("option", ["use_dora", "use_rslora"])
def test_dora_and_rslora_are_made_by_the_config(family: str, option: str, dense_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"use_peft": "true", option: "true", "lora_r": 4, "lora_alpha": 6, "learning_rate": 0.01}
    options |= {"lora_target_modules": "all-linear", "loss_function": {"dpo": "sigmoid", "grpo": "grpo"}[family]}
    if family == "grpo":
        options |= {"reward_funcs": "tests.tiny.count_reward", "num_generations": 2, "max_completion_length": 8}
        options |= {"per_device_train_batch_size": 4}
    data = tiny.preference_data() if family == "dpo" else tiny.prompt_data()
    trainer = getattr(launch, f"train_{family}")(words(tmp_path, dense_model, data, steps=2, **options))
    found = trainer.model.peft_config["default"]
    assert (found.use_dora, found.use_rslora) == (option == "use_dora", option == "use_rslora")
    layer = trainer.model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == pytest.approx(6 / 2 if option == "use_rslora" else 6 / 4)
    magnitude = parameters_of(trainer.model, "lora_magnitude_vector")
    assert bool(magnitude) == (option == "use_dora")
    saved = from_folder(dense_model, tmp_path / "out")
    assert all(torch.equal(p, dict(trainer.model.named_parameters())[name]) for name, p in saved.named_parameters())


def merged(model: PeftModel) -> nn.Module:
    """The plain model that the active adapter makes of its base."""
    return copy.deepcopy(model).merge_and_unload()


def dpo(model: nn.Module, run_arguments: dict, loss: Any, **arguments: Any) -> CustomDPOTrainer:
    return CustomDPOTrainer(
        model,
        args=CustomDPOConfig(**run_arguments),
        loss_function=loss,
        train_dataset=tiny.preference_data(),
        processing_class=tiny.tokenizer(),
        **arguments,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_hidden_of_an_adapter_is_that_of_the_merged_model(
    kind: str, dense_model: Path, run_arguments: dict
) -> None:
    """In DPO; the model has been trained before, so there is a second adapter that must not act."""
    loss = Requires("pooled_hidden", read=lambda outputs: outputs.pooled_hidden.pow(2).sum(1))
    trainer = dpo(trained(dense_model, lora(**KINDS[kind])), run_arguments, loss)
    batch = first_batch(trainer)
    step = measure(trainer, batch)
    expected = pooled_by_hand(merged(trainer.model), batch)
    torch.testing.assert_close(loss.outputs.pooled_hidden, expected, rtol=1e-4, atol=1e-4)
    assert (expected - pooled_by_hand(tiny.load_model(dense_model), batch)).abs().max() > 0.05
    # Its gradient reaches every weight of the adapter but those of the head, behind which the state is taken.
    trainer.model.zero_grad()
    pooled_by_hand(trainer.model, batch).pow(2).sum(1).mean().backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert gradients and all(gradient.any() for gradient in gradients.values())
    assert set(step.gradients) - set(gradients) == {name for name in step.gradients if "lm_head" in name}
    assert_same_tensors({name: step.gradients[name] for name in gradients}, gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_hidden_in_grpo_is_that_of_the_merged_model(kind: str, dense_model: Path, run_arguments: dict) -> None:
    loss = Pooled()
    config = lora(**KINDS[kind])
    trainer = build_custom(dense_model, run_arguments, loss_function=loss, trainer={"peft_config": config})
    inputs = make_inputs(trainer)
    _, gradients = loss_and_gradients(trainer, inputs)
    backbone = merged(trainer.model).model
    ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), dim=1)
    attention = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), dim=1)
    mask = inputs["completion_mask"].float()
    hidden = backbone(input_ids=ids, attention_mask=attention).last_hidden_state[:, -mask.size(1) :]
    expected = torch.einsum("nlh,nl->nh", hidden, mask) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(loss.pooled, expected, rtol=1e-4, atol=1e-4)
    reached = {n: g for n, g in gradients.items() if dict(trainer.model.named_parameters())[n].requires_grad}
    assert reached and all(g is not None and g.any() for name, g in reached.items() if "lm_head" not in name)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_pooled_hidden_in_grpo_leaves_virtual_tokens_out(
    kind: type[PromptTuningConfig], dense_model: Path, run_arguments: dict
) -> None:
    """An adapter that cannot be merged: compared with the model's own states of the last positions."""
    loss = Pooled()
    config = kind(num_virtual_tokens=3, task_type="CAUSAL_LM")
    trainer = build_custom(dense_model, run_arguments, loss_function=loss, trainer={"peft_config": config})
    inputs = make_inputs(trainer)
    _, gradients = loss_and_gradients(trainer, inputs)
    ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), dim=1)
    attention = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), dim=1)
    mask = inputs["completion_mask"].float()
    states = trainer.model(input_ids=ids, attention_mask=attention, output_hidden_states=True).hidden_states[-1]
    expected = torch.einsum("nlh,nl->nh", states[:, -mask.size(1) :], mask) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(loss.pooled, expected)
    assert gradients["prompt_encoder.default.embedding.weight"].any()


class Embeds(DynamicGRPOLoss):
    """Keeps the states that responses were grouped by."""

    def prepare(self, rollout: Any) -> dict[str, Tensor]:
        self.states = rollout.forward().pooled_hidden
        return super().prepare(rollout)


def test_rollout_states_of_an_adapter_are_those_of_the_merged_model(dense_model: Path, run_arguments: dict) -> None:
    """What `dynamic_grpo` groups responses by."""
    loss = Embeds(embedding="hidden")
    trainer = build_custom(
        dense_model,
        run_arguments,
        loss_function=loss,
        trainer={"peft_config": lora(use_dora=True), "rollout_func": rollout},
    )
    model = merged(trainer.model)
    output = trainer._generate_and_score_completions([{"prompt": f"{i // 2}="} for i in range(4)])
    ids = torch.cat((output["prompt_ids"], output["completion_ids"]), dim=1)
    attention = torch.cat((output["prompt_mask"], output["completion_mask"]), dim=1)
    mask = output["completion_mask"].float()
    with torch.no_grad():
        hidden = model.model(input_ids=ids, attention_mask=attention).last_hidden_state[:, -mask.size(1) :]
    expected = torch.einsum("nlh,nl->nh", hidden, mask) / mask.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(loss.states, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dora", "modules_to_save"])
@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_the_diversity_term_trains_an_adapter_through_hidden_states(
    weight: float, kind: str, dense_model: Path, run_arguments: dict
) -> None:
    """With equal rewards nothing else has a gradient."""
    loss = {"type": "multi_objective_grpo", "diversity_weight": weight, "quality_weight": 0.0}
    trainer = build_custom(
        dense_model,
        run_arguments,
        loss_function=loss,
        trainer={"peft_config": lora(**KINDS[kind]), "rollout_func": rollout, "reward_funcs": constant_reward},
        max_steps=2,
        learning_rate=0.01,
        weight_decay=0.0,
    )
    before = parameters_of(trainer.model, "default")
    trainer.train()
    after = parameters_of(trainer.model, "default")
    moved = {name for name, p in after.items() if not torch.equal(p, before[name]) and "lm_head" not in name}
    assert moved == ({name for name in after if "lm_head" not in name} if weight else set())


def constant_reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def test_consistency_of_an_adapter_uses_its_own_states(dense_model: Path, tmp_path: Path, run_arguments: dict) -> None:
    """`multi_objective_dpo` logs the same for an adapter and for the model it was merged into."""
    folder = save_adapter(tmp_path / "adapter", dense_model, lora(use_rslora=True))
    loss = {
        "type": "multi_objective_dpo",
        "auxiliary_losses": {"consistency": {"threshold": 0.2}},
        "auxiliary_weights": {"consistency": 1.0},
    }
    records = []
    model = trained(dense_model, lora(use_rslora=True))
    for each in (model, from_folder(dense_model, folder).merge_and_unload().requires_grad_(True)):
        reference = {} if isinstance(each, PeftModel) else {"ref_model": copy.deepcopy(each)}
        trainer = dpo(each, run_arguments, loss, **reference)
        records.append(measure(trainer, first_batch(trainer)).metrics)
    assert records[0]["main_dpo_loss"] == pytest.approx(LOG_2, rel=1e-4)
    names = ("consistency_neighbours", "auxiliary_consistency_loss", "logps/chosen", "entropy")
    assert [records[0][name] for name in names] == pytest.approx([records[1][name] for name in names], abs=1e-4)
    assert records[0]["consistency_neighbours"] > 0
