"""What a loss can ask of a rollout: the policy's outputs on it, states of other texts, the completions as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOTrainer

from trl_custom_losses import LossConfigError, ModelOutputs, PolicyBatch, PolicyLoss, Rollout
from trl_custom_losses.trainers import CustomGRPOTrainer

from .. import tiny
from .grpo_parity import build_custom, numbered_prompts, rollout, tool_rollout

TEXTS = ["abc", "", "a long answer", "7", "no.", "x y z", "abc", "?!"]


class Asks(PolicyLoss):
    """Asks for everything in `prepare` and keeps what it got, and what it saw in the training forward."""

    requires = frozenset({"pooled_hidden", "old_per_token_logps"})
    rollout_requires = frozenset({"pooled_hidden"})
    columns = ("answer",)

    def __init__(self, texts: list[str] | None = None) -> None:
        super().__init__()
        self.texts = texts
        self.rollouts: list[tuple[Rollout, ModelOutputs, Tensor | None]] = []
        self.seen: list[tuple[PolicyBatch, ModelOutputs]] = []

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        outputs = rollout.forward()
        assert rollout.forward() is outputs
        states = None if self.texts is None else rollout.encode(self.texts)
        self.rollouts.append((rollout, outputs, states))
        return {"logps": outputs.per_token_logps, "state": outputs.pooled_hidden}

    def forward(self, batch: PolicyBatch, model_outputs: ModelOutputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        self.seen.append((batch, model_outputs))
        return -batch.advantages * model_outputs.per_token_logps, {}


#: Generation batches of 8 completions, run through the model by twos or threes.
SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_generations": 4, "max_steps": 1}


def build(model: Path, run_arguments: dict, loss: PolicyLoss, **options: Any) -> CustomGRPOTrainer:
    trainer = {"rollout_func": rollout, "train_dataset": numbered_prompts(), **options.pop("trainer", {})}
    return build_custom(model, run_arguments, loss_function=loss, trainer=trainer, **{**SPLIT, **options})


def compare(loss: Asks, **tolerance: float) -> None:
    """The rollout's outputs are those of the training forward, row by row."""
    rows = 0
    for batch, outputs in loss.seen:
        mask = batch.mask.bool()
        torch.testing.assert_close(batch["logps"][mask], outputs.per_token_logps.detach()[mask], **tolerance)
        torch.testing.assert_close(batch["state"], outputs.pooled_hidden.detach(), **tolerance)
        assert outputs.pooled_hidden.requires_grad and not batch["state"].requires_grad
        assert batch["state"].dtype is torch.float32
        rows += batch.mask.size(0)
    assert rows == 8
    assert len({length for batch, _ in loss.seen for length in batch.mask.sum(1).tolist()}) > 1, "nothing was ragged"


