"""However many losses are added up, and however their gradients are balanced, the model runs forwards and backwards
once for each micro-batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests import tiny
from trl_custom_losses import CustomDPOConfig, CustomDPOTrainer
from trl_custom_losses.balancing.gradients import AGGREGATORS

from .grpo_parity import build_custom, rollout

_COMPONENTS = {"dpo": ["sigmoid", "sft", "ipo", "hinge"], "grpo": ["grpo", "luspo", "dapo", "sapo"]}
_STEPS, _ACCUMULATION = 2, 2


def _count(model: nn.Module) -> Counter[str]:
    """Counts how often the backbone runs, and how often a gradient comes to what it returned and to its weights."""
    counts: Counter[str] = Counter()

    def forward(module: nn.Module, args: Any, output: Any) -> None:
        counts["forward"] += 1
        output.last_hidden_state.register_hook(lambda gradient: counts.update(["backward from the head"]))

    model.model.register_forward_hook(forward)
    parameters = {
        "embedding": model.model.embed_tokens.weight,
        "layer": model.model.layers[0].mlp.up_proj.weight,
        "head": model.lm_head.weight,
    }
    for name, parameter in parameters.items():
        parameter.register_hook(lambda gradient, name=name: counts.update([f"backward to the {name}"]))
    return counts


def _trainer(trainer: str, model: Path, arguments: dict, loss_function: dict) -> Any:
    config = {"gradient_accumulation_steps": _ACCUMULATION, "max_steps": _STEPS}
    if trainer == "grpo":
        options = {"loss_function": loss_function, "trainer": {"rollout_func": rollout}}
        return build_custom(model, arguments, **options, **config)
    return CustomDPOTrainer(
        model=tiny.load_model(model, seed=1),
        ref_model=tiny.load_model(model),
        args=CustomDPOConfig(**arguments | config, per_device_train_batch_size=2, loss_function=loss_function),
        train_dataset=tiny.preference_data(),
        processing_class=tiny.tokenizer(),
    )


@pytest.mark.parametrize(
    ("components", "balancing"),
    [(1, None), (2, None), (4, None), *((2, method) for method in AGGREGATORS), (4, "cagrad")],
)
@pytest.mark.parametrize("trainer", ["dpo", "grpo"])
def test_one_forward_and_one_backward_for_a_micro_batch(
    trainer: str, components: int, balancing: str | None, dense_model: Path, run_arguments: dict
) -> None:
    parts = [{"type": name} for name in _COMPONENTS[trainer][:components]]
    loss_function = {"type": "composed", "components": parts, "balancing": balancing}
    run = _trainer(trainer, dense_model, run_arguments, loss_function)
    counts = _count(run.model)
    run.train()
    expected = _STEPS * _ACCUMULATION
    names = [
        "forward",
        "backward from the head",
        *(f"backward to the {name}" for name in ("embedding", "layer", "head")),
    ]
    assert counts == dict.fromkeys(names, expected)
    if balancing is not None:
        assert run.loss_function.balancer.steps == _STEPS
        assert any(name.startswith("grad_cosine/") for name in run.state.log_history[0])
