"""What a loss needs and what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...base import Loss
from ...errors import MissingFieldError
from ...reductions import evaluate, reduce_loss
from ...summaries import summarise
from ...types import Metric, PolicyBatch
from ..batches import Data
from ..check import check, describe, fail, require_finite
from ..subject import Subject


@check(
    usual_cause="a number or a list is returned where each completion needs its own value: `tensor.expand(B)` repeats "
    "one",
    first=True,
)
def prepare_returns(subject: Subject) -> str | None:
    """`prepare` returns finite tensors of one row a completion, without gradient, and the same when called again."""
    loss, data = subject.build(), subject.data()
    if not loss.prepares:
        return "it has no `prepare`"
    for part in (data, _with_an_unscored_completion(data)):
        try:
            with torch.no_grad():
                found, again = (loss.prepare(part.rollout(loss=loss)) for _ in range(2))
        except (Exception, SystemExit) as error:
            fail(f"in `prepare`, {describe(error)}")
        _check_prepared(found, part)
        if found.keys() != again.keys() or not all(torch.equal(value, again[name]) for name, value in found.items()):
            fail("`prepare` returns something else when it is called again on the same completions")
    return None


def _check_prepared(found: Any, data: Data) -> None:
    if not isinstance(found, Mapping):
        fail(f"`prepare` returns a dict of tensors, found {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            fail(f"'{name}' is {value!r} ({type(value).__name__}), not a tensor")
        if value.dim() == 0 or value.size(0) != data.size:
            fail(
                f"'{name}' has the shape {tuple(value.shape)}; the first dimension is that of the {data.size} "
                f"completions"
            )
        if value.requires_grad:
            fail(f"'{name}' carries a gradient")
        if value.is_floating_point():
            require_finite(value, f"'{name}'{_UNSCORED}")


@check(
    usual_cause="a field is read that `requires` does not name, or a column that `columns` does not name: the trainer "
    "computes and carries only what is declared",
    first=True,
)
def declared_needs(subject: Subject) -> None:
    """The loss runs on the fields and columns that it declares, and on no others."""
    loss, data = subject.as_built(), subject.data(dtype=torch.float32)
    try:
        batch, outputs = data.build(loss)
        loss(batch, outputs)
    except MissingFieldError as error:
        fail(describe(error).partition(": ")[2])
    except KeyError as error:
        fail(
            f"the key {error} is in neither `columns` ({', '.join(loss.columns) or 'none declared'}) nor what "
            f"`prepare` "
            f"returned: {describe(error)}"
        )


@check(
    usual_cause="the loss was averaged or summed already (return it unreduced), was made from numbers instead of "
    "tensors, "
    "or was computed in a dtype of its own",
    first=True,
)
def returns(subject: Subject) -> None:
    """The loss returns a floating-point tensor of a shape that can be reduced, and a dict of metrics."""
    for dtype in (torch.float32, torch.float64):
        loss = subject.build() if dtype is torch.float64 else subject.as_built()
        data = subject.data(dtype=dtype)
        _require_loss(loss, data, dtype)
        if "rewards" in loss.requires:
            _require_loss(loss, _with_an_unscored_completion(data), dtype, _UNSCORED)


_UNSCORED = ", where a reward function left a completion unscored (NaN),"


def _with_an_unscored_completion(data: Data) -> Data:
    rewards = data.items["rewards"].clone()
    rewards[0, 0] = torch.nan
    return dataclasses.replace(data, items=data.items | {"rewards": rewards})


def _require_loss(loss: Loss, data: Data, dtype: torch.dtype, where: str = "") -> None:
    batch, outputs = data.build(loss)
    try:
        raw, _ = evaluate(loss, batch, outputs)
        value = reduce_loss(loss, raw, batch)
    except (TypeError, ValueError) as error:
        fail(str(error))
    except RuntimeError as error:
        fail(f"{describe(error)}. It is called with {dtype} here: leave inputs in the dtype that they have")
    if raw.dtype is not dtype:
        fail(f"for {dtype} log-probabilities the loss is {raw.dtype}; leave inputs in the dtype that they have")
    if not raw.requires_grad:
        fail("the loss has no gradient: it does not depend on the model's outputs, or was detached")
    if loss.surrogate and not loss.composite and raw.dim() != 2:
        fail(
            f"the loss has the shape {tuple(raw.shape)}; a surrogate has (B, T) or (B, 1), on which off-policy masks "
            "and vLLM ratios can act. Set `surrogate = False` for an auxiliary term"
        )
    if loss.composite and raw.dim():
        fail(f"a loss that declares `composite = True` reduces itself to a scalar, found {tuple(raw.shape)}")
    require_finite(raw, f"the loss{where}")
    require_finite(value, f"the reduced loss{where}")


@check(
    usual_cause="a metric without `.detach()` keeps the graph of every micro-batch alive until the next log; a float "
    "comes from `.item()`, which makes the host wait. NaN is a mean over nothing: use "
    "`Metric(mask=...)`, or count at least 1",
)
def metrics(subject: Subject) -> None:
    """Metrics are finite, detached tensors of a shape that can be averaged."""
    loss, data = subject.as_built(), subject.data(dtype=torch.float32)
    batch, outputs = data.build(loss)
    _, found = loss(batch, outputs)
    for name, metric in found.items():
        if not isinstance(name, str) or not name:
            fail(f"metrics have names, found {name!r}")
        value = metric.value if isinstance(metric, Metric) else metric
        if not isinstance(value, Tensor):
            fail(f"metric '{name}' is {value!r} ({type(value).__name__}), not a tensor")
        if value.requires_grad:
            fail(f"metric '{name}' carries a gradient")
        require_finite(value, f"metric '{name}'")
    try:
        summarise(found, batch.mask, subject.name)
    except (TypeError, ValueError) as error:
        fail(str(error))


@check(
    usual_cause="a declaration was copied from another loss; logits cost a (batch, length, vocabulary) tensor, "
    "reference "
    "log-probabilities a forward pass. Where a need depends on a hyperparameter, set `self.requires` in the "
    "constructor",
)
def needs_are_used(subject: Subject) -> None:
    """What the loss declares in `requires` and `columns` is used."""
    loss, data = subject.build(), subject.data()
    before = _everything(subject, data)
    unused = []
    for name in sorted(loss.requires):
        if all(_same(before, _everything(subject, other)) for other in _changed(data, name)):
            unused.append(f"`{name}`")
    for name in loss.columns:
        given = data.columns(loss)[name]
        if isinstance(given, Tensor):
            others = [(given + 0.5) % 1, 1 - given]
        else:  # texts are exchanged and lengthened
            others = [[*given[1:], given[0]]]
            others += [[f"{value} more" for value in given]] if all(isinstance(v, str) for v in given) else []
        if all(_same(before, _everything(subject, data, {name: list(other)})) for other in others):
            unused.append(f"the column '{name}'")
    if unused:
        fail(f"{' and '.join(unused)} can be changed without changing the loss, its gradient or a metric")


_ROWS_OF_NEED = {
    "ref_logps": ("ref",),
    "ref_per_token_logps": ("ref",),
    "old_per_token_logps": ("old",),
    "entropies": ("entropies",),
    "pooled_hidden": ("hidden", "old_hidden"),
    "sequence_hidden": ("hidden",),
    "logits": ("logits",),
    "second_logits": ("second_logits",),
}


def _changed(data: Data, need: str) -> Iterator[Data]:
    """Data whose rows or items for a need are other numbers: lower, higher, and in another order of magnitude."""
    if need == "group_ids":
        for groups in (torch.arange(data.size), torch.zeros(data.size, dtype=torch.long)):
            yield dataclasses.replace(data, items=data.items | {need: groups})
        return
    generator = torch.Generator().manual_seed(1)
    for scale in (-0.3, 0.3, 3.0):

        def moved(value: Tensor, scale: float = scale) -> Tensor:
            noise = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
            return (value.detach() + scale * (0.5 + noise)).requires_grad_(value.requires_grad)

        if need in _ROWS_OF_NEED:
            yield data.with_rows(**{name: moved(data.rows[name]) for name in _ROWS_OF_NEED[need]})
        else:
            yield dataclasses.replace(data, items=data.items | {need: moved(data.items[need])})


def _everything(
    subject: Subject, data: Data, columns: Mapping[str, Sequence[Any]] = MappingProxyType({})
) -> list[Tensor]:
    """Loss, gradients, metrics, and what was prepared and observed; with other values in some columns."""
    loss = subject.build()
    data = dataclasses.replace(data, items={name: v for name, v in data.items.items() if name not in columns})
    for part in loss.tree():
        part.column_examples = {
            **part.column_examples,
            **{name: columns[name] for name in part.columns if name in columns},
        }
    batch, outputs = data.build(loss)
    raw, metrics = loss(batch, outputs)
    value = reduce_loss(loss, raw, batch)
    found: list[Any] = [value, *data.gradients(loss, value).values()]
    found += [metric.value if isinstance(metric, Metric) else metric for metric in metrics.values()]
    found += batch.prepared.values() if isinstance(batch, PolicyBatch) else []
    found += [values for part in loss.tree() for values in part.take_observed().values()]
    return [part.detach() for part in found if isinstance(part, Tensor)]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))