@pytest.mark.parametrize("kind", ["dense", "lora", "moe"])
@pytest.mark.parametrize("split", [(2, 4), (1, 8), (8, 1)], ids=str)
def test_forward_is_the_training_forward(
    dense_model: Path, moe_model: Path, run_arguments: dict, kind: str, split: tuple[int, int]
) -> None:
    path, kind = (moe_model, "dense") if kind == "moe" else (dense_model, kind)
    loss = Asks()
    size, accumulation = split
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    build(path, run_arguments, loss, kind=kind, **sizes).train()
    compare(loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"steps_per_generation": 8, "gradient_accumulation_steps": 4, "num_generations": 4},
        {"trainer": {"rollout_func": tool_rollout}, "mask_truncated_completions": True},
        {"beta": 0.1},
    ],
    ids=["temperature", "old log-probabilities", "tools", "reference"],
)
def test_forward_under_options(dense_model: Path, run_arguments: dict, options: dict) -> None:
    loss = Asks()
    build(dense_model, run_arguments, loss, **options).train()
    for batch, outputs in loss.seen:
        mask = batch.mask.bool()
        torch.testing.assert_close(batch["logps"][mask], outputs.per_token_logps.detach()[mask], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(batch["state"], outputs.pooled_hidden.detach(), rtol=1e-5, atol=1e-5)
        empty = ~mask.any(1)
        assert not batch["state"][empty].any() and batch["state"][~empty].any(1).all()
    _, outputs, _ = loss.rollouts[0]
    assert outputs.has("ref_per_token_logps") == ("beta" in options)


def test_states_are_as_exact_in_a_rollout_as_in_training_under_mixed_precision(
    dense_model: Path, run_arguments: dict
) -> None:
    """The model runs in bfloat16, but the mean over tokens is taken in float32 by both."""
    loss = Asks()
    build(dense_model, {**run_arguments, "bf16": True}, loss).train()
    compare(loss, rtol=1e-6, atol=1e-6)


def test_forward_in_evaluation(dense_model: Path, run_arguments: dict) -> None:
    loss = Asks()
    options = {"trainer": {"eval_dataset": numbered_prompts(2)}, "per_device_eval_batch_size": 8}
    build(dense_model, run_arguments, loss, **options).evaluate()
    for batch, outputs in loss.seen:
        torch.testing.assert_close(batch["state"], outputs.pooled_hidden, rtol=1e-5, atol=1e-5)


def test_states_are_not_computed_for_a_loss_that_names_none(dense_model: Path, run_arguments: dict) -> None:
    class Logps(Asks):
        rollout_requires = frozenset()

        def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
            outputs = rollout.forward()
            assert not outputs.has("pooled_hidden")
            return {"logps": outputs.per_token_logps}

    loss = Logps()
    build(dense_model, run_arguments, loss).train()
    for batch, outputs in loss.seen:
        mask = batch.mask.bool()
        torch.testing.assert_close(batch["logps"][mask], outputs.per_token_logps.detach()[mask], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def encoded_by_hand(trainer: CustomGRPOTrainer, prompts: list[str], texts: list[str]) -> Tensor:
    """Mean last hidden state of each text after its prompt, one row at a time."""
    model = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
    tokens, states = trainer.processing_class, []
    for prompt, text in zip(prompts, texts, strict=True):
        start, end = tokens(prompt)["input_ids"], tokens(text)["input_ids"]
        hidden = model.model(input_ids=torch.tensor([start + end])).last_hidden_state[0, len(start) :]
        states.append(hidden.mean(0) if end else torch.zeros(hidden.size(1)))
    return torch.stack(states)


class EncodesFirst(Asks):
    """Compares what `encode` says with the model as it is then."""

    def __init__(self) -> None:
        super().__init__(TEXTS)
        self.trainer: CustomGRPOTrainer
        self.prompts: list[str] = []

    def prepare(self, rollout: Rollout) -> dict[str, Tensor]:
        prepared = super().prepare(rollout)
        expected = encoded_by_hand(self.trainer, self.prompts, TEXTS)
        torch.testing.assert_close(self.rollouts[-1][2], expected, rtol=1e-4, atol=1e-5)
        return prepared


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_encode_is_a_forward_on_prompt_and_text(dense_model: Path, run_arguments: dict, kind: str) -> None:
    loss = EncodesFirst()
    prompts = ["1=", "a longer prompt?"]

    def seen_rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        loss.prompts = prompts
        return rollout(prompts, trainer)

    data = Dataset.from_list([{"prompt": prompt, "answer": prompt} for prompt in prompts])
    options = {"trainer": {"rollout_func": seen_rollout, "train_dataset": data}}
    loss.trainer = build(dense_model, run_arguments, loss, kind=kind, **options)
    loss.trainer.train()
    (_, outputs, states), *_ = loss.rollouts
    assert len(set(map(len, loss.prompts))) == 2
    assert states.shape == outputs.pooled_hidden.shape and states.dtype is torch.float32
    assert not states[1].any() and states[[0, 2, 3, 4, 5, 6, 7]].any(1).all()


def test_encoding_nothing_but_empty_texts(dense_model: Path, run_arguments: dict) -> None:
    loss = Asks([""] * 8)
    build(dense_model, run_arguments, loss).train()
    assert not loss.rollouts[0][2].any()


@pytest.mark.parametrize("masked", [False, True], ids=["kept", "truncated ones masked"])
def test_texts_are_the_whole_completions(dense_model: Path, run_arguments: dict, masked: bool) -> None:
    loss = Asks()
    texts: list[str] = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        texts.extend(completions)
        return [float(len(text)) for text in completions]

    options = {"trainer": {"reward_funcs": [reward]}, "mask_truncated_completions": masked}
    build(dense_model, run_arguments, loss, **options).train()
    generation = loss.rollouts[0][0]
    assert generation.texts() == texts
    assert (generation.mask.sum(1) == 0).any() == masked


# The losses that ask


def targets(rows: int = 8) -> Dataset:
    return tiny.prompt_data(rows).rename_column("answer", "target")


LOSSES: dict[str, Any] = {
    "dynamic_grpo": {"type": "dynamic_grpo", "similarity_threshold": 0.7},
    "dynamic_grpo-tokens": {"type": "dynamic_grpo", "embedding": "tokens", "similarity_threshold": 0.2},
    "dynamic_grpo-function": {"type": "dynamic_grpo", "embedding": f"{__name__}:embed", "scope": "prompt"},
    "dra_grpo": "dra_grpo",
    "dra_grpo-tokens": {"type": "dra_grpo", "embedding": "tokens"},
    "diversity": "diversity",
    "quality": "quality",
    "multi_objective_grpo": {
        "type": "multi_objective_grpo",
        "diversity_weight": {"schedule": "linear", "start": 0.0, "end": 0.3},
    },
    "multi_objective_grpo-nested": {
        "type": "multi_objective_grpo",
        "base": {"type": "dynamic_grpo", "embedding": "tokens"},
        "balancing": "upgrad",
    },
}
LOGGED = {
    "dynamic": {"num_dynamic_groups", "avg_group_size", "frac_singleton_groups", "clip_ratio/low_mean"},
    "dra": {"redundancy", "clip_ratio/low_mean"},
    "multi": {"main_grpo_loss", "diversity_loss", "quality_loss", "total_loss", "diversity_weight", "quality_weight"},
}


def embed(texts: list[str]) -> Tensor:
    return torch.tensor([[len(text), text.count("1"), 1.0] for text in texts])


@pytest.mark.parametrize("kind", ["dense", "lora"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_train(dense_model: Path, run_arguments: dict, name: str, kind: str) -> None:
    trainer = build(
        dense_model,
        run_arguments,
        LOSSES[name],
        kind=kind,
        trainer={"train_dataset": targets(), "eval_dataset": targets(2)},
        max_steps=2,
        per_device_eval_batch_size=8,
    )
    trainer.train()
    steps = trainer.state.log_history[:2]
    for step in steps:
        assert step["grad_norm"] > 0
        assert LOGGED.get(name.split("_")[0], set()) <= step.keys()
    if name == "multi_objective_grpo":
        assert [step["diversity_weight"] for step in steps] == pytest.approx([0.0, 0.15])
        for step in steps:
            parts = step["diversity_weight"] * step["diversity_loss"] + step["quality_weight"] * step["quality_loss"]
            assert step["total_loss"] == pytest.approx(step["main_grpo_loss"] + parts, abs=1e-6)
            assert -2 < step["diversity_loss"] < 0 < step["quality_loss"] < 2
    if "dynamic_grpo" in name:
        assert 1 <= steps[0]["num_dynamic_groups"] <= 8
        assert steps[0]["avg_group_size"] == pytest.approx(8 / steps[0]["num_dynamic_groups"])
    metrics = trainer.evaluate()
    assert all(f"eval_{metric}" in metrics for metric in LOGGED.get(name.split("_")[0], ()))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_of_one_have_trls_advantages(dense_model: Path, run_arguments: dict, scale: str) -> None:
    loss = {"type": "dynamic_grpo", "max_group_size": 1, "embedding": "tokens"}
    trainer = build(dense_model, run_arguments, loss, scale_rewards=scale, reward_weights=[1.0, 0.3])
    assert trainer.loss_function.scale_rewards == scale
    prepare, seen = trainer.loss_function.prepare, []

    def compared(rollout: Rollout) -> dict[str, Tensor]:
        seen.append((prepare(rollout), rollout))
        return seen[-1][0]

    trainer.loss_function.prepare = compared
    trainer.train()
    for prepared, generation in seen:
        assert generation.advantages.any()
        torch.testing.assert_close(prepared["advantages"], generation.advantages, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["quality", "multi_objective_grpo"])
def test_a_missing_target_is_reported_before_a_model_loads(run_arguments: dict, loss: str) -> None:
    with pytest.raises(LossConfigError, match=f"'{loss}' needs the column 'target', which `train_dataset` lacks"):
        build(Path("no/such/model"), run_arguments, loss)


def test_without_quality_no_target_is_needed(dense_model: Path, run_arguments: dict) -> None:
    trainer = build(dense_model, run_arguments, {"type": "multi_objective_grpo", "quality_weight": 0})
    trainer.train()
    assert "quality_loss" not in trainer.state.log_history[0]
    assert "diversity_loss" in trainer.state.log_history[0]


def test_options_of_trl_that_cannot_be_honoured_are_reported_before_a_model_loads(run_arguments: dict) -> None:
    with pytest.raises(LossConfigError, match="normalize_then_sum"):
        build(
            Path("no/such/model"),
            run_arguments,
            "dra_grpo",
            multi_objective_aggregation="normalize_then_sum",
        )
