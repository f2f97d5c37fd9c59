"""Pairs of a rollout train a model as if they had never been split, beside GRPO or alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from trl_custom_losses.trainers import CustomGRPOTrainer
from trl_custom_losses.trainers.announce import describe

from .. import tiny
from .grpo_parity import assert_gradients, build_custom, numbered_prompts, rollout, weights

# Two prompts of four completions, shuffled and split into four micro-batches: one optimizer step.
STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_generations": 4, "max_steps": 1}
STEP |= {"optim": "sgd", "max_grad_norm": 1e9}

DPO = {"type": "rollout_pairs", "base": {"type": "sigmoid", "beta": 0.4}}
BOTH = {"type": "composed_dpo_grpo", "dpo": DPO["base"], "grpo": "grpo", "dpo_weight": 0.6, "grpo_weight": 0.25}


def checksum_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Tells completions apart."""
    return [sum(i * token for i, token in enumerate(ids, 1)) / 100 for ids in completion_ids]


def even_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """Scores completions of even length alone."""
    scores = checksum_reward(completion_ids)
    return [None if len(ids) % 2 else value for ids, value in zip(completion_ids, scores, strict=True)]


def no_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [1.0] * len(completion_ids)


class Gradients(TrainerCallback):
    """Keeps the gradient that the first optimizer step takes."""

    def __init__(self) -> None:
        self.taken: dict[str, Tensor | None] = {}

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        if not self.taken:
            self.taken = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def build(model: Path, run_arguments: dict, loss: Any, *, reward: Callable = checksum_reward, **options: Any) -> Any:
    trainer = {"rollout_func": rollout, "reward_funcs": [reward], "train_dataset": numbered_prompts()}
    trainer |= options.pop("trainer", {})
    return build_custom(model, run_arguments, loss_function=loss, trainer=trainer, **{**STEP, **options})


