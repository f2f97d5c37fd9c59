"""What the policy surrogates share: the importance weights between the policy and the one that generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from ...base import PolicyLoss
from ...errors import LossConfigError
from ...hyperparameters import check_choice, check_range
from ...types import Metric, ModelOutputs, PolicyBatch, masked_sum

ImportanceLevel = Literal["token", "sequence"]

# Log weights are held within +-60 nats: beyond, exp() times an advantage overflows float32, and the gradient of a
# clipped, hence finite, loss would be 0 x infinity.
_LARGEST_LOG_WEIGHT = 60.0


class ImportanceWeightedLoss(PolicyLoss):
    """Base of surrogates of the ratio between the policy's probability and that at generation time.

    token level: log w_t = logp_t - old_logp_t;  sequence level: log w = mean over tokens of that, one per sequence.

    Args:
        importance_sampling_level: "token" or "sequence" (GSPO, Zheng et al. 2025, arXiv:2507.18071).
    """

    requires = frozenset({"old_per_token_logps"})

    def __init__(self, *, importance_sampling_level: ImportanceLevel = "token") -> None:
        super().__init__()
        self.importance_sampling_level = check_choice(
            "importance_sampling_level", importance_sampling_level, ImportanceLevel
        )

    def log_weights(self, outputs: ModelOutputs) -> Tensor:
        """log w, (B, T) or (B, 1), nats, with gradient."""
        return log_importance_weights(outputs, self.importance_sampling_level)

    def clipped_sequences(
        self, is_clipped: Callable[[], Tensor], batch: PolicyBatch, outputs: ModelOutputs
    ) -> dict[str, Metric]:
        """`clipped_sequences`, which sequences have a token that is clipped, where gradients are watched; else nothing.

        Args:
            is_clipped: Tells, when it is asked for, whether the clip acts, on each token or sequence, (B, T) or (B, 1),
                bool.
            batch: On tokens that its off-policy and high-entropy masks or vLLM ratios drop, nothing acts; they are not
                clipped.
            outputs: Its mask tells which tokens count; a sequence without any does not.
        """
        if not self.watching:
            return {}
        scored, clipped = outputs.mask > 0, is_clipped()
        for factor in batch.modifiers(self):
            clipped = clipped & (factor > 0)
        return {"clipped_sequences": Metric((clipped & scored).any(1).float(), mask=scored.any(1))}


def log_importance_weights(outputs: ModelOutputs, level: ImportanceLevel) -> Tensor:
    """Log of policy over generating policy, per token (B, T) or averaged per sequence (B, 1), within +-60 nats."""
    log_ratio = outputs.per_token_logps - outputs.old_per_token_logps
    if level == "sequence":
        log_ratio = (masked_sum(log_ratio, outputs.mask) / outputs.lengths).unsqueeze(-1)
    return log_ratio.clamp(-_LARGEST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT)


def clip_bounds(epsilon: float, epsilon_high: float | None) -> tuple[float, float]:
    """Check the clip range; the upper part equals the lower one if it is not given."""
    check_range("epsilon", epsilon, at_least=0)
    high = epsilon if epsilon_high is None else check_range("epsilon_high", epsilon_high, at_least=0)
    return epsilon, high


def check_delta(delta: float | None) -> float | None:
    """Check the upper bound of the two-sided clip."""
    if delta is not None and delta <= 0:
        raise LossConfigError(f"hyperparameter 'delta': expected a value > 0 or null, found {delta!r}")
    return delta
