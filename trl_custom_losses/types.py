"""What a loss sees: the batch (data) and the model outputs (what the forward passes produced).

Shapes use B for the pairs (preference) or sequences (policy) of one micro-batch on one device, T for the scored
positions and H for the hidden size. Log-probabilities are natural logarithms, so their unit is nats.

| field | shape | meaning | present |
|---|---|---|---|
| `outputs.per_token_logps` | (2B, T) or (B, T) | policy log-probability of each token, with gradient | always |
| `outputs.mask` | same | 1 where the position is a scored completion token | always |
| `outputs.entropies` | same | entropy of the next-token distribution, nats, with gradient | always |
| `outputs.logps`, `.mean_logps`, `.lengths` | (2B,) or (B,) | sum, mean and number of completion tokens | always |
| `outputs.ref_logps`, `.log_ratios` | (2B,) or (B,) | reference sum; policy minus reference | preference: always; \
policy: with `ref_per_token_logps` |
| `outputs.ref_per_token_logps` | as `per_token_logps` | reference log-probability of each token | required |
| `outputs.old_per_token_logps` | (B, T) | log-probabilities at generation time, detached | policy: always |
| `outputs.pooled_hidden` | (2B, H) or (B, H) | mean last hidden state of the completion, float32, with gradient | \
required |
| `outputs.logits` | (2B, T, V) or (B, T, V) | logits over temperature, with gradient: costs memory | required |
| `batch.columns[name]` | (B,) or list of B | data-set columns that the loss names in `columns` | declared |
| `batch.advantages` | (B, 1) or (B, T) | advantages | policy: always |
| `batch.rewards` | (B, F) | raw reward of each function, NaN where a function did not score | policy trainer |
| `batch.group_ids` | (B,) | which prompt of the generation batch a completion answers | policy trainer |
| `batch.prepared[name]` | (B, ...) | what the loss's `prepare(rollout)` returned | policy, with `prepare` |

Preference rows are ordered chosen first, then rejected, so `x.chunk(2)` splits them. "Required" fields are computed
only when the loss names them in `requires`; reading one that was not required raises `MissingFieldError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .fields import ExplainsMissingFields, optional

Family = Literal["preference", "policy"]

#: What a loss may name in `requires`.
REQUIREMENTS: dict[str, frozenset[str]] = {
    "preference": frozenset({"ref_logps", "ref_per_token_logps", "entropies", "pooled_hidden", "logits"}),
    "policy": frozenset(
        {"ref_per_token_logps", "old_per_token_logps", "entropies", "pooled_hidden", "logits", "rewards", "group_ids"}
    ),
}


#: (values (N, T), mask (N, T), sequence denominator, token denominator, denominators) -> scalar
TokenReduction = Callable[[Tensor, Tensor, "Tensor | float", "Tensor | float", "Denominators"], Tensor]


@dataclass(kw_only=True, eq=False)
class Denominators:
    """What sums over one micro-batch are divided by.

    The trainer scales them so that summing the gradients of all micro-batches and averaging them over ranks gives
    the mean over the whole optimizer step.

    Args:
        sequences: Number of pairs (preference) or sequences (policy).
        tokens: Number of scored tokens of all rows, counted as at least 1 before any scaling.
        chosen_tokens: The same of the chosen rows (preference only).
        micro_batches: What a value that is already a mean over the micro-batch is divided by.
    """

    sequences: Tensor | float
    tokens: Tensor | float
    chosen_tokens: Tensor | float = 0.0
    micro_batches: float = 1.0


@dataclass(kw_only=True, eq=False, repr=False)
class PreferenceBatch(ExplainsMissingFields):
    """A micro-batch of B preference pairs; see the table at the top of this module.

    Args:
        input_ids: Tokens of prompt and completion, (2B, T + 1).
        attention_mask: 1 for tokens, 0 for padding, (2B, T + 1).
        mask: 1 where position t predicts a completion token, (2B, T).
        columns: Data-set columns that the loss named, each (B,) or a list of B.
        pair_weights: Weights that multiply each pair's loss (WPO), (B,), detached; applied by the framework.
        denominators: Set by the trainer; without it the micro-batch counts as the whole batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    columns: Mapping[str, Any] = field(default_factory=dict)
    pair_weights: Tensor | None = optional()
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
        """Multiply the pair weights into an unreduced loss."""
        if not self.has("pair_weights"):
            return raw
        if raw.dim() == 0:
            raise ValueError(
                "`use_weighting=True` weights each pair, but the loss returned a scalar. Return one value per pair, "
                "(B,), or per token."
            )
        weights = self.pair_weights.to(raw.dtype)
        if loss.pair_weighting == "mean":
            return raw * weights.mean()
        weights = weights.repeat(raw.size(0) // self.num_pairs)
        return raw * weights.view(-1, *[1] * (raw.dim() - 1))

    def scoped(self, component: str) -> PreferenceBatch:
        """The batch as a component of a composition sees it (preference losses prepare nothing)."""
        return self


@dataclass(kw_only=True, eq=False, repr=False)
class PolicyBatch(ExplainsMissingFields):
    """A micro-batch of B sampled completions; see the table at the top of this module.

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

    def apply_modifiers(self, loss: Any, raw: Tensor) -> Tensor:
        """Multiply the off-policy mask, the high-entropy mask and the vLLM ratio into an unreduced surrogate."""
        factors = []
        if self.has("on_policy_mask"):
            factors.append((self.advantages >= 0) | (self.on_policy_mask > 0))
        if self.has("entropy_mask"):
            factors.append(self.entropy_mask)
        if self.has("importance_sampling_ratio") and not loss.uses_importance_sampling_ratio:
            factors.append(self.importance_sampling_ratio)
        if not loss.surrogate or not factors:
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


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the last dimension where `mask` is not 0; masked values, NaN included, neither count nor get gradient.

    Args:
        values: (N, T).
        mask: (N, T).
    """
    return values.masked_fill(mask == 0, 0).sum(dim=-1)


@dataclass(kw_only=True, eq=False, repr=False)
class ModelOutputs(ExplainsMissingFields):
    """What the forward passes produced; N = 2B rows (chosen, then rejected) for pairs, N = B for completions.

    Args:
        per_token_logps: Policy log-probabilities, nats, (N, T), with gradient.
        mask: 1 where a position is scored, (N, T).
        entropies: Entropies, nats, (N, T), with gradient.
        ref_per_token_logps: Reference log-probabilities, (N, T).
        ref_sums: Reference sums where only those are known (precomputed), (N,).
        old_per_token_logps: Log-probabilities at generation time, (N, T), detached.
        completion_lengths: Number of completion tokens, (N,), where it can exceed the scored ones by a first token
            that nothing predicts.
        token_weights: Weights of tokens in `logps` and `ref_logps` (LD-DPO), (N, T).
        pooled_hidden: Mean last hidden state over completion tokens, (N, H), float32, with gradient.
        logits: (N, T, V), with gradient.
    """

    per_token_logps: Tensor
    mask: Tensor
    entropies: Tensor = optional()
    ref_per_token_logps: Tensor = optional()
    ref_sums: Tensor = optional()
    old_per_token_logps: Tensor = optional()
    completion_lengths: Tensor = optional()
    token_weights: Tensor = optional()
    pooled_hidden: Tensor = optional()
    logits: Tensor = optional()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) and name != "logits":
                setattr(self, name, value.float())  # loss arithmetic is float32 or better
        for name in ("ref_per_token_logps", "ref_sums", "old_per_token_logps", "token_weights"):
            if self.has(name):  # only the policy is trained
                setattr(self, name, getattr(self, name).detach())
        masked = self.mask == 0
        for name in ("per_token_logps", "entropies", "ref_per_token_logps", "old_per_token_logps"):
            if self.has(name):  # whatever stands at a masked position, a loss sees 0 there and sends no gradient back
                setattr(self, name, getattr(self, name).masked_fill(masked, 0))

    def _weighted_sum(self, per_token: Tensor) -> Tensor:
        if self.has("token_weights"):
            per_token = per_token * self.token_weights
        return per_token.sum(dim=1)  # 0 at masked positions since construction

    @property
    def lengths(self) -> Tensor:
        """Number of completion tokens of each row, at least 1, (N,)."""
        lengths = self.completion_lengths if self.has("completion_lengths") else self.mask.sum(dim=1)
        return lengths.clamp(min=1)

    @property
    def logps(self) -> Tensor:
        """Policy log-probability of each completion (LD-DPO weights applied), nats, (N,)."""
        return self._weighted_sum(self.per_token_logps)

    @property
    def mean_logps(self) -> Tensor:
        """`logps` over `lengths`, nats per token, (N,)."""
        return self.logps / self.lengths

    @property
    def ref_logps(self) -> Tensor:
        """Reference log-probability of each completion, nats, (N,)."""
        return self.ref_sums if self.has("ref_sums") else self._weighted_sum(self.ref_per_token_logps)

    @property
    def log_ratios(self) -> Tensor:
        """`logps - ref_logps`: the implicit reward over beta, nats, (N,)."""
        return self.logps - self.ref_logps