def train(trainer: CustomGRPOTrainer) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    """Run it; returns its first generation batch, before it is shuffled, and the gradient of the first step."""
    generated: list[dict[str, Any]] = []
    generate, gradients = trainer._generate_and_score_completions, Gradients()

    def keep(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        generated.append(generate(inputs))
        return generated[-1]

    trainer._generate_and_score_completions = keep
    trainer.add_callback(gradients)
    set_seed(0)
    trainer.train()
    return generated[0], gradients.taken


def log_probabilities(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Of the completion tokens, without TRL; 0 where there is none."""
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), dim=1)
    attention = torch.cat((batch["prompt_mask"], batch["completion_mask"]), dim=1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return logps[:, -batch["completion_ids"].size(1) :] * batch["completion_mask"]


def unsplit(trainer: CustomGRPOTrainer, path: Path, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The losses of the whole generation batch by hand, with the trainer's present weights and their graph."""
    model, adapter = trainer.model, hasattr(trainer.model, "peft_config")
    logps = log_probabilities(model, batch)
    with torch.no_grad(), model.disable_adapter() if adapter else nullcontext():
        refs = log_probabilities(model if adapter else tiny.load_model(path), batch)
    kept = [ids[mask > 0].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
    rewards = torch.tensor(checksum_reward(kept)).view(2, 4)
    chosen, rejected = (found + torch.tensor([0, 4]) for found in (rewards.argmax(1), rewards.argmin(1)))
    lengths = batch["completion_mask"].sum(1)
    ratios = (logps - refs).sum(1)
    means = ratios / lengths
    surrogate = -(batch["advantages"].unsqueeze(1) * torch.exp(logps - logps.detach()) * batch["completion_mask"])
    return {
        "sigmoid": -F.logsigmoid(0.4 * (ratios[chosen] - ratios[rejected])).mean(),
        "ipo": (means[chosen] - means[rejected] - 1.0).square().mean(),
        "sft": -logps[chosen].sum() / lengths[chosen].sum(),
        "grpo": (surrogate.sum(1) / lengths).mean(),
        "margin": (ratios[chosen] - ratios[rejected]).mean(),
    }


def by_hand(trainer: CustomGRPOTrainer, loss: Tensor) -> dict[str, Tensor | None]:
    named = dict(trainer.model.named_parameters())
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()))
    return dict.fromkeys(named) | dict(zip(trained, found, strict=True))


LOSSES: dict[str, tuple[Any, Callable[[dict[str, Tensor]], Tensor]]] = {
    "sigmoid": (DPO, lambda parts: parts["sigmoid"]),
    "ipo": ({"type": "rollout_pairs", "base": {"type": "ipo", "beta": 0.5}}, lambda parts: parts["ipo"]),
    "sft": ({"type": "rollout_pairs", "base": "sft"}, lambda parts: parts["sft"]),
    "composed_dpo_grpo": (BOTH, lambda parts: 0.6 * parts["sigmoid"] + 0.25 * parts["grpo"]),
}


@pytest.mark.parametrize("kind", ["dense", "lora"])
@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up_to_the_gradient_of_the_unsplit_loss(
    dense_model: Path, run_arguments: dict, loss: str, kind: str
) -> None:
    config, combine = LOSSES[loss]
    trainer = build(dense_model, run_arguments, config, kind=kind, beta=0.0)
    before = {name: value.clone() for name, value in weights(trainer).items()}
    batch, taken = train(trainer)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(before[name])
    trainer.model.eval()
    parts = unsplit(trainer, dense_model, batch)
    expected = combine(parts)
    assert_gradients(taken, by_hand(trainer, expected), rtol=1e-4, atol=1e-5)
    assert max(gradient.abs().max() for gradient in taken.values() if gradient is not None) > 1e-3
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert logged["frac_prompts_with_pair"] == 1.0
    if loss == "composed_dpo_grpo":
        assert logged["dpo_loss"] == pytest.approx(parts["sigmoid"].item(), rel=1e-4)
        assert logged["grpo_loss"] == pytest.approx(parts["grpo"].item(), abs=1e-6)
        assert logged["total_loss"] == pytest.approx(expected.item(), rel=1e-4)
        assert (logged["dpo_weight"], logged["grpo_weight"]) == pytest.approx((0.6, 0.25))
    if loss != "sft":
        assert logged["pair_margin"] == pytest.approx(parts["margin"].item(), rel=1e-4, abs=1e-5)


def test_a_reference_is_built_at_beta_0_only_if_the_pairs_need_one(dense_model: Path, run_arguments: dict) -> None:
    assert build(dense_model, run_arguments, BOTH, beta=0.0).ref_model is not None
    assert build(dense_model, run_arguments, {**BOTH, "dpo": "sft"}, beta=0.0).ref_model is None


def test_the_kl_coefficient_is_not_the_beta_of_dpo(dense_model: Path, run_arguments: dict) -> None:
    trainer = build(dense_model, run_arguments, {**BOTH, "dpo": "sigmoid"}, beta=0.04, epsilon=0.3)
    sigmoid, grpo = trainer.loss_function.leaves()
    assert (sigmoid.beta, grpo.epsilon, trainer.beta) == (0.1, 0.3, 0.04)
    trainer.train()
    assert "kl" in trainer.state.log_history[0]


def test_the_kl_term_is_added_once(dense_model: Path, run_arguments: dict) -> None:
    settings = [(BOTH, 0.0), (BOTH, 0.5), ({**BOTH, "dpo_weight": 0.0, "grpo_weight": 0.0}, 0.5)]
    trainers = [build(dense_model, run_arguments, loss, beta=beta) for loss, beta in settings]
    plain, both, term = (train(trainer)[1] for trainer in trainers)
    assert_gradients(both, {name: plain[name] + term[name] for name in plain}, rtol=1e-4, atol=1e-5)
    assert any(gradient.any() for gradient in term.values())


@pytest.mark.parametrize("reward", [no_reward, even_reward], ids=["equal", "unscored"])
def test_prompts_without_a_pair_are_left_out(dense_model: Path, run_arguments: dict, reward: Callable) -> None:
    trainer = build(dense_model, run_arguments, DPO, reward=reward)
    start = weights(trainer)
    batch, taken = train(trainer)
    logged = trainer.state.log_history[0]
    pairs = torch.stack([batch["loss_rewards"][:4].nan_to_num(-9), batch["loss_rewards"][4:].nan_to_num(-9)])
    if reward is no_reward:
        assert logged["loss"] == logged["frac_prompts_with_pair"] == 0
        assert "pair_margin" not in logged, "there is no pair to tell a margin of"
        assert all(torch.equal(start[name], tensor) for name, tensor in weights(trainer).items())
    else:
        scored = [len(set(rows[rows > -9].tolist())) > 1 for rows in pairs]
        assert logged["frac_prompts_with_pair"] == pytest.approx(sum(scored) / 2)
        assert any(gradient.any() for gradient in taken.values())


def test_the_defaults_train(dense_model: Path, run_arguments: dict) -> None:
    """adaptive_dpo and dynamic_grpo, reused rollouts, evaluation; pairs that span optimizer steps."""
    config = {"loss_function": {"type": "composed_dpo_grpo", "dpo": {"type": "adaptive_dpo", "warmup_steps": 2}}}
    config["loss_function"]["dpo_weight"] = {"schedule": "linear", "start": 1.0, "end": 0.2}
    config |= {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 4}
    config |= {"num_generations_eval": 4, "per_device_eval_batch_size": 8, "learning_rate": 0.05}
    trainer = build_custom(
        dense_model,
        run_arguments,
        trainer={
            "rollout_func": rollout,
            "reward_funcs": [checksum_reward],
            "train_dataset": numbered_prompts(),
            "eval_dataset": numbered_prompts(4),
        },
        **{**STEP, **config},
    )
    start = weights(trainer)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["dpo_weight"] for entry in history] == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert [entry["adaptive_beta"] for entry in history] == pytest.approx([0.01, 0.055, 0.1, 0.055])
    for entry in history:
        assert {"dpo_loss", "grpo_loss", "total_loss", "grpo_weight", "num_dynamic_groups"} <= entry.keys()
        assert entry["frac_prompts_with_pair"] == 1.0
        total = entry["dpo_weight"] * entry["dpo_loss"] + 0.3 * entry["grpo_loss"]
        assert entry["total_loss"] == pytest.approx(total, rel=1e-4)
    assert any((weights(trainer)[name] - tensor).abs().max() > 1e-4 for name, tensor in start.items())
    metrics = trainer.evaluate()
    assert metrics["eval_dpo_loss"] > 0 and metrics["eval_frac_prompts_with_pair"] == 1.0


def test_the_announcement_names_both_sides(dense_model: Path, run_arguments: dict) -> None:
    trainer = build(dense_model, run_arguments, {**BOTH, "dpo": "adaptive_dpo"}, epsilon=0.3)
    text = describe(trainer.loss_function)
    assert "weights={'dpo': 0.6, 'grpo': 0.25}" in text
    assert "dpo (rollout_pairs): base='adaptive_dpo'" in text
    assert "beta=0.1 (default)" in text and "warmup_steps=1000 (default)" in text
    assert "grpo: epsilon=0.3 (CustomGRPOConfig)" in text
