"""Names of metrics: those that the trainers log themselves, and what becomes of a loss's that are equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: What Trainer and TRL log themselves.
_TRAINER_METRICS = frozenset(
    {
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "step",
        "train_loss",
        "train_runtime",
        "total_flos",
        "num_tokens",
        "num_input_tokens_seen",
        "entropy",
        "mean_token_accuracy",
        "logits/chosen",
        "logits/rejected",
        "logps/chosen",
        "logps/rejected",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "aux_loss",
        "kl",
        "policy_loss",
        "entropy_coef",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "step_time",
    }
)
_TRAINER_PREFIXES = ("rewards/", "completions/", "sampling/", "tools/", "profiling/")


def apart_from_the_trainers(metrics: Mapping[str, Any], loss: str) -> dict[str, Any]:
    """A loss's metrics; one that would replace a metric of the trainer is named `<loss>/<metric>`.

    Args:
        metrics: By name.
        loss: Its name.
    """
    return {
        f"{loss}/{name}" if name in _TRAINER_METRICS or name.startswith(_TRAINER_PREFIXES) else name: value
        for name, value in metrics.items()
    }
