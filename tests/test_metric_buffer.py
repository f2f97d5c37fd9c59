"""Metrics collected on the device and reduced over ranks."""

from __future__ import annotations

import importlib.util
import math
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import trl_custom_losses
from trl_custom_losses import Metric
from trl_custom_losses.summaries import summarise


def _load() -> ModuleType:
    """The module without the package around it, which imports trl."""
    path = Path(trl_custom_losses.__file__).parent / "trainers" / "metric_buffer.py"
    spec = importlib.util.spec_from_file_location("trl_custom_losses.trainers.metric_buffer_alone", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MetricBuffer = _load().MetricBuffer

_MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])


def _alone(packed: Tensor) -> Tensor:
    return packed


def _reduce_over_ranks(*ranks: Any) -> list[dict[str, float]]:
    """Reduce several buffers as their ranks would: a thread each, meeting in a gather that concatenates."""
    parts: dict[int, Tensor] = {}
    barrier = threading.Barrier(len(ranks), timeout=10)

    def reduce(index: int) -> dict[str, float]:
        def gather(tensor: Tensor) -> Tensor:
            parts[index] = tensor
            barrier.wait()
            assert len({part.shape for part in parts.values()}) == 1, "a real collective would crash or hang"
            gathered = torch.cat([parts[rank] for rank in range(len(ranks))])
            barrier.wait()
            return gathered

        return ranks[index].reduce(gather)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(reduce, range(len(ranks))))


def _buffer(*micro_batches: Mapping[str, tuple]) -> Any:
    buffer = MetricBuffer()
    for metrics in micro_batches:
        buffer.add({name: (torch.tensor(float(value)), *rest) for name, (value, *rest) in metrics.items()})
    return buffer


# Averages


def test_per_log_is_the_total_sum_over_the_total_count() -> None:
    buffer = _buffer({"x": (6.0, 3.0, "log", "mean")}, {"x": (10.0, 1.0, "log", "mean")})
    assert buffer.reduce(_alone) == {"x": (6 + 10) / (3 + 1)}


def test_per_micro_batch_is_the_mean_of_means() -> None:
    buffer = _buffer({"x": (6.0, 3.0, "micro_batch", "mean")}, {"x": (10.0, 1.0, "micro_batch", "mean")})
    assert buffer.reduce(_alone) == {"x": (6 / 3 + 10 / 1) / 2}


def test_ranks_count_by_what_they_hold() -> None:
    first = _buffer({"x": (6.0, 3.0, "log", "mean"), "y": (6.0, 3.0, "micro_batch", "mean")})
    second = _buffer({"x": (10.0, 1.0, "log", "mean"), "y": (10.0, 1.0, "micro_batch", "mean")})
    assert _reduce_over_ranks(first, second) == [{"x": 16 / 4, "y": 16 / 4}] * 2


def test_ranks_meet_micro_batch_by_micro_batch() -> None:
    per = ("micro_batch", "mean")
    first = _buffer({"x": (2.0, 1.0, *per)}, {"x": (0.0, 1.0, *per)})
    second = _buffer({"x": (9.0, 3.0, *per)}, {"x": (5.0, 1.0, *per)})
    assert _reduce_over_ranks(first, second)[0] == {"x": (11 / 4 + 5 / 2) / 2}


def test_extrema_over_ranks_are_averaged_over_micro_batches() -> None:
    def metrics(low: float, high: float) -> dict[str, tuple]:
        return {"low": (low, 1.0, "micro_batch", "min"), "high": (high, 1.0, "micro_batch", "max")}

    first = _buffer(metrics(1.0, 5.0), metrics(4.0, 4.5))
    second = _buffer(metrics(0.0, 2.0), metrics(6.0, 7.0))
    assert _reduce_over_ranks(first, second)[1] == {"low": (0 + 4) / 2, "high": (5 + 7) / 2}


def test_extrema_per_log_are_those_of_everything_since_the_last_log(monkeypatch: pytest.MonkeyPatch) -> None:
    def metrics(low: float, high: float) -> dict[str, tuple]:
        return {"low": (low, 3.0, "log", "min"), "high": (high, 3.0, "log", "max")}

    first = _buffer(metrics(1.0, 5.0), metrics(-4.0, 4.5))
    second = _buffer(metrics(0.0, 2.0), metrics(6.0, 7.0))
    assert _reduce_over_ranks(first, second) == [{"low": -4.0, "high": 7.0}] * 2
    assert not first and first.reduce(_alone) == {}  # and the next log starts anew
    monkeypatch.setitem(MetricBuffer.compact.__globals__, "_MOST_ROWS", 2)
    early = MetricBuffer()
    for low, high in ((1.0, 5.0), (-4.0, 4.5), (0.0, 7.0), (2.0, 3.0)):
        early.add({name: (torch.tensor(value), *rest) for name, (value, *rest) in metrics(low, high).items()})
        early.compact(_alone)
    assert not early._rows and early and early.reduce(_alone) == {"low": -4.0, "high": 7.0}


