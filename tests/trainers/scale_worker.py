"""Trains the losses that users scale up, each in one batch and accumulated, in full and with LoRA.

Started by `launching.launch`: python -m tests.trainers.scale_worker MODEL OUTPUT
"""

from __future__ import annotations

from typing import Any

from trl_custom_losses.trainers.launch import end_rank

from .distributed_worker import HIDDEN, main

OPPOSED = [{"type": "apo_down", "name": "pref", "beta": 0.5}, {"type": "sft", "name": "sft", "weight": 0.3}]
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"family": "dpo", "loss": "sigmoid"},
    "adaptive_dpo": {"family": "dpo", "loss": {"type": "adaptive_dpo", "strategy": "margin", "beta": 0.5}},
    "multi_objective_dpo": {
        "family": "dpo",
        "loss": {"type": "multi_objective_dpo", "auxiliary_losses": {"perplexity": {}}},
    },
    "multi_objective_dpo_hidden": {
        "family": "dpo",
        "loss": {
            "type": "multi_objective_dpo",
            "auxiliary_losses": {"perplexity": {}, "consistency": {"threshold": -1.0}},
        },
    },
    # Components that pull the chosen answers apart, so that the balancing has something to do at every step.
    "composed": {"family": "dpo", "loss": {"type": "composed", "components": OPPOSED, "balancing": "mgda"}},
    "grpo": {"family": "grpo", "loss": "grpo", "config": {"beta": 0.1}},
    "dynamic_grpo": {"family": "grpo", "loss": {"type": "dynamic_grpo", **HIDDEN}},
    "composed_dpo_grpo": {
        "family": "grpo",
        "loss": {"type": "composed_dpo_grpo", "dpo": {"type": "sigmoid", "beta": 0.5}},
    },
}
# `consistency` compares the pairs of a micro-batch with one another, so accumulation changes it by definition.
COUPLED = ("multi_objective_dpo_hidden",)
MODES = ("full", "lora")

CASES: dict[str, dict[str, Any]] = {
    f"{name}_{mode}{suffix}": {**case, "steps": 5, "lora": mode == "lora", "accumulation": accumulation}
    for name, case in LOSSES.items()
    for mode in MODES
    for suffix, accumulation in (("", 1), ("_accumulated", 2))
}

if __name__ == "__main__":
    main(CASES)
    end_rank()
