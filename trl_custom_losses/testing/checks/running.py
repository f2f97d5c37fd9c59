"""How a loss behaves in a run: it waits for nothing, changes nothing, forgets nothing."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import torch
from torch import Tensor

from ...base import Loss
from ...reductions import evaluate, reduce_loss
from ...types import Metric, ModelOutputs
from ..check import check, fail, require_equal
from ..host_syncs import HostSync, HostSyncDetector
from ..runs import take_step
from ..subject import Subject


@check(
    usual_cause="`.item()`, `.cpu()`, printing, `if tensor:` or indexing with a mask: use `torch.where`, "
    "`masked_fill` and "
    "detached metrics; what needs the host belongs in `prepare` or `on_step_end`. Tensors made inside the loss "
    "take `device=` from its inputs",
)
def no_host_sync(subject: Subject) -> None:
    """The loss never makes the host wait for the device, and prints nothing."""
    data = subject.data(dtype=torch.float32)
    loss = subject.as_built()
    loss.begin_run(8)
    moved = data.to("meta")
    batch, outputs = moved.build(loss, data.denominators())  # `prepare` may wait, once a generation batch
    denominators = {name: value for name, value in vars(batch.denominators).items() if isinstance(value, Tensor)}
    for name, value in denominators.items():
        setattr(batch.denominators, name, value.to("meta"))
    loss.to("meta")  # as the trainer moves it to the device, with its buffers and parameters
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), HostSyncDetector() as detector:
            for mode in ("training", "evaluation"):
                loss.train(mode == "training")
                raw, _ = evaluate(loss, batch, outputs)
                value = reduce_loss(loss, raw, batch)
                if mode == "training":
                    moved.gradients(loss, value)
                    loss.begin_step(3)
    except HostSync as error:
        fail(str(error))
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        fail(f"the loss cannot run where tensors hold no values: {type(error).__name__}: {str(error).splitlines()[0]}")
    if detector.found is not None:
        fail(str(detector.found))
    if printed.getvalue().strip():
        fail(f"the loss prints {printed.getvalue().strip().splitlines()[0][:80]!r} at every micro-batch")
    if value.device.type != "meta":
        fail(f"the loss is on the device '{value.device}', its inputs on '{moved.rows['mask'].device}'")


@check(
    usual_cause="an operation in place (`+=`, `mul_`, `fill_`, assignment to a slice) on a field of the batch or "
    "outputs",
)
def inputs_unchanged(subject: Subject) -> None:
    """Inputs stay as they were."""
    loss, data = subject.build(), subject.data()
    batch, outputs = data.build(loss, data.denominators())
    parts = {"batch": batch, "outputs": outputs, "denominators": batch.denominators}
    seen = {
        f"{where}.{name}": value
        for where, part in parts.items()
        for name, value in _tensors(vars(part)).items()
        if isinstance(value, Tensor)
    }
    columns = repr(_lists(batch))  # as it stands now, lists within lists too
    before = {name: (value.detach().clone(), value._version) for name, value in seen.items()}
    try:
        raw, _ = loss(batch, outputs)
        reduce_loss(loss, raw, batch).backward()
    except RuntimeError as error:
        if "inplace" not in str(error) and "in-place" not in str(error):
            raise
        fail(f"an operation in place: {str(error).splitlines()[0]}")
    for name, value in seen.items():
        copied, version = before[name]
        if value._version != version or not torch.equal(value.nan_to_num(), copied.nan_to_num()):
            gap = (value.double() - copied.double()).abs().nan_to_num().max()
            fail(f"the loss changes `{name}` in place, by up to {float(gap):.3g}")
    if repr(_lists(batch)) != columns:
        fail("the loss changes a data-set column in place")
    for where, part in parts.items():
        for name, value in _tensors(vars(part)).items():
            if seen.get(f"{where}.{name}", value) is not value:
                fail(f"the loss puts another tensor in the place of `{where}.{name}`")
        added = {f"{where}.{name}" for name in _tensors(vars(part))} - seen.keys()
        if added:
            fail(f"the loss adds {sorted(added)} to its inputs")


def _lists(batch: Any) -> dict[str, list]:
    return {name: list(values) for name, values in batch.columns.items() if isinstance(values, list)}


def _tensors(fields: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= {f"{name}[{key!r}]": part for key, part in value.items()}
        elif isinstance(value, Tensor):
            flat[name] = value
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}


@check(
    first=True,
    usual_cause="random numbers in `forward`, or state that a forward pass moves: move it in `on_step_end`, from what "
    "`observe` collected, so that evaluation and the number of micro-batches do not",
)
def same_input_same_output(subject: Subject) -> None:
    """The same input gives the same output, in training and in evaluation."""
    loss, data = subject.build(), subject.data(size=16)
    batch, outputs = data.build(loss, data.denominators())
    for mode in ("training", "evaluation"):
        loss.train(mode == "training")
        first = _outputs(loss, batch, outputs)
        for number in range(2, 6):
            other = _outputs(loss, batch, outputs)
            if first.keys() != other.keys():
                fail(f"the metrics {sorted(first.keys() ^ other.keys())} are there in one of two calls only, in {mode}")
            for name, value in first.items():
                what = f"'{name}' of call {number} in {mode}"
                require_equal(other[name], value, what, versus="of the first", relative=0, absolute=0)


def _outputs(loss: Loss, batch: Any, outputs: ModelOutputs) -> dict[str, Tensor]:
    """The reduced loss and the metrics, by name."""
    raw, metrics = loss(batch, outputs)
    values = {name: metric.value if isinstance(metric, Metric) else metric for name, metric in metrics.items()}
    return {"the loss": reduce_loss(loss, raw, batch)} | values


@check(
    usual_cause="state is a plain attribute: register it with `register_buffer`, or keep it in a `state.HostState`, so "
    "that checkpoints hold it; or it moves in `forward` whether or not `self.training`",
)
def state(subject: Subject) -> None:
    """A loss that is rebuilt from its `state_dict` goes on exactly as the first, and evaluation does not move it."""
    data = [subject.data(seed=seed) for seed in range(6)]
    loss = subject.build()
    loss.begin_run(len(data))
    for step in range(3):
        take_step(loss, data[step], step)
    saved = copy.deepcopy(loss.state_dict())

    loss.eval()
    with torch.no_grad():
        data[5].loss(loss)
    loss.train()
    _require_same_state(loss.state_dict(), saved, "after an evaluation", "before it")

    resumed = subject.build()
    resumed.load_state_dict(saved)
    resumed.begin_run(len(data), done=3)
    copied = copy.deepcopy(loss)
    for step in range(3, len(data)):
        expected = take_step(loss, data[step], step)
        for other, which in ((resumed, "resumed from its state_dict"), (copied, "deep-copied")):
            found = take_step(other, data[step], step)
            require_equal(
                found,
                expected,
                f"the loss at step {step}, {which} at step 3,",
                versus="uninterrupted",
                relative=0,
                absolute=0,
            )
    _require_same_state(resumed.state_dict(), loss.state_dict(), "three steps after resuming", "uninterrupted")


def _require_same_state(found: dict[str, Any], expected: dict[str, Any], when: str, versus: str) -> None:
    if found.keys() != expected.keys():
        fail(f"{when} the state has other entries: {sorted(found.keys() ^ expected.keys())}")
    for name, value in expected.items():
        if isinstance(value, Tensor):
            what = f"the state '{name}' {when}"
            require_equal(found[name], value.to(found[name].device), what, versus=versus, relative=0, absolute=0)
