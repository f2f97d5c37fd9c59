"""Batches for tests of losses: random ragged ones, and some of extreme numbers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trl_custom_losses import Denominators, Loss, ModelOutputs, PolicyBatch, PreferenceBatch, Ranks, Rollout
from trl_custom_losses.reductions import reduce_loss

#: The row field that a loss reads in place of the log-probabilities.
LEAVES: dict[str, str] = {"diversity": "hidden", "quality": "hidden"}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Raw tensors of a batch, from which batches of all or some of its pairs or sequences are built.

    Args:
        family: "preference" (rows: chosen, then rejected) or "policy".
        rows: By field, N rows: `logps`, `mask`, `ref`, `old`, `entropies` (N, T), `logits` (N, T, V), `hidden` (N, H).
        items: By field, one row a pair or sequence: `advantages`, `rewards`, `group_ids` and data-set columns.
        whole: The generation batch that this is a part of, itself if not given: what `prepare` sees.
        index: Which rows of it.
    """

    family: str
    rows: dict[str, Tensor]
    items: dict[str, Tensor]
    whole: Data | None = None
    index: Tensor | None = None

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

        whole = self.whole or self  # `prepare` needs values, which the meta device does not have
        return replace(self, rows=moved(self.rows), items=moved(self.items), whole=whole)

    def take(self, index: Sequence[int]) -> Data:
        """Some pairs or sequences, in the order of `index`; gradients reach the tensors they were taken from."""
        items = torch.tensor(index)
        rows = torch.cat((items, items + self.size)) if self.family == "preference" else items
        return replace(
            self,
            rows={name: value[rows] for name, value in self.rows.items()},
            items={name: value[items] for name, value in self.items.items()},
            whole=self.whole or self,
            index=items if self.index is None else self.index[items],
        )

    def padded(self, count: int, fill: float) -> Data:
        """`count` further positions that are not scored and hold `fill`."""
        rows = dict(self.rows)
        for name in ("logps", "ref", "old", "entropies", "logits", "second_logits"):
            value = rows[name]
            rows[name] = torch.cat((value, value.new_full((value.size(0), count, *value.shape[2:]), fill)), 1)
        for name in ("mask", "ids"):
            rows[name] = torch.cat((rows[name], rows[name].new_zeros(rows[name].size(0), count)), 1)
        return replace(self, rows=rows)

    def denominators(self, *, ranks: int = 1, micro_batches: int = 1) -> Denominators:
        """What the trainer gives each micro-batch of an optimizer step on all of this data."""
        mask = self.rows["mask"]
        return Denominators(
            sequences=self.size / ranks,
            tokens=mask.sum() / ranks,
            chosen_tokens=mask[: self.size].sum() / ranks,
            micro_batches=micro_batches,
            step_fraction=1 / ranks,
        )

    def build(self, loss: Loss, denominators: Denominators | None = None) -> tuple[Any, ModelOutputs]:
        """Batch and outputs with what is always present and what `loss` declares, no more."""
        rows, mask = self.rows, self.rows["mask"]
        columns = {name: self.items.get(name, self.items["weight"]) for name in loss.columns}
        always: dict[str, Any] = {"per_token_logps": rows["logps"], "mask": mask}
        fields = {
            "entropies": "entropies",
            "pooled_hidden": "hidden",
            "sequence_hidden": "hidden",
            "logits": "logits",
            "second_logits": "second_logits",
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
        prepared = self.prepared(loss)
        policy = PolicyBatch(
            prompt_ids=ids,
            completion_ids=rows["ids"],
            mask=mask,
            advantages=prepared.pop("advantages", self.items["advantages"]),
            rewards=self.items["rewards"] if "rewards" in loss.requires else None,
            group_ids=self.items["group_ids"] if "group_ids" in loss.requires else None,
            columns=columns,
            prepared=prepared,
            denominators=denominators,
        )
        return policy, ModelOutputs(old_per_token_logps=rows["old"], **always)

    def prepared(self, loss: Loss) -> dict[str, Tensor]:
        """What `loss` prepares of the generation batch, for the sequences of this part of it."""
        if not loss.prepares:
            return {}
        whole = self.whole or self
        with torch.no_grad():
            prepared = loss.prepare(whole.rollout())
        index = torch.arange(whole.size) if self.index is None else self.index
        return {name: value[index].to(self.rows["mask"].device) for name, value in prepared.items()}

    def rollout(
        self, rank: int = 0, ranks: int = 1, gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> Rollout:
        """The data as the generation batch that one of several ranks prepares, with its share of the completions.

        The policy's states are the rows of `old_hidden`; a text's state is made of its letters, whatever the prompt.

        Args:
            rank: Which part of the sequences it has, cut to its longest.
            ranks: Of how many.
            gather: Collects a tensor over the ranks.
        """
        local = slice(rank * self.size // ranks, (rank + 1) * self.size // ranks)
        rows = {name: value.detach()[local] for name, value in self.rows.items()}
        length = max(int(rows["mask"].sum(1).max()), 1)
        fields = {"per_token_logps": "old", "ref_per_token_logps": "ref", "mask": "mask"}
        tokens = {field: rows[name][:, :length] for field, name in fields.items()}
        ids = rows["ids"][:, :length]
        texts = [f"answer {weight:.3f}" for weight in self.items["weight"][local].tolist()]
        hidden = rows["old_hidden"]
        return Rollout(
            rewards=self.items["rewards"],
            reward_weights=torch.tensor([1.0, 0.5], dtype=self.items["rewards"].dtype),
            advantages=self.items["advantages"],
            group_ids=self.items["group_ids"],
            completion_ids=ids,
            mask=tokens["mask"],
            columns={name: value[local] for name, value in self.items.items()} | {"target": texts},
            local=local,
            ranks=Ranks(index=rank, count=ranks, gather=gather),
            texts=lambda: [
                " ".join(map(str, row[kept > 0].tolist())) for row, kept in zip(ids, tokens["mask"], strict=True)
            ],
            forward=lambda: ModelOutputs(pooled_hidden=hidden, **tokens),
            encode=lambda texts: torch.stack([text_state(text, hidden) for text in texts]),
        )

    def loss(self, loss: Loss, denominators: Denominators | None = None) -> Tensor:
        """The reduced loss, a scalar."""
        batch, outputs = self.build(loss, denominators)
        raw, _ = loss(batch, outputs)
        return reduce_loss(loss, raw, batch)

    def leaf(self, loss: Loss) -> str:
        """The row field through which `loss` is differentiated: the log-probabilities, unless it reads none."""
        return "logits" if "second_logits" in loss.requires else LEAVES.get(loss.name, "logps")

    def unscored(self, loss: Loss) -> Tensor:
        """Where its leaf must not get a gradient: at masked positions, and in states of rows without any other."""
        masked = self.rows["mask"] == 0
        return masked.all(dim=1) if self.leaf(loss) == "hidden" else masked

    def gradient(self, loss: Loss, denominators: Denominators | None = None) -> Tensor:
        """Gradient of the reduced loss with respect to its leaf."""
        return torch.autograd.grad(self.loss(loss, denominators), self.rows[self.leaf(loss)])[0]


def text_state(text: str, like: Tensor) -> Tensor:
    """A state that depends on the text alone, (H,); 0 for an empty one."""
    generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
    return torch.randn(like.size(1), generator=generator, dtype=torch.float64).to(like.dtype) * bool(text)


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
        "second_logits": normal(count, length, 7),
    }
    rows |= {"old_hidden": rows["hidden"] + 0.2 * normal(count, 3)}
    rows = {name: value.to(dtype) for name, value in rows.items()} | {"mask": mask}
    rows["ids"] = torch.randint(1, 6, (count, length), generator=generator)
    for name in ("logps", "hidden", "logits", "second_logits"):
        rows[name].requires_grad_()
    items = {"advantages": normal(size), "weight": torch.rand(size, generator=generator, dtype=torch.float64)}
    items["rewards"] = normal(size, 2)
    for side in ("chosen", "rejected"):
        items[f"{side}_unsafe"] = torch.rand(size, generator=generator, dtype=torch.float64)
    items = {name: value.to(dtype) for name, value in items.items()} | {"group_ids": torch.arange(size) // 3}
    return Data(family=family, rows=rows, items=items)


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
