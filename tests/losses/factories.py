"""Batches for tests of losses: random ragged ones, and single pairs or sequences of chosen numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trl_custom_losses import Denominators, Loss, LossFunctionRegistry, ModelOutputs, PolicyBatch, PreferenceBatch
from trl_custom_losses.reductions import reduce_loss

#: Hyperparameters without a default, by loss.
REQUIRED_HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "exo_pair": {"label_smoothing": 0.1},
    "dr_grpo": {"max_completion_length": 8},
}
_COMPONENTS: dict[str, list[dict[str, Any]]] = {
    "preference": [{"type": "sigmoid", "weight": 0.7}, {"type": "sft", "weight": 0.2}],
    "policy": [{"type": "grpo", "weight": 0.7}, {"type": "dapo", "weight": 0.2}],
}
_VARIANTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "preference": [
        ("sigmoid-forward_kl", {"type": "sigmoid", "f_divergence_type": "forward_kl"}),
        ("hinge-js_divergence", {"type": "hinge", "f_divergence_type": "js_divergence"}),
        ("ipo-alpha_divergence", {"type": "ipo", "f_divergence_type": "alpha_divergence"}),
        ("aot-smoothed", {"type": "aot", "label_smoothing": 0.2}),
        ("robust-smoothed", {"type": "robust", "label_smoothing": 0.2}),
    ],
    "policy": [
        ("grpo-delta", {"type": "grpo", "epsilon_high": 0.3, "delta": 1.5}),
        ("luspo-sequence", {"type": "luspo", "importance_sampling_level": "sequence"}),
        ("sapo-sequence", {"type": "sapo", "importance_sampling_level": "sequence"}),
        ("cispo-sequence", {"type": "cispo", "epsilon_high": 5.0, "importance_sampling_level": "sequence"}),
    ],
}


def configs(family: str) -> dict[str, dict[str, Any]]:
    """A configuration of every registered loss of a family, and some variants, by test id."""
    found = {
        name: {"type": name, **REQUIRED_HYPERPARAMETERS.get(name, {})}
        for name in LossFunctionRegistry.names(family)
        if name != "composed"
    }
    return found | {"composed": {"type": "composed", "components": _COMPONENTS[family]}} | dict(_VARIANTS[family])


@dataclass(frozen=True, kw_only=True)
class Data:
    """Raw tensors of a batch, from which batches of all or some of its pairs or sequences are built.

    Args:
        family: "preference" (rows: chosen, then rejected) or "policy".
        rows: By field, N rows: `logps`, `mask`, `ref`, `old`, `entropies` (N, T), `logits` (N, T, V), `hidden` (N, H).
        items: By field, one row a pair or sequence: `advantages` and data-set columns.
    """

    family: str
    rows: dict[str, Tensor]
    items: dict[str, Tensor]

    @property
    def size(self) -> int:
        """Number of pairs or sequences."""
        return self.rows["mask"].size(0) // (2 if self.family == "preference" else 1)

    def with_rows(self, **rows: Tensor) -> Data:
        """The same data with some row fields replaced."""
        return replace(self, rows=self.rows | rows)

    def to(self, target: torch.dtype | str) -> Data:
        """The same data with floating-point tensors of another dtype, or all tensors on another device."""

        def moved(fields: dict[str, Tensor]) -> dict[str, Tensor]:
            fits = isinstance(target, str)
            return {name: v.to(target) if fits or v.is_floating_point() else v for name, v in fields.items()}

        return replace(self, rows=moved(self.rows), items=moved(self.items))

    def take(self, index: Sequence[int]) -> Data:
        """Some pairs or sequences, in the order of `index`; gradients reach the tensors they were taken from."""
        items = torch.tensor(index)
        rows = torch.cat((items, items + self.size)) if self.family == "preference" else items
        return replace(
            self,
            rows={name: value[rows] for name, value in self.rows.items()},
            items={name: value[items] for name, value in self.items.items()},
        )

    def padded(self, count: int, fill: float) -> Data:
        """`count` further positions that are not scored and hold `fill`."""
        rows = dict(self.rows)
        for name in ("logps", "ref", "old", "entropies", "logits"):
            value = rows[name]
            rows[name] = torch.cat((value, value.new_full((value.size(0), count, *value.shape[2:]), fill)), 1)
        rows["mask"] = torch.cat((rows["mask"], rows["mask"].new_zeros(rows["mask"].size(0), count)), 1)
        return replace(self, rows=rows)

    def denominators(self, *, ranks: int = 1, micro_batches: int = 1) -> Denominators:
        """What the trainer gives each micro-batch of an optimizer step on all of this data."""
        mask = self.rows["mask"]
        return Denominators(
            sequences=self.size / ranks,
            tokens=mask.sum() / ranks,
            chosen_tokens=mask[: self.size].sum() / ranks,
            micro_batches=micro_batches,
        )

    def build(self, loss: Loss, denominators: Denominators | None = None) -> tuple[Any, ModelOutputs]:
        """Batch and outputs with what is always present and what `loss` declares, no more."""
        rows, mask = self.rows, self.rows["mask"]
        columns = {name: self.items.get(name, self.items["weight"]) for name in loss.columns}
        always: dict[str, Any] = {"per_token_logps": rows["logps"], "mask": mask}
        fields = {
            "entropies": "entropies",
            "pooled_hidden": "hidden",
            "logits": "logits",
            "ref_per_token_logps": "ref",
        }
        always |= {field: rows[name] for field, name in fields.items() if field in loss.requires}
        ids = mask.new_zeros(mask.size(0), mask.size(1) + 1, dtype=torch.long)
        if self.family == "preference":
            if "ref_logps" in loss.requires:
                precise = torch.promote_types(rows["ref"].dtype, torch.float32)
                always["ref_sums"] = rows["ref"].masked_fill(mask == 0, 0).sum(1, dtype=precise)
            batch = PreferenceBatch(
                input_ids=ids, attention_mask=ids, mask=mask, columns=columns, denominators=denominators
            )
            return batch, ModelOutputs(**always)
        policy = PolicyBatch(
            prompt_ids=ids,
            completion_ids=ids[:, 1:],
            mask=mask,
            advantages=self.items["advantages"],
            columns=columns,
            denominators=denominators,
        )
        return policy, ModelOutputs(old_per_token_logps=rows["old"], **always)

    def loss(self, loss: Loss, denominators: Denominators | None = None) -> Tensor:
        """The reduced loss, a scalar."""
        batch, outputs = self.build(loss, denominators)
        raw, _ = loss(batch, outputs)
        return reduce_loss(loss, raw, batch)

    def gradient(self, loss: Loss, denominators: Denominators | None = None) -> Tensor:
        """Gradient of the reduced loss with respect to the log-probabilities."""
        return torch.autograd.grad(self.loss(loss, denominators), self.rows["logps"])[0]


def random_data(
    family: str,
    *,
    size: int = 4,
    length: int = 5,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Data:
    """Random data of ragged lengths; the log-probabilities are a leaf that requires gradient.

    Args:
        family: "preference" or "policy".
        size: Number of pairs or sequences.
        length: Number of positions T.
        lengths: Scored tokens of each row; random, at least 1, if not given.
        seed: Of the generator.
        dtype: Of all floating-point tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    count = 2 * size if family == "preference" else size
    if lengths is None:
        lengths = torch.randint(1, length + 1, (count,), generator=generator).tolist()
    mask = (torch.arange(length) < torch.tensor(lengths).unsqueeze(1)).long()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logps = -1 - normal(count, length).abs()
    rows = {
        "logps": logps,
        "ref": logps + 0.4 * normal(count, length),
        "old": logps + 0.2 * normal(count, length),
        "entropies": normal(count, length).abs(),
        "logits": normal(count, length, 7),
        "hidden": normal(count, 3),
    }
    rows = {name: value.to(dtype) for name, value in rows.items()} | {"mask": mask}
    rows["logps"].requires_grad_()
    items = {"advantages": normal(size), "weight": torch.rand(size, generator=generator, dtype=torch.float64)}
    return Data(family=family, rows=rows, items={name: value.to(dtype) for name, value in items.items()})