@pytest.mark.parametrize("reduce", ["min", "max"])
@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.nan)])
def test_a_nan_among_extrema_is_shown(reduce: str, values: tuple[float, float]) -> None:
    buffer = _buffer(*({"x": (value, 1.0, "log", reduce)} for value in values))
    assert math.isnan(buffer.reduce(_alone)["x"])


def test_an_exponential_is_that_of_the_average() -> None:
    per = ("log", "exp")
    first = _buffer({"x": (6.0, 3.0, *per)}, {"x": (1.0, 1.0, *per)})
    second = _buffer({"x": (5.0, 1.0, *per)}, {"x": (0.0, 1.0, *per)})
    expected = {"x": pytest.approx(math.exp(12 / 6), rel=1e-12)}
    assert _reduce_over_ranks(first, second) == [expected] * 2
    assert _buffer({"x": (2e4, 2.0, *per)}).reduce(_alone) == {"x": math.inf}
    assert _buffer({"x": (0.0, 0.0, *per)}).reduce(_alone) == {}


def test_an_extremum_over_no_sequence_is_left_out() -> None:
    empty = {"low": (math.inf, 1.0, "micro_batch", "min"), "high": (-math.inf, 1.0, "micro_batch", "max")}
    some = {"low": (2.0, 1.0, "micro_batch", "min"), "high": (3.0, 1.0, "micro_batch", "max")}
    assert _buffer(empty, some).reduce(_alone) == {"low": 2.0, "high": 3.0}
    assert _reduce_over_ranks(_buffer(empty), _buffer(some))[0] == {"low": 2.0, "high": 3.0}
    assert all(map(math.isnan, _buffer(empty).reduce(_alone).values()))


@pytest.mark.parametrize(
    ("per", "reduce"), [("log", "mean"), ("micro_batch", "mean"), ("micro_batch", "min"), ("micro_batch", "max")]
)
def test_a_nan_is_shown_not_dropped(per: str, reduce: str) -> None:
    assert math.isnan(_buffer({"x": (math.nan, 1.0, per, reduce)}).reduce(_alone)["x"])


def test_nothing_counted_has_no_average() -> None:
    buffer = _buffer({"x": (0.0, 0.0, "log", "mean"), "y": (0.0, 0.0, "micro_batch", "mean")})
    assert buffer.reduce(_alone) == {"y": 0.0}  # what TRL logs for a micro-batch without tokens


def test_counts_stay_exact() -> None:
    large = 2**24 + 1  # beyond float32
    buffer = MetricBuffer()
    buffer.add({"x": (torch.tensor(large), torch.tensor(1), "log", "mean")})
    assert buffer.reduce(_alone) == {"x": large}


def test_metrics_may_differ_between_micro_batches() -> None:
    buffer = _buffer({"x": (2.0, 1.0, "log", "mean")}, {"x": (4.0, 1.0, "log", "mean"), "y": (5.0, 1.0, "log", "mean")})
    assert buffer.reduce(_alone) == {"x": 3.0, "y": 5.0}


def test_many_metrics_are_not_mixed_up() -> None:
    metrics = {f"m{i}": (float(i), 1.0, "log", "mean") for i in range(400)}
    assert _buffer(metrics, metrics).reduce(_alone) == {f"m{i}": float(i) for i in range(400)}


def test_ranks_may_name_their_metrics_in_any_order() -> None:
    x, y = (1.0, 1.0, "log", "mean"), (5.0, 1.0, "log", "mean")
    assert _reduce_over_ranks(_buffer({"x": x, "y": y}), _buffer({"y": y, "x": x})) == [{"x": 1.0, "y": 5.0}] * 2


# State


def test_reducing_starts_anew_and_nothing_needs_no_collective() -> None:
    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("gathered")

    buffer = _buffer({"x": (2.0, 1.0, "log", "mean")})
    assert buffer
    buffer.reduce(_alone)
    assert not buffer and buffer.reduce(refuse) == {}
    buffer.add({})
    assert not buffer


