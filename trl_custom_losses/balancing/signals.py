"""What a rule may follow in place of an objective's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LossConfigError
from ..summaries import Tokens, sum_and_count
from ..types import Family, Metric, ModelOutputs, PolicyBatch, PreferenceBatch, masked_sum

Batch = PreferenceBatch | PolicyBatch
Metrics = Mapping[str, Tensor | Metric]


@dataclass(frozen=True)
class Signal:
    """A quantity of the batch, computed by this package.

    Args:
        requires: What it needs, by family; it exists in these families alone.
        measure: (batch, outputs) -> sum and count.
    """

    requires: Mapping[Family, frozenset[str]]
    measure: Callable[[Batch, ModelOutputs], tuple[Tensor, Tensor | float]]


def _kl(batch: Batch, outputs: ModelOutputs) -> tuple[Tensor, Tensor]:
    return outputs.token_kl.sum(), outputs.mask.sum()


def _entropy(batch: Batch, outputs: ModelOutputs) -> tuple[Tensor, Tensor]:
    return masked_sum(outputs.entropies.detach(), outputs.mask).sum(), outputs.mask.sum()


def _length(batch: Batch, outputs: ModelOutputs) -> tuple[Tensor, Tensor]:
    counted = _counted(outputs.lengths, batch)
    return (outputs.lengths * counted).sum(), counted.sum()


def _margin(batch: Batch, outputs: ModelOutputs) -> tuple[Tensor, Tensor]:
    chosen, rejected = outputs.log_ratios.detach().chunk(2)
    counted = _counted(chosen, batch)
    return ((chosen - rejected) * counted).sum(), counted.sum()


def _reward(batch: Batch, outputs: ModelOutputs) -> tuple[Tensor, Tensor]:
    scored = ~batch.rewards.isnan().all(dim=1)
    return batch.rewards.nansum(dim=1).sum(), scored.sum()


def _counted(rows: Tensor, batch: Batch) -> Tensor:
    """0 for the rows of a preference batch that hold no pair, 1 for all others; (N,) as `rows`."""
    if batch.family == "policy" or not batch.has("pair_mask"):
        return torch.ones_like(rows)
    return batch.pair_mask.to(rows.dtype).repeat(rows.size(0) // batch.num_pairs)


_NOTHING: frozenset[str] = frozenset()
_REFERENCE = frozenset({"ref_per_token_logps"})

#: Name -> how it is measured: `kl` (k3 estimate of the KL to the reference, nats per token), `entropy` (nats per
#: token), `length` (tokens per completion), `margin` (log-ratio of chosen minus rejected, nats), `reward` (sum of the
#: reward functions, unweighted).
SIGNALS: dict[str, Signal] = {
    "kl": Signal({"preference": _REFERENCE, "policy": _REFERENCE}, _kl),
    "entropy": Signal({"preference": frozenset({"entropies"}), "policy": frozenset({"entropies"})}, _entropy),
    "length": Signal({"preference": _NOTHING, "policy": _NOTHING}, _length),
    "margin": Signal({"preference": frozenset({"ref_logps"})}, _margin),
    "reward": Signal({"policy": frozenset({"rewards"})}, _reward),
}


def measure(name: str, objective: str, reported: Mapping[str, Metrics], batch: Batch, outputs: ModelOutputs) -> Tensor:
    """Sum and count of a signal over the micro-batch, (2,), detached.

    Args:
        name: Of `SIGNALS`, or of a metric that the objective reports, or else any other one.
        objective: Whose signal it is.
        reported: Metrics of all objectives.
        batch, outputs: The micro-batch.

    Raises:
        LossConfigError: Nothing of that name exists, or it is an extremum, which cannot be averaged.
    """
    if name in SIGNALS:
        total, count = SIGNALS[name].measure(batch, outputs)
    else:
        holders = [objective, *(other for other in reported if other != objective)]
        metric = next((reported[holder][name] for holder in holders if name in reported[holder]), None)
        if metric is None:
            known = sorted({*SIGNALS, *(key for metrics in reported.values() for key in metrics)})
            raise LossConfigError(f"the signal '{name}' is neither measured nor a reported metric; there are {known}")
        value, counted = metric, None
        if isinstance(metric, Metric):
            if metric.reduce != "mean":
                raise LossConfigError(f"the signal '{name}' is a {metric.reduce} and has no mean over micro-batches")
            value, counted = metric.value, metric.mask
        value = torch.as_tensor(value, device=batch.mask.device).detach()  # a number is a metric too
        if counted is None and value.dim() > 0 and value.numel() == value.size(0):
            value = value.flatten()
            counted = _counted(value, batch)
        total, count = sum_and_count(value, Tokens(batch.mask), "mean", f"the signal '{name}'", counted)
    return torch.stack((total.float(), torch.as_tensor(count, device=total.device, dtype=torch.float32))).detach()