def extreme_data(family: str, *, log_ratios: Sequence[float], advantages: Sequence[float] = ()) -> Data:
    """One-token float32 rows whose log-ratios to both the reference and the generating policy are given.

    Args:
        family: "preference" (`log_ratios`: chosen, then rejected) or "policy".
        log_ratios: Of each row, nats.
        advantages: Of each sequence.
    """
    size = len(log_ratios) // 2 if family == "preference" else len(log_ratios)
    data = random_data(family, size=size, length=1, dtype=torch.float32)
    base = torch.full((len(log_ratios), 1), -1.0)
    logps = (base + torch.tensor(log_ratios).unsqueeze(1)).requires_grad_()
    items = data.items | ({"advantages": torch.tensor(advantages)} if advantages else {})
    return replace(data.with_rows(logps=logps, ref=base, old=base), items=items)


def single_pair(
    chosen: float, rejected: float, lengths: tuple[int, int] = (1, 1)
) -> tuple[PreferenceBatch, ModelOutputs]:
    """One pair of completions whose log-ratios to the reference are `chosen` and `rejected` nats, in float64."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    ref = torch.tensor([[-2.0], [-3.0]], dtype=torch.float64).expand(mask.shape)
    ratios = torch.tensor([[chosen / lengths[0]], [rejected / lengths[1]]], dtype=torch.float64)
    logps = (ref + ratios).requires_grad_()
    ids = torch.zeros(2, mask.size(1) + 1, dtype=torch.long)
    batch = PreferenceBatch(input_ids=ids, attention_mask=ids, mask=mask)
    return batch, ModelOutputs(per_token_logps=logps, ref_per_token_logps=ref, mask=mask)


def pair_loss(loss: Loss, chosen: float, rejected: float, lengths: tuple[int, int] = (1, 1)) -> float:
    """The loss of one pair of given log-ratios, nats."""
    raw, _ = loss(*single_pair(chosen, rejected, lengths))
    assert raw.shape == (1,)
    return raw.item()


def pair_gradient(loss: Loss, chosen: float, rejected: float) -> tuple[float, float]:
    """Derivatives of the loss of one pair with respect to the chosen and the rejected log-ratio."""
    batch, outputs = single_pair(chosen, rejected)
    raw, _ = loss(batch, outputs)
    (gradient,) = torch.autograd.grad(raw.sum(), outputs.per_token_logps)
    return gradient[0, 0].item(), gradient[1, 0].item()


def single_sequence(
    ratios: Sequence[float], advantage: float, old: float = -1.5, **fields: Any
) -> tuple[PolicyBatch, ModelOutputs]:
    """One completion whose tokens have the given importance ratios, in float64."""
    mask = torch.ones(1, len(ratios), dtype=torch.long)
    olds = torch.full(mask.shape, old, dtype=torch.float64)
    logps = (olds + torch.tensor([ratios], dtype=torch.float64).log()).requires_grad_()
    batch = PolicyBatch(
        prompt_ids=mask,
        completion_ids=mask,
        mask=mask,
        advantages=torch.tensor([advantage], dtype=torch.float64),
        **fields,
    )
    return batch, ModelOutputs(per_token_logps=logps, old_per_token_logps=olds, mask=mask)


def token_losses(loss: Loss, ratios: Sequence[float], advantage: float, **fields: Any) -> list[float]:
    """The unreduced loss of each token of one completion of given importance ratios."""
    batch, outputs = single_sequence(ratios, advantage, **fields)
    raw, _ = loss(batch, outputs)
    return raw.expand(1, len(ratios))[0].tolist()


def token_gradients(loss: Loss, ratios: Sequence[float], advantage: float, **fields: Any) -> list[float]:
    """Derivative of the sum of the unreduced losses with respect to each token's log-probability."""
    batch, outputs = single_sequence(ratios, advantage, **fields)
    raw, _ = loss(batch, outputs)
    (gradient,) = torch.autograd.grad(raw.expand(1, len(ratios)).sum(), outputs.per_token_logps)
    return gradient[0].tolist()


def on_policy_data() -> Data:
    """Completions of 1 and 3 tokens with advantages 2 and -1, at ratio 1."""
    data = random_data("policy", size=2, length=4, lengths=[1, 3])
    data = replace(data, items={"advantages": torch.tensor([2.0, -1.0], dtype=torch.float64)})
    return data.with_rows(old=data.rows["logps"].detach())


def on_policy_loss(loss: Loss) -> float:
    """Reduced loss of `on_policy_data`."""
    return on_policy_data().loss(loss).item()


def column_pairs(policy: Sequence[float], ref: Sequence[float]) -> tuple[PreferenceBatch, ModelOutputs]:
    """Pairs of one-token completions with given policy and reference log-probabilities (chosen, then rejected)."""
    mask = torch.ones(len(policy), 1, dtype=torch.long)
    logps, refs = (torch.tensor(values, dtype=torch.float64).unsqueeze(1) for values in (policy, ref))
    batch = PreferenceBatch(input_ids=mask, attention_mask=mask, mask=mask)
    return batch, ModelOutputs(per_token_logps=logps, ref_per_token_logps=refs, mask=mask)