@pytest.mark.parametrize(("metrics", "sizes"), [(1, [4096]), (2047, [4096]), (2048, [4096, 2]), (3000, [4096, 1906])])
def test_ranks_exchange_once_unless_there_is_much(metrics: int, sizes: list[int]) -> None:
    exchanged: list[Tensor] = []

    def gather(packed: Tensor) -> Tensor:
        exchanged.append(packed)
        return torch.cat((packed, packed))

    values = {f"m{i:04}": (float(i), 2.0, "log", "mean") for i in range(metrics)}
    found = _buffer(values).reduce(gather)
    assert [packed.numel() for packed in exchanged] == sizes
    assert found == {name: value / 2 for name, (value, *_) in values.items()}


def test_ranks_with_more_metrics_than_fit_at_once_are_told_apart() -> None:
    ranks = [
        _buffer({f"{name}{i}": (1.0, 1.0, "log", "mean") for i in range(2500 + rank)})
        for rank, name in [(0, "m"), (1, "m")]
    ]
    with pytest.raises(RuntimeError, match="different metrics"):
        _reduce_over_ranks(*ranks)


def test_numbers_and_tensors_of_any_kind_keep_their_places() -> None:
    metrics = {
        "a": (torch.tensor(3), 2.0, "log", "mean"),
        "b": (5.0, torch.tensor([4.0]), "log", "mean"),
        "c": (torch.tensor(True), torch.tensor(2, dtype=torch.int32), "log", "mean"),
        "d": (6.0, 3, "log", "mean"),
        "e": (torch.tensor(0.1, dtype=torch.float64), torch.tensor(1.0), "log", "mean"),
    }
    wanted = {"a": 1.5, "b": 1.25, "c": 0.5, "d": 2.0, "e": 0.1}
    buffer = MetricBuffer()
    for _ in range(3):
        buffer.add(metrics)
    assert buffer.reduce(_alone) == pytest.approx(wanted, rel=1e-15)
    # What one rank knows as a number may be a tensor on another.
    other = MetricBuffer()
    other.add({name: tuple(torch.as_tensor(part) for part in parts[:2]) + parts[2:] for name, parts in metrics.items()})
    one = MetricBuffer()
    one.add(metrics)
    assert _reduce_over_ranks(one, other) == [pytest.approx(wanted)] * 2


def test_much_is_reduced_early_and_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MetricBuffer.compact.__globals__, "_MOST_ROWS", 3)
    micro_batches = [
        {"x": (float(i), 1.0 + i, "log", "mean"), "y": (float(i), 2.0, "micro_batch", "mean")} for i in range(8)
    ]
    whole, early = _buffer(*micro_batches), MetricBuffer()
    for metrics in micro_batches:
        early.add({name: (torch.tensor(value), *rest) for name, (value, *rest) in metrics.items()})
        early.compact(_alone)
        assert len(early._rows) < 3
    assert early.reduce(_alone) == pytest.approx(whole.reduce(_alone))
    assert not early


def test_values_are_detached_and_stay_on_the_device() -> None:
    value = torch.tensor(2.0, requires_grad=True) * 1
    buffer = MetricBuffer()
    buffer.add({"x": (value, 1.0, "log", "mean")})
    assert not buffer._rows[0].tensors.requires_grad


@pytest.mark.parametrize(
    "other",
    [
        _buffer({"y": (1.0, 1.0, "log", "mean")}),
        _buffer({"x": (1.0, 1.0, "micro_batch", "mean")}),
        _buffer({"x": (1.0, 1.0, "micro_batch", "max")}),
        _buffer({"x": (1.0, 1.0, "log", "mean"), "y": (1.0, 1.0, "log", "mean")}),
        _buffer({"x": (1.0, 1.0, "log", "mean")}, {"x": (1.0, 1.0, "log", "mean")}),
    ],
)
def test_ranks_with_different_metrics_say_so(other: Any) -> None:
    with pytest.raises(RuntimeError, match=r"ranks logged different metrics.*This rank: \['x'\]"):
        _reduce_over_ranks(_buffer({"x": (1.0, 1.0, "log", "mean")}), other)


# What a loss returns


