"""A configuration of every registered loss, and of some variants."""

from __future__ import annotations

from typing import Any

from trl_custom_losses import LossFunctionRegistry

_COMPONENTS: dict[str, list[dict[str, Any]]] = {
    "preference": [{"type": "sigmoid", "weight": 0.7}, {"type": "sft", "weight": 0.2}],
    "policy": [{"type": "grpo", "weight": 0.7}, {"type": "dapo", "weight": 0.2}],
}
_OBJECTIVES: dict[str, dict[str, Any]] = {
    "preference": {"main": {"type": "sigmoid"}, "other": "sft"},
    "policy": {"main": {"type": "grpo"}, "other": "dapo"},
}


def _weighted(family: str) -> list[tuple[str, dict[str, Any]]]:
    """Compositions of either family."""
    dynamic = {"type": "dynamic_multi_objective", "objectives": _OBJECTIVES[family], "initial_weights": {"other": 0.3}}
    return [
        ("composed", {"type": "composed", "components": _COMPONENTS[family]}),
        ("composed-balanced", {"type": "composed", "components": _COMPONENTS[family], "balancing": "upgrad"}),
        ("dynamic_multi_objective", dynamic),
        ("dynamic_multi_objective-kl", dynamic | {"rule": "constraint", "targets": {"other": 0.1}, "signal": "kl"}),
        ("dynamic_multi_objective-uncertainty", dynamic | {"rule": "uncertainty", "initial_weights": {}}),
    ]


_VARIANTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "preference": [
        ("sigmoid-forward_kl", {"type": "sigmoid", "f_divergence_type": "forward_kl"}),
        ("hinge-js_divergence", {"type": "hinge", "f_divergence_type": "js_divergence"}),
        ("ipo-alpha_divergence", {"type": "ipo", "f_divergence_type": "alpha_divergence"}),
        ("aot-smoothed", {"type": "aot", "label_smoothing": 0.2}),
        ("robust-smoothed", {"type": "robust", "label_smoothing": 0.2}),
        ("adaptive_dpo-margin", {"type": "adaptive_dpo", "strategy": "margin", "base": "ipo"}),
        ("adaptive_dpo-kl", {"type": "adaptive_dpo", "strategy": "kl", "target_kl": 1.0, "base": "aot"}),
        ("clipped_loss", {"type": "clipped_loss", "base_loss": "sigmoid"}),
        (
            "clipped_loss-sequence",
            {
                "type": "clipped_loss",
                "base_loss": {"type": "composed", "components": _COMPONENTS["preference"]},
                "per": "sequence",
            },
        ),
        ("perplexity-both", {"type": "perplexity", "completions": "both"}),
        ("consistency-rdrop", {"type": "consistency", "mode": "rdrop"}),
        (
            "multi_objective_dpo-consistency",
            {"type": "multi_objective_dpo", "auxiliary_losses": {"consistency": {"threshold": -0.5}}, "base": "ipo"},
        ),
    ],
    "policy": [
        ("grpo-delta", {"type": "grpo", "epsilon_high": 0.3, "delta": 1.5}),
        ("luspo-sequence", {"type": "luspo", "importance_sampling_level": "sequence"}),
        ("sapo-sequence", {"type": "sapo", "importance_sampling_level": "sequence"}),
        ("cispo-sequence", {"type": "cispo", "epsilon_high": 5.0, "importance_sampling_level": "sequence"}),
        ("clipped_loss", {"type": "clipped_loss", "base_loss": "grpo"}),
        (
            "clipped_loss-sequence",
            {"type": "clipped_loss", "base_loss": "luspo", "per": "sequence", "max_grad_norm": 100.0},
        ),
        ("dynamic_grpo-tokens", {"type": "dynamic_grpo", "embedding": "tokens", "similarity_threshold": 0.3}),
        ("dra_grpo-tokens", {"type": "dra_grpo", "embedding": "tokens", "negative_rewards": "multiply"}),
        ("composed_dpo_grpo-sigmoid", {"type": "composed_dpo_grpo", "dpo": "sigmoid", "grpo": "grpo"}),
        ("rollout_pairs-ipo", {"type": "rollout_pairs", "base": "ipo"}),
        ("rollout_pairs-sft", {"type": "rollout_pairs", "base": "sft"}),
        (
            "rollout_pairs-composed",
            {"type": "rollout_pairs", "base": {"type": "composed", "components": _COMPONENTS["preference"]}},
        ),
    ],
}


def configs(family: str) -> dict[str, dict[str, Any]]:
    """A configuration of every registered loss of a family, and some variants, by test id."""
    found = {
        name: {"type": name, **LossFunctionRegistry.get(name).example}
        for name in LossFunctionRegistry.names(family)
        if name not in ("composed", "clipped_loss", "dynamic_multi_objective")
    }
    return found | dict(_weighted(family)) | dict(_VARIANTS[family])
