"""From an unreduced loss to the scalar that is differentiated. Every normalisation of the package is here.

| name | value over the optimizer step | TRL types |
|---|---|---|
| `sequence_mean` | mean over sequences of the mean over each one's tokens | grpo, sapo; all pair losses |
| `token_mean` | sum over tokens / number of tokens of the global batch | dapo, cispo, vespo; sft |
| `local_token_mean` | mean over micro-batches of each one's token mean | bnpo |
| `sequence_sum` | mean over sequences of the sum over each one's tokens | luspo |
| `FixedLengthMean(L)` | sum over tokens / (sequences x L) | dr_grpo |

A loss of one value per pair or sequence, `(B,)`, is averaged over them under every name. A scalar is a finished
micro-batch mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .types import ModelOutputs, PolicyBatch, PreferenceBatch, TokenReduction, masked_sum

if TYPE_CHECKING:
    from .base import Loss, Metrics


def _sequence_mean(values, mask, sequences, tokens, denominators) -> Tensor:
    return (masked_sum(values, mask) / mask.sum(-1).clamp(min=1)).sum() / sequences


def _token_mean(values, mask, sequences, tokens, denominators) -> Tensor:
    # The trainer counts at least one token and then scales, so that a denominator below 1 is legitimate; 0 is not.
    tokens = tokens.masked_fill(tokens == 0, 1) if isinstance(tokens, Tensor) else tokens or 1
    return masked_sum(values, mask).sum() / tokens


def _local_token_mean(values, mask, sequences, tokens, denominators) -> Tensor:
    return masked_sum(values, mask).sum() / mask.sum().clamp(min=1) / denominators.micro_batches


def _sequence_sum(values, mask, sequences, tokens, denominators) -> Tensor:
    return masked_sum(values, mask).sum() / sequences


@dataclass(frozen=True)
class FixedLengthMean:
    """Divide by `length` tokens a sequence, however long it is (Dr. GRPO, arXiv:2503.20783).

    Args:
        length: Tokens a sequence counts for.
    """

    length: int

    def __call__(self, values, mask, sequences, tokens, denominators) -> Tensor:
        return masked_sum(values, mask).sum() / (sequences * self.length)


REDUCTIONS: dict[str, TokenReduction] = {
    "sequence_mean": _sequence_mean,
    "token_mean": _token_mean,
    "local_token_mean": _local_token_mean,
    "sequence_sum": _sequence_sum,
}


def evaluate(loss: Loss, batch: PreferenceBatch | PolicyBatch, outputs: ModelOutputs) -> tuple[Tensor, Metrics]:
    """Call a loss and check that it returned a tensor and a dict of metrics; adds its scheduled hyperparameters."""
    result = loss(batch, outputs)
    found = tuple(map(type, result)) if isinstance(result, tuple) else ()
    if len(found) == 2 and issubclass(found[0], Tensor) and issubclass(found[1], Mapping):
        raw, metrics = result
        moving = {name: raw.detach().new_full((), value) for name, value in loss.moving().items()}
        return raw, {**moving, **metrics}
    raise _wrong_result(loss, result)


def _wrong_result(loss: Loss, result: object) -> TypeError:
    found = type(result).__name__
    if isinstance(result, tuple):
        found = f"({', '.join(type(part).__name__ for part in result)})"
    return TypeError(f"loss '{loss.name}' must return a tensor and a dict of metrics, found {found}")


def reduce_values(values: Tensor, batch: PreferenceBatch | PolicyBatch, reduction: str | TokenReduction) -> Tensor:
    """Reduce an unreduced tensor with global denominators, without the batch's modifiers.

    Args:
        values: (N,), (N, 1) or (N, T).
        batch: Provides mask and denominators.
        reduction: A name of the table above, or a reduction object.

    Returns:
        The micro-batch's contribution to the optimizer step's loss, a scalar.
    """
    if values.dim() not in (1, 2):
        raise ValueError(f"a loss is a scalar, (B,), (B, 1) or (B, T); found shape {tuple(values.shape)}")
    mask, sequences, tokens = batch.rows(values.size(0))
    if values.dim() == 1:
        return values.sum() / sequences
    if values.size(1) not in (1, mask.size(1)):
        raise ValueError(
            f"a per-token loss has {mask.size(1)} positions for this batch, found shape {tuple(values.shape)}"
        )
    reduce = REDUCTIONS[reduction] if isinstance(reduction, str) else reduction
    return reduce(values.expand_as(mask), mask, sequences, tokens, batch.denominators)


def reduce_loss(loss: Loss, raw: Tensor, batch: PreferenceBatch | PolicyBatch) -> Tensor:
    """Apply the batch's modifiers to what `loss` returned and reduce it as the loss declares.

    Args:
        loss: The loss that produced `raw`.
        raw: Scalar, (B,), (B, 1) or (B, T).
        batch: The micro-batch it was computed on.

    Returns:
        The micro-batch's contribution to the optimizer step's loss, a scalar.
    """
    if not isinstance(raw, Tensor):
        raise _wrong_result(loss, raw)
    if loss.composite:
        return raw  # its components were modified and reduced one by one
    raw = batch.apply_modifiers(loss, raw)
    if raw.dim() == 0:
        return raw / batch.denominators.micro_batches
    return reduce_values(raw, batch, loss.reduction)
