"""The data of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..fields import ExplainsMissingFields, optional
from .common import Denominators, Ranks


@dataclass(kw_only=True, eq=False, repr=False)
class PreferenceBatch(ExplainsMissingFields):
    """A micro-batch of B preference pairs; see the table in `types`.

    Args:
        input_ids: Tokens of prompt and completion, (2B, T + 1).
        attention_mask: 1 for tokens, 0 for padding, (2B, T + 1).
        mask: 1 where position t predicts a completion token, (2B, T).
        columns: Data-set columns that the loss named, each (B,) or a list of B.
        pair_weights: Weights that multiply each pair's loss (WPO), (B,), detached; applied by the framework.
        pair_mask: 0 for rows that hold no pair and must not count, (B,); applied by the framework.
        ranks: The processes that train together.
        denominators: Set by the trainer; without it the micro-batch counts as the whole batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    columns: Mapping[str, Any] = field(default_factory=dict)
    pair_weights: Tensor | None = optional()
    pair_mask: Tensor | None = optional()
    ranks: Ranks = field(default_factory=Ranks)
    denominators: Denominators = optional()

    family = "preference"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.has("denominators"):
            self.denominators = Denominators(
                sequences=float(self.num_pairs),
                tokens=self.mask.sum().clamp(min=1),
                chosen_tokens=self.mask[: self.num_pairs].sum().clamp(min=1),
            )

    @property
    def num_pairs(self) -> int:
        """Number of pairs B."""
        return self.mask.size(0) // 2

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def rows(self, count: int) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Mask, sequence denominator and token denominator for a loss with `count` rows.

        B rows stand for the pairs (per token: the chosen completions), 2B rows for all completions.
        """
        if count == self.num_pairs:
            return self.mask[:count], self.denominators.sequences, self.denominators.chosen_tokens
        if count == 2 * self.num_pairs:
            return self.mask, 2 * self.denominators.sequences, self.denominators.tokens
        raise ValueError(
            f"a preference loss has {self.num_pairs} rows (one per pair) or {2 * self.num_pairs} (chosen, then "
            f"rejected) for this batch, found {count}"
        )

    def apply_modifiers(self, loss: Any, raw: Tensor) -> Tensor:
        """Multiply the pair mask and the pair weights into an unreduced loss."""
        if self.has("pair_mask"):
            raw = self._per_pair(raw, self.pair_mask, "this batch has rows without a pair")
        if not self.has("pair_weights"):
            return raw
        if loss.pair_weighting == "mean" and raw.dim() > 0:
            return raw * self.pair_weights.to(raw.dtype).mean()
        return self._per_pair(raw, self.pair_weights, "`use_weighting=True` weights each pair")

    def _per_pair(self, raw: Tensor, factors: Tensor, why: str) -> Tensor:
        if raw.dim() == 0:
            raise ValueError(f"{why}, but the loss returned a scalar. Return one value per pair, (B,), or per token.")
        factors = factors.to(raw.dtype).repeat(raw.size(0) // self.num_pairs)
        return raw * factors.view(-1, *[1] * (raw.dim() - 1))

    def scoped(self, component: str) -> PreferenceBatch:
        """The batch as a component of a composition sees it (preference losses prepare nothing)."""
        return self


@dataclass(kw_only=True, eq=False, repr=False)
class PolicyBatch(ExplainsMissingFields):
    """A micro-batch of B sampled completions; see the table in `types`.

    Args:
        prompt_ids: (B, P), padded left.
        completion_ids: (B, T), padded right.
        mask: 1 for completion tokens that the policy produced (tool results and padding are 0), (B, T).
        advantages: (B, 1) or (B, T).
        rewards: Raw rewards, (B, F), NaN = not scored.
        group_ids: Index of the completion's prompt in the generation batch, the same on all ranks, (B,).
        on_policy_mask: 0 where a sequence has drifted off-policy, which drops it if its advantage is negative,
            (B, 1); applied by the framework.
        entropy_mask: 1 on high-entropy tokens, where those alone are trained, (B, T); applied by the framework.
        importance_sampling_ratio: vLLM correction, (B, 1) or (B, T); applied by the framework unless the loss sets
            `uses_importance_sampling_ratio`.
        columns: Data-set columns that the loss named.
        prepared: What `prepare(rollout)` returned, each (B, ...).
        ranks: The processes that train together.
        denominators: Set by the trainer; without it the micro-batch counts as the whole batch.
    """

    prompt_ids: Tensor
    completion_ids: Tensor
    mask: Tensor
    advantages: Tensor
    rewards: Tensor = optional()
    group_ids: Tensor = optional()
    on_policy_mask: Tensor = optional()
    entropy_mask: Tensor = optional()
    importance_sampling_ratio: Tensor = optional()
    columns: Mapping[str, Any] = field(default_factory=dict)
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Ranks)
    denominators: Denominators = optional()

    family = "policy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advantages.dim() == 1:
            self.advantages = self.advantages.unsqueeze(1)
        if not self.has("denominators"):
            self.denominators = Denominators(sequences=float(self.mask.size(0)), tokens=self.mask.sum().clamp(min=1))

    def __getitem__(self, name: str) -> Any:
        return self.prepared[name] if name in self.prepared else self.columns[name]

    def rows(self, count: int) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Mask, sequence denominator and token denominator for a loss with `count` rows."""
        if count != self.mask.size(0):
            raise ValueError(f"a policy loss has {self.mask.size(0)} rows for this batch, found {count}")
        return self.mask, self.denominators.sequences, self.denominators.tokens

    def modifiers(self, loss: Any) -> list[Tensor]:
        """The off-policy mask, the high-entropy mask and the vLLM ratio that act on a loss, (B, 1) or (B, T)."""
        factors: list[Tensor] = []
        if self.has("on_policy_mask"):
            factors.append((self.advantages >= 0) | (self.on_policy_mask > 0))
        if self.has("entropy_mask"):
            factors.append(self.entropy_mask)
        if self.has("importance_sampling_ratio") and not loss.uses_importance_sampling_ratio:
            factors.append(self.importance_sampling_ratio)
        return factors if loss.surrogate else []

    def apply_modifiers(self, loss: Any, raw: Tensor) -> Tensor:
        """Multiply the off-policy mask, the high-entropy mask and the vLLM ratio into an unreduced surrogate."""
        factors = self.modifiers(loss)
        if not factors:
            return raw
        if raw.dim() != 2:
            raise ValueError(
                "off-policy masks, high-entropy masks and vLLM ratios act on tokens, but the loss returned shape "
                f"{tuple(raw.shape)}. Return (B, T) or (B, 1), or set `surrogate = False` for an auxiliary term."
            )
        for factor in factors:
            raw = raw * factor
        return raw

    def scoped(self, component: str) -> PolicyBatch:
        """The batch as the component `component` of a composition sees it: only what that component prepared.

        Advantages that a component prepared replace the trainer's for that component alone.
        """
        prefix = f"{component}."
        prepared = {name[len(prefix) :]: value for name, value in self.prepared.items() if name.startswith(prefix)}
        changes = {"advantages": prepared["advantages"]} if "advantages" in prepared else {}
        return self.replace(prepared=prepared, **changes)