def _summarise(value: Any) -> tuple[float, float, str, str]:
    total, count, per, reduce = summarise({"x": value}, _MASK, "mine")["x"]
    return float(total), float(count), per, reduce


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(2.5), (2.5, 1.0)),
        (2.5, (2.5, 1.0)),
        (3, (3.0, 1.0)),
        (torch.tensor([1.0, 2.0, 6.0]), (9.0, 3.0)),
        (torch.tensor([[1.0], [2.0], [6.0]]), (9.0, 3.0)),
        (torch.tensor([True, False, True]), (2.0, 3.0)),
        (torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]]), (10.0, 4.0)),  # scored tokens only
        (torch.tensor([[1.0, 2.0, 3.0]]), (6.0, 3.0)),  # the first rows, as for chosen completions
        (torch.tensor([[1.0, 2.0, 3.0], [4.0, torch.nan, torch.inf]]), (10.0, 4.0)),
    ],
    ids=str,
)
def test_sums_and_counts(value: Any, expected: tuple[float, float]) -> None:
    assert _summarise(value) == (*expected, "log", "mean")
    if isinstance(value, Tensor):
        assert _summarise(Metric(value, per="micro_batch")) == (*expected, "micro_batch", "mean")


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        (torch.tensor([3.0, 1.0, 2.0]), 1.0, 3.0),
        (torch.tensor([[3.0], [1.0], [2.0]]), 1.0, 3.0),
        (torch.tensor([[1.0, 2.0, 6.0], [4.0, -9.0, 9.0], [99.0, 99.0, 99.0]]), 3.0, 4.0),  # of means of sequences
        (torch.tensor(2.0), 2.0, 2.0),
    ],
    ids=str,
)
def test_extrema_are_over_sequences(value: Tensor, low: float, high: float) -> None:
    assert _summarise(Metric(value, reduce="min")) == (low, 1.0, "micro_batch", "min")
    assert _summarise(Metric(value, reduce="max")) == (high, 1.0, "micro_batch", "max")


def test_extrema_over_empty_completions_are_infinite() -> None:
    value = torch.zeros(2, 3)
    empty = torch.zeros(2, 3, dtype=torch.long)
    low = summarise({"x": Metric(value, reduce="min")}, empty, "mine")["x"][0]
    high = summarise({"x": Metric(value, reduce="max")}, empty, "mine")["x"][0]
    assert (low.item(), high.item()) == (torch.inf, -torch.inf)


@pytest.mark.parametrize("shape", [(3, 2), (4, 3), (2, 2, 2), (1, 3, 1)])
def test_other_shapes_are_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"loss 'mine': metric 'x'"):
        _summarise(torch.ones(shape))


@pytest.mark.parametrize("value", [True, None, "1", [1.0]])
def test_other_types_are_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match=r"loss 'mine': metric 'x' must be a detached tensor"):
        _summarise(value)


def test_summaries_are_detached_and_never_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor moves to the host")

    kinds: list[Callable[[Tensor], Any]] = [lambda v: v, Metric, lambda v: Metric(v, reduce="min")]
    value = torch.ones(3, 3, requires_grad=True) * 2
    for method in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, method, refuse)
    for kind in kinds:
        summary = summarise({"x": kind(value), "y": kind(value[:, 0])}, _MASK, "mine")
        MetricBuffer().add(summary)
        assert not any(part.requires_grad for row in summary.values() for part in row if isinstance(part, Tensor))


def test_micro_batches_of_a_loss_average_exactly() -> None:
    values = torch.rand(5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]])
    ranks = [MetricBuffer(), MetricBuffer()]
    for rank, rows in ((0, slice(0, 1)), (1, slice(1, 3)), (0, slice(3, 4)), (1, slice(4, 5))):
        metrics = {"token": values[rows], "row": values[rows, 0]}
        ranks[rank].add(summarise(metrics, mask[rows], "mine"))
    token, row = (values * mask).sum().item() / mask.sum().item(), values[:, 0].mean().item()
    for reduced in _reduce_over_ranks(*ranks):
        assert reduced == {"token": pytest.approx(token, rel=1e-12), "row": pytest.approx(row, rel=1e-12)}


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 5)], ids=str)
def test_a_metric_may_say_which_of_its_values_count(shape: tuple[int, ...]) -> None:
    """Of any width and number of rows: the batch's own mask does not matter."""
    value = torch.full(shape, math.nan)
    counted = torch.zeros(shape, dtype=torch.bool)
    value[1], counted[1] = 4.0, True
    number = float(counted.sum())
    assert _summarise(Metric(value, mask=counted)) == (4 * number, number, "log", "mean")
    assert _summarise(Metric(value, mask=counted, reduce="min"))[0] == 4.0
    assert _summarise(Metric(value, mask=counted.new_zeros(shape)))[:2] == (0.0, 0.0)
    assert _summarise(Metric(value, mask=counted.new_zeros(shape), reduce="max"))[0] == -math.inf


def test_a_metric_and_its_mask_have_one_shape() -> None:
    with pytest.raises(ValueError, match=r"\(2,\) and a mask of shape \(3,\)"):
        _summarise(Metric(torch.ones(2), mask=torch.ones(3)))