@dataclass(kw_only=True, eq=False)
class Rollout:
    """One generation batch as `PolicyLoss.prepare` sees it, before it is shuffled and split into micro-batches.

    N counts the completions of all ranks, B those of this rank: `tensor[local]` takes a gathered tensor's own part.

    Args:
        rewards: Raw rewards, (N, F), NaN = not scored.
        reward_weights: (F,).
        advantages: TRL's advantages, (N,).
        group_ids: Prompt index of each completion, (N,).
        completion_ids: This rank's completions, (B, T).
        mask: This rank's scored tokens, (B, T).
        columns: Declared data-set columns of this rank, (B,) or list of B.
        local: The slice of this rank's rows in a gathered tensor.
        gather: Collects a (B, ...) tensor over ranks to (N, ...); identity on one process.
    """

    rewards: Tensor
    reward_weights: Tensor
    advantages: Tensor
    group_ids: Tensor
    completion_ids: Tensor
    mask: Tensor
    columns: Mapping[str, Any]
    local: slice
    gather: Callable[[Tensor], Tensor]

    def scoped_result(self, component: str, prepared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name a component's tensors so that `PolicyBatch.scoped` finds them again."""
        return {f"{component}.{name}": value for name, value in prepared.items()}


@dataclass(frozen=True)
class Metric:
    """A metric that is not a plain average over sequences, tokens or micro-batches.

    Args:
        value: Detached tensor: scalar, (B,), (B, 1) or (B, T).
        per: "log" averages over everything since the last log, by count. "micro_batch" takes one value per global
            micro-batch and averages those, as TRL's own metrics do.
        reduce: "mean", or "min"/"max" over the sequences of a micro-batch (implies `per="micro_batch"`).
    """

    value: Tensor
    per: Literal["log", "micro_batch"] = "log"
    reduce: Literal["mean", "min", "max"] = "mean"


__all__ = [
    "REQUIREMENTS",
    "Denominators",
    "Family",
    "Metric",
    "ModelOutputs",
    "PolicyBatch",
    "PreferenceBatch",
    "Rollout",
    "TokenReduction",
    "masked_sum",
]
