"""Batches without a model, from which parts, padded copies and generation batches are made."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import Loss
from ..reductions import reduce_loss
from ..types import Denominators, Family, ModelOutputs, PolicyBatch, PreferenceBatch, Ranks, Rollout, gradients_of

#: Fields of the outputs that a loss may require, and the rows that they are made of.
_ROWS_OF = {
    "entropies": "entropies",
    "pooled_hidden": "hidden",
    "sequence_hidden": "hidden",
    "logits": "logits",
    "second_logits": "second_logits",
    "ref_per_token_logps": "ref",
}
#: Rows through which a loss can reach the model, and the field that it must require for that.
LEAVES = {
    "logps": None,
    "entropies": "entropies",
    "hidden": "pooled_hidden",
    "logits": "logits",
    "second_logits": "second_logits",
}
#: Rows that have a value at each position.
_PER_TOKEN = ("logps", "ref", "old", "entropies", "logits", "second_logits")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Raw tensors of a batch, from which batches of all or some of its pairs or sequences are built.

    Args:
        family: "preference" (rows: chosen, then rejected) or "policy".
        rows: By field, N rows: `logps`, `mask`, `ref`, `old`, `entropies` (N, T), `logits` (N, T, V), `hidden` (N, H).
        items: By field, one row a pair or sequence: `advantages`, `rewards`, `group_ids` and data-set columns.
        whole: The generation batch that this is a part of, itself if not given: what `prepare` sees.
        index: Which pairs or sequences of it.
        ranks: The processes that train together.
    """

    family: Family
    rows: dict[str, Tensor]
    items: dict[str, Tensor]
    whole: Data | None = None
    index: Tensor | None = None
    ranks: Ranks = Ranks()

    @property
    def size(self) -> int:
        """Number of pairs or sequences."""
        return self.rows["mask"].size(0) // (2 if self.family == "preference" else 1)

    # Other data made of this

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

    def padded(self, count: int, fill: float, at: int | None = None) -> Data:
        """`count` further positions that are not scored and hold `fill`, before position `at`, or at the end."""
        at = self.rows["mask"].size(1) if at is None else at

        def widened(value: Tensor, filled: float) -> Tensor:
            new = value.new_full((value.size(0), count, *value.shape[2:]), filled)
            return torch.cat((value[:, :at], new, value[:, at:]), 1)

        rows = {name: widened(self.rows[name], fill) for name in _PER_TOKEN}
        rows |= {name: widened(self.rows[name], 0) for name in ("mask", "ids")}
        return replace(self, rows=self.rows | rows)

    # What a trainer would hand to a loss

    def denominators(self, *, ranks: int = 1, micro_batches: int = 1, share: float = 1.0) -> Denominators:
        """What the trainer gives each micro-batch of an optimizer step on all of this data.

        Args:
            ranks: That the data is split over.
            micro_batches: Of each rank.
            share: Of the pairs or sequences that the micro-batch has.
        """
        mask = self.rows["mask"]
        return Denominators(
            sequences=self.size / ranks,
            tokens=mask.sum() / ranks,
            chosen_tokens=mask[: self.size].sum() / ranks,
            micro_batches=micro_batches,
            share=share,
            step_fraction=1 / ranks,
        )

    def columns(self, loss: Loss) -> dict[str, Any]:
        """The data-set columns that `loss` declares: of `items`, or its own examples, or numbers from 0 to 1."""
        return {name: self._column(loss, name) for name in loss.columns}

    def _column(self, loss: Loss, name: str) -> Any:
        examples = _examples(loss, name)
        if name in self.items or examples is None:
            return self.items.get(name, self.items["unit"])
        index = range(self.size) if self.index is None else self.index.tolist()
        values = [examples[position % len(examples)] for position in index]
        numeric = all(isinstance(value, (int, float, Tensor)) for value in values)
        return torch.tensor(values, dtype=torch.float64).to(self.items["unit"]) if numeric else values

    def build(self, loss: Loss, denominators: Denominators | None = None) -> tuple[Any, ModelOutputs]:
        """Batch and outputs with what is always present and what `loss` declares, no more."""
        rows, mask = self.rows, self.rows["mask"]
        fields: dict[str, Any] = {"per_token_logps": rows["logps"], "mask": mask}
        fields |= {field: rows[name] for field, name in _ROWS_OF.items() if field in loss.requires}
        common = {"columns": self.columns(loss), "ranks": self.ranks, "denominators": denominators}
        # The first token is predicted by none.
        ids = F.pad(rows["ids"], (1, 0), value=1)
        if self.family == "preference":
            if "ref_logps" in loss.requires:
                precise = torch.promote_types(rows["ref"].dtype, torch.float32)
                fields["ref_sums"] = rows["ref"].masked_fill(mask == 0, 0).sum(1, dtype=precise)
            attended = torch.ones_like(ids)
            batch = PreferenceBatch(input_ids=ids, attention_mask=attended, mask=mask, **common)
            return batch, ModelOutputs(**fields)
        prepared = self.prepared(loss)
        policy = PolicyBatch(
            prompt_ids=ids[:, :1],
            completion_ids=rows["ids"],
            mask=mask,
            advantages=prepared.pop("advantages", self.items["advantages"]),
            rewards=self.items["rewards"] if "rewards" in loss.requires else None,
            group_ids=self.items["group_ids"] if "group_ids" in loss.requires else None,
            prepared=prepared,
            **common,
        )
        return policy, ModelOutputs(old_per_token_logps=rows["old"], **fields)

    def prepared(self, loss: Loss) -> dict[str, Tensor]:
        """What `loss` prepares of the generation batch, for the sequences of this part of it."""
        if not loss.prepares:
            return {}
        whole = self.whole or self
        with torch.no_grad():
            prepared = loss.prepare(whole.rollout(loss=loss))
        index = torch.arange(whole.size) if self.index is None else self.index
        return {name: value[index].to(self.rows["mask"].device) for name, value in prepared.items()}

    def rollout(
        self,
        rank: int = 0,
        ranks: int = 1,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        *,
        loss: Loss | None = None,
    ) -> Rollout:
        """The data as the generation batch that one of several ranks prepares, with its share of the completions.

        The policy's states are the rows of `old_hidden`; a text's state is made of its letters, whatever the prompt.

        Args:
            rank: Which part of the sequences it has, cut to its longest.
            ranks: Of how many.
            gather: Collects a tensor over the ranks.
            loss: Whose columns it holds; those of the data, if not given.
        """
        local = slice(rank * self.size // ranks, (rank + 1) * self.size // ranks)
        rows = {name: value.detach()[local] for name, value in self.rows.items()}
        # Every rank pads to its own longest completion.
        scored = rows["mask"].any(0).nonzero()
        length = rows["mask"].size(1) if ranks == 1 else int(scored.max()) + 1 if scored.numel() else 1
        fields = {"per_token_logps": "old", "ref_per_token_logps": "ref", "mask": "mask"}
        tokens = {field: rows[name][:, :length] for field, name in fields.items()}
        ids = rows["ids"][:, :length]
        columns: dict[str, Any] = self.items if loss is None else self.columns(loss)
        hidden = rows["old_hidden"]
        return Rollout(
            rewards=self.items["rewards"],
            reward_weights=torch.tensor([1.0, 0.5], dtype=self.items["rewards"].dtype),
            advantages=self.items["advantages"],
            group_ids=self.items["group_ids"],
            completion_ids=ids,
            mask=tokens["mask"],
            columns={name: value[local] for name, value in columns.items()},
            local=local,
            ranks=Ranks(index=rank, count=ranks, gather=gather),
            texts=lambda: [
                " ".join(map(str, row[kept > 0].tolist())) for row, kept in zip(ids, tokens["mask"], strict=True)
            ],
            forward=lambda: ModelOutputs(pooled_hidden=hidden, **tokens),
            encode=lambda texts: torch.stack([text_state(text, hidden) for text in texts]),
        )

    # Value and gradient

    def loss(self, loss: Loss, denominators: Denominators | None = None) -> Tensor:
        """The reduced loss, a scalar."""
        batch, outputs = self.build(loss, denominators)
        raw, _ = loss(batch, outputs)
        return reduce_loss(loss, raw, batch)

    def leaves(self, loss: Loss) -> list[str]:
        """The rows through which `loss` can reach the model: log-probabilities, and what it requires beside them."""
        return [name for name, field in LEAVES.items() if field is None or field in loss.requires]

    def gradients(self, loss: Loss, value: Tensor | None = None) -> dict[str, Tensor]:
        """Gradients of the reduced loss, or of a `value` computed from it, with respect to each of `leaves`."""
        names = self.leaves(loss)
        value = self.loss(loss) if value is None else value
        found = gradients_of(value, [self.rows[name] for name in names])
        return dict(zip(names, found, strict=True))

    def gradient(self, loss: Loss, denominators: Denominators | None = None) -> Tensor:
        """The first of `gradients` that is not all 0: the one that matters for a loss of one kind of input."""
        found = list(self.gradients(loss, self.loss(loss, denominators)).values())
        return next((gradient for gradient in found if gradient.any()), found[0])


def _examples(loss: Loss, column: str) -> Sequence[Any] | None:
    """The values that a loss, or the one of a composition that declares the column, gives as examples of it."""
    return next((part.column_examples[column] for part in loss.tree() if column in part.column_examples), None)


def text_state(text: str, like: Tensor) -> Tensor:
    """A state that depends on the text alone, (H,), in float32 or better; 0 for an empty one."""
    generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(like.size(1), generator=generator, dtype=torch.float64).to(dtype) * bool(text)
