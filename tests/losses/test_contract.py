"""What holds for every registered loss, checked on each of them and on some variants."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from trl_custom_losses import Loss, LossFunctionRegistry, Metric
from trl_custom_losses.reductions import reduce_loss
from trl_custom_losses.registry import BuildContext
from trl_custom_losses.state import HostState

from .configs import configs
from .factories import Data, extreme_data, random_data

_CASES = [(family, name) for family in ("preference", "policy") for name in configs(family)]
# These differentiate through a detached weight, so that the gradient is not that of the value; their own tests
# compare it with the formula.
_DETACHED_WEIGHTS = ("cispo", "vespo")
# These hold one half of each pair fixed, and take the whole gradient of the other; their own tests put the halves
# together.
_HALVES = ("rollout_pairs", "composed_dpo_grpo")
_LOCALLY_NORMALISED = ("bnpo",)
# The square of a score, which is held at e^80, is beyond float32.
_SQUARED_SCORE = ("ipo-alpha_divergence",)


class Case(NamedTuple):
    """A registered loss, or a variant, under its test id."""

    family: str
    name: str
    loss: Loss


def _build(family: str, name: str) -> Loss:
    return LossFunctionRegistry.build(configs(family)[name], context=BuildContext(family=family))


@pytest.fixture(params=_CASES, ids=":".join)
def case(request: pytest.FixtureRequest) -> Case:
    family, name = request.param
    return Case(family, name, _build(family, name))


def _metrics(metrics: Any) -> list[Tensor]:
    return [metric.value if isinstance(metric, Metric) else metric for metric in metrics.values()]


# Files


@pytest.mark.parametrize("name", LossFunctionRegistry.names())
def test_registry_name_is_module_name_and_test_name(name: str) -> None:
    package, losses, room, module = LossFunctionRegistry.get(name).__module__.split(".")
    assert (package, losses, module) == ("trl_custom_losses", "losses", name)
    assert room in (LossFunctionRegistry.get(name).family, "auxiliary", "composite")
    assert Path(__file__).with_name(room).joinpath(f"test_{name}.py").is_file(), f"{name} has no tests"


# Values


def test_returns_an_unreduced_loss_and_detached_metrics(case: Case) -> None:
    family, _, loss = case
    data = random_data(family, size=3, length=4)
    batch, outputs = data.build(loss)
    raw, metrics = loss(batch, outputs)
    rows = {3, 6} if family == "preference" else {3}
    assert raw.dim() == 0 if loss.composite else raw.dim() in (1, 2) and raw.size(0) in rows
    assert raw.dim() < 2 or raw.size(1) in (1, 4)
    assert raw.dtype is torch.float64 and raw.requires_grad and raw.isfinite().all()
    assert reduce_loss(loss, raw, batch).shape == ()
    for value in _metrics(metrics):
        assert isinstance(value, Tensor) and not value.requires_grad and value.isfinite().all()


def test_same_input_gives_the_same_output_and_stays_as_it_was(case: Case) -> None:
    family, _, loss = case
    data = random_data(family)
    batch, outputs = data.build(loss, data.denominators())
    seen = [v for part in (batch, outputs, batch.denominators) for v in vars(part).values() if isinstance(v, Tensor)]
    before = [(tensor.detach().clone(), tensor._version) for tensor in seen]
    first, second = (reduce_loss(loss, loss(batch, outputs)[0], batch) for _ in range(2))
    first.backward()
    assert torch.equal(first, second)
    for tensor, (copied, version) in zip(seen, before, strict=True):
        assert torch.equal(tensor, copied) and tensor._version == version


@pytest.mark.parametrize("size", [1, 3])
def test_half_precision_inputs_are_computed_in_float32(case: Case, size: int) -> None:
    family, _, loss = case
    data = random_data(family, size=size, dtype=torch.bfloat16)
    value = data.loss(loss)
    assert value.dtype is torch.float32
    assert torch.equal(value, data.to(torch.float32).loss(loss))
    assert data.gradient(loss).dtype is torch.bfloat16


# Gradients


def test_gradient_is_the_derivative(case: Case) -> None:
    family, name, loss = case
    if name.startswith((*_DETACHED_WEIGHTS, *_HALVES)):
        return
    data = random_data(family, size=3, length=3)
    leaf = data.leaf(loss)
    assert torch.autograd.gradcheck(lambda values: data.with_rows(**{leaf: values}).loss(loss), data.rows[leaf])
    assert data.gradient(loss).abs().max() > 1e-3


def test_gradient_does_not_reach_the_reference_or_the_generating_policy(case: Case) -> None:
    family, _, loss = case
    data = random_data(family)
    fixed = {name: data.rows[name].clone().requires_grad_() for name in ("ref", "old")}
    data.with_rows(**fixed).loss(loss).backward()
    assert data.rows[data.leaf(loss)].grad.abs().sum() > 0
    for name, tensor in fixed.items():
        assert tensor.grad is None or not tensor.grad.any(), f"{name} gets a gradient"


@pytest.mark.parametrize("garbage", [-7.0, 1e5, float("inf"), float("nan")], ids=str)
def test_masked_positions_neither_count_nor_get_gradient(case: Case, garbage: float) -> None:
    family, _, loss = case
    data = random_data(family, length=4, lengths=[1, 4, 2, 3, 3, 1, 4, 2][: 8 if family == "preference" else 4])
    hidden = data.rows["mask"] == 0
    logps = data.rows["logps"].detach().masked_fill(hidden, garbage).requires_grad_()
    dirty = data.with_rows(logps=logps)
    torch.testing.assert_close(dirty.loss(loss), data.loss(loss), rtol=0, atol=0)
    gradient, unscored = dirty.gradient(loss), data.unscored(loss)
    assert (gradient[unscored] == 0).all()
    torch.testing.assert_close(gradient[~unscored], data.gradient(loss)[~unscored], rtol=0, atol=0)


# Invariances


def _assert_equal(whole: Data, loss: Loss, total: Tensor) -> None:
    """`total`, computed from parts of `whole`, has the same value and gradient."""
    torch.testing.assert_close(total, whole.loss(loss))
    (gradient,) = torch.autograd.grad(total, whole.rows[whole.leaf(loss)])
    torch.testing.assert_close(gradient, whole.gradient(loss))


@pytest.mark.parametrize("count", [1, 7])
def test_padding_changes_nothing(case: Case, count: int) -> None:
    family, _, loss = case
    data = random_data(family)
    _assert_equal(data, loss, data.padded(count, fill=-3.0).loss(loss))


def test_order_of_pairs_and_sequences_does_not_matter(case: Case) -> None:
    family, _, loss = case
    data = random_data(family)
    _assert_equal(data, loss, data.take([2, 0, 3, 1]).loss(loss))


def test_micro_batches_sum_to_the_whole(case: Case) -> None:
    family, name, loss = case
    data = random_data(family)
    parts = [[0], [1, 2, 3]]
    if loss.batch_coupled:
        parts = [[0, 1, 2, 3]]
    contributions = [data.take(part).loss(loss, data.denominators(micro_batches=len(parts))) for part in parts]
    if name in _LOCALLY_NORMALISED:  # the mean over micro-batches of each one's own mean, as documented
        own = torch.stack([data.take(part).loss(loss) for part in parts])
        torch.testing.assert_close(sum(contributions), own.mean())
        assert not torch.isclose(own.mean(), data.loss(loss), rtol=1e-3)
    else:
        _assert_equal(data, loss, sum(contributions))


def test_ranks_average_to_the_whole(case: Case) -> None:
    family, name, loss = case
    if loss.batch_coupled or name in _LOCALLY_NORMALISED:
        return
    data = random_data(family, size=6)
    ranks = [[[0], [1, 2]], [[3, 4], [5]]]  # micro-batches of each rank
    shared = data.denominators(ranks=2, micro_batches=2)
    sums = [sum(data.take(part).loss(loss, shared) for part in parts) for parts in ranks]
    _assert_equal(data, loss, torch.stack(sums).mean())


def test_batch_coupling_is_declared(case: Case) -> None:
    family, _, loss = case
    data = random_data(family)
    if loss.composite:
        return
    raw, _ = loss(*data.build(loss))
    alone = torch.stack([loss(*data.take([index]).build(loss))[0] for index in range(data.size)])
    alone = alone.transpose(0, 1).flatten(0, 1)  # chosen rows first
    assert loss.batch_coupled == (not torch.allclose(raw, alone))


# Numerics


@pytest.mark.parametrize("empty", ["one row", "all rows"])
def test_empty_completions(case: Case, empty: str) -> None:
    family, _, loss = case
    size, count = (3, 6) if family == "preference" else (4, 4)
    lengths = [0] * count if empty == "all rows" else [2, 0, 3, 1, 4, 2][:count]
    data = random_data(family, size=size, length=4, lengths=lengths)
    value, gradient = data.loss(loss), data.gradient(loss)
    assert value.isfinite() and gradient.isfinite().all()
    assert (gradient[data.unscored(loss)] == 0).all()
    if empty == "one row":
        assert gradient.any()
    elif family == "policy":
        assert value == 0


def test_completions_of_one_token(case: Case) -> None:
    family, _, loss = case
    data = random_data(family, length=1)
    assert data.loss(loss).isfinite() and data.gradient(loss).isfinite().all() and data.gradient(loss).any()


def _extremes(family: str, nats: float, advantage: float) -> list[Data]:
    signs = [(first, second) for first in (-1, 1) for second in (-1, 1)]
    if family == "preference":
        return [extreme_data(family, log_ratios=[first * nats, second * nats]) for first, second in signs]
    return [extreme_data(family, log_ratios=[first * nats], advantages=[second * advantage]) for first, second in signs]


def test_finite_at_80_nats(case: Case) -> None:
    family, _, loss = case
    for data in _extremes(family, 80.0, 100.0):
        assert data.loss(loss).isfinite() and data.gradient(loss).isfinite().all()


def test_finite_at_1e4_nats(case: Case) -> None:
    family, name, loss = case
    for data in _extremes(family, 1e4, 1e4):
        log_ratios = (data.rows["logps"] - data.rows["old"]).flatten().tolist()
        if name in _SQUARED_SCORE and min(log_ratios) < 0:
            continue
        value, gradient = data.loss(loss), data.gradient(loss)
        found = f"log-ratios {log_ratios}, advantages {data.items['advantages'].tolist()}: {value}, {gradient}"
        assert value.isfinite() and gradient.isfinite().all(), found


# Running


def test_never_waits_for_the_device(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    family, _, loss = case
    data = random_data(family)
    batch, outputs = data.build(loss, data.denominators())  # `prepare` may wait, once a generation batch

    # State that never leaves the host may be read.
    on_host = [value for part in loss.modules() if isinstance(part, HostState) for value in part.buffers()]

    def refused(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert any(self is value for value in on_host), "the loss moves a tensor to the host"
            return method(self, *args, **kwargs)

        return call

    for method in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"):
        monkeypatch.setattr(Tensor, method, refused(getattr(Tensor, method)))
    raw, _ = loss(batch, outputs)
    reduce_loss(loss, raw, batch)


def test_runs_where_tensors_hold_no_values(case: Case) -> None:
    family, _, loss = case
    data = random_data(family, dtype=torch.float32).to("meta")
    loss.to("meta")  # as the trainer moves it to the device, with what it learns
    assert data.loss(loss).device.type == "meta"
    assert data.gradient(loss).shape == data.rows[data.leaf(loss)].shape


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_are_equal(case: Case, how: str) -> None:
    family, name, loss = case
    if how == "deepcopy":
        copied = copy.deepcopy(loss)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(loss))
    else:
        copied = _build(family, name)
        copied.load_state_dict(loss.state_dict())
    assert copied is not loss and repr(copied) == repr(loss)
    assert (copied.name, copied.origins) == (loss.name, loss.origins)
    data = random_data(family)
    assert torch.equal(data.loss(copied), data.loss(loss))
