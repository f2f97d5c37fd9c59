"""Gradient balancing inside a composition, against plain autograd and a reference that keeps every Gramian."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.example_losses import restored_registry
from tests.losses.factories import Data, random_data
from trl_custom_losses import (
    ComposableLossFunction,
    Denominators,
    LossConfigError,
    LossFunctionRegistry,
    ModelOutputs,
    PreferenceBatch,
    PreferenceLoss,
    Ranks,
)
from trl_custom_losses.balancing.balancer import make_balancer
from trl_custom_losses.balancing.gradients import AGGREGATORS
from trl_custom_losses.balancing.gramian import gramian_of


class Reading(PreferenceLoss):
    """The weighted sum of squares of a field of the outputs, padding included, with weights of a seed."""

    def __init__(self, *, field: str = "per_token_logps", seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.requires = frozenset() if field == "per_token_logps" else frozenset({field})
        self.field, self.seed, self.scale = field, seed, scale

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        values = getattr(model_outputs, self.field)
        direction = torch.randn(values.shape, generator=torch.Generator().manual_seed(self.seed)).to(values)
        return self.scale * (direction * (1 + values) ** 2).sum(), {}


class Everywhere(PreferenceLoss):
    """Pulls at every position, padding included."""

    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return (1 - model_outputs.per_token_logps).log().sum(1), {}


class Constant(PreferenceLoss):
    def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
        return torch.ones(batch.num_pairs, dtype=model_outputs.logps.dtype), {}


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    with restored_registry():
        for name, loss in {"reading": Reading, "everywhere": Everywhere, "constant": Constant}.items():
            LossFunctionRegistry.register(name)(loss)
        yield


def _balanced(balancing: Any, *components: Any, weights: Sequence[Any] | None = None) -> ComposableLossFunction:
    losses = {}
    for config in components:
        name = config["type"] if isinstance(config, dict) else config
        losses[f"{name}{len(losses)}"] = LossFunctionRegistry.build(config)
    return ComposableLossFunction(losses, weights, balancing=balancing)


def _explicit_gramian(losses: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
    """Inner products, entry by entry."""
    gradients = [
        [
            torch.zeros_like(anchor) if part is None else part
            for anchor, part in zip(
                anchors, torch.autograd.grad(loss, anchors, retain_graph=True, allow_unused=True), strict=True
            )
        ]
        for loss in losses
    ]
    return torch.tensor(
        [[sum((a * b).sum().item() for a, b in zip(x, y, strict=True)) for y in gradients] for x in gradients],
        dtype=torch.float64,
    )


def _take_step(loss: ComposableLossFunction, step: int, parts: Sequence[tuple[Any, ModelOutputs]]) -> Tensor:
    """One optimizer step as the driver passes it on; returns the Gramian that was observed."""
    loss.move_to_step(step)
    loss.on_step_begin(step)
    for batch, outputs in parts:
        loss(batch, outputs)
    observed = {name: value.double() for name, value in loss.take_observed().items()}
    loss.on_step_end(step, observed)
    return observed["gramian"]


# The Gramian


def test_gramian_is_that_of_the_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((2, 3), (4,)))
    losses = [(x**2).sum(), x.sum() * y.sum(), (y**3).sum(), torch.ones((), dtype=torch.float64)]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(losses[3], x)  # it does not depend on the anchors at all
    found = gramian_of(losses, [x, y])
    torch.testing.assert_close(found[:3, :3], _explicit_gramian(losses[:3], [x, y]))
    assert found[0, 2] == 0 and not found[3].any() and not found[:, 3].any()
    assert not found.requires_grad and x.grad is None
    sum(losses).backward()  # the graph is still there


@pytest.mark.parametrize("fields", [("per_token_logps",), ("per_token_logps", "entropies"), ("pooled_hidden",)])
def test_observes_the_gramian_with_respect_to_all_that_is_read(fields: tuple[str, ...]) -> None:
    components = [{"type": "reading", "field": field, "seed": i} for i, field in enumerate(fields * 2)]
    loss = _balanced("upgrad", "sigmoid", "sft", *components)
    data = random_data("preference")
    data.rows["entropies"].requires_grad_()
    batch, outputs = data.build(loss)
    # With respect to what the model returned: at masked positions, which these losses read, nothing reaches it.
    rows = {"per_token_logps": "logps", "entropies": "entropies", "pooled_hidden": "hidden"}
    anchors = [data.rows[rows[name]] for name in dict.fromkeys(("per_token_logps", *fields))]
    assert (data.rows["mask"] == 0).any()
    expected = _explicit_gramian(list(loss.contributions(batch, outputs)[0].values()), anchors)
    torch.testing.assert_close(_take_step(loss, 0, [(batch, outputs)]), expected)
    assert (expected.abs() > 1e-6).sum() > len(components) + 2, "some are not orthogonal"


def test_logits_stand_for_what_is_computed_from_them() -> None:
    """Log-probabilities would be counted twice beside them."""
    loss = _balanced("upgrad", "sigmoid", {"type": "reading", "field": "logits"}, {"type": "reading", "seed": 1})
    batch, outputs = random_data("preference", lengths=[5] * 8).build(loss)
    logits = outputs.logits.detach().requires_grad_()
    chosen = logits.log_softmax(-1)[..., 0]
    outputs = ModelOutputs(per_token_logps=chosen, mask=outputs.mask, logits=logits, ref_sums=outputs.ref_sums)
    assert outputs.anchors() == [logits]
    expected = _explicit_gramian(list(loss.contributions(batch, outputs)[0].values()), [logits])
    torch.testing.assert_close(_take_step(loss, 0, [(batch, outputs)]), expected)
    assert (expected[0, 1:].abs() > 1e-8).all()


@pytest.mark.parametrize("names", [("sigmoid", "sft", "sigmoid_norm"), ("everywhere", "sft"), ("grpo", "luspo")])
def test_padding_changes_nothing(names: tuple[str, ...]) -> None:
    found = []
    for padding in (0, 5):
        loss = _balanced("upgrad", *names)
        data = random_data(loss.family)
        data = data.padded(padding, fill=-3.0) if padding else data
        found.append(_take_step(loss, 0, [data.build(loss)]))
    torch.testing.assert_close(*found)


def test_a_loss_that_reads_nothing_has_no_gradient_and_changes_nothing() -> None:
    loss, without = (_balanced("mgda", *names, "ipo") for names in (("sigmoid", "sft", "constant"), ("sigmoid", "sft")))
    for step in range(2):
        for each in (loss, without):
            gramian = _take_step(each, step, [random_data("preference", seed=step).build(each)])
            if each is loss:
                assert not gramian[2].any() and not gramian[:, 2].any()
    loss.on_step_begin(2)
    without.on_step_begin(2)
    assert loss.factors.pop("constant2") == 1
    assert list(loss.factors.values()) == pytest.approx(list(without.factors.values()))


@pytest.mark.parametrize("how", ["eval", "no_grad", "detached"])
def test_nothing_is_observed_without_training(how: str) -> None:
    loss = _balanced("upgrad", "sigmoid", "sft")
    data = random_data("preference")
    if how == "detached":
        data = data.with_rows(logps=data.rows["logps"].detach())
    loss.train(how != "eval")
    with torch.set_grad_enabled(how != "no_grad"):
        loss(*data.build(loss))
    assert loss.take_observed() == {}


# Factors from step to step


def _conflicting(seed: int, scale: float = 1.0) -> list[dict[str, Any]]:
    return [{"type": "reading", "seed": 3 * seed + k, "scale": scale * (k + 1)} for k in range(3)]


_TWO = {  # in closed form, for two objectives
    "upgrad": lambda g: [1 + max(-g[0][1], 0) / g[0][0], 1 + max(-g[0][1], 0) / g[1][1]],
    "pcgrad": lambda g: [1 + max(-g[0][1], 0) / g[0][0], 1 + max(-g[0][1], 0) / g[1][1]],
    "mgda": lambda g: [2 * _nearest(g[0][0], g[1][1], g[0][1]), 2 * _nearest(g[1][1], g[0][0], g[0][1])],
}


def _nearest(own: float, other: float, product: float) -> float:
    """The first gradient's share in the shortest vector between two."""
    return min(max((other - product) / (own + other - 2 * product), 0.0), 1.0)


def _step_data(step: int) -> Data:
    return random_data("preference", seed=step)


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("method", AGGREGATORS)
def test_factors_come_from_the_steps_before(method: str, decay: float) -> None:
    """factors_t = aggregator(D E_t-1 D), with E a moving average that starts from the first Gramian."""
    schedule = {"schedule": "linear", "start": 0.5, "end": 2.0, "total_steps": 8}
    loss = _balanced({"type": method, "decay": decay}, *_conflicting(1), weights=[1.0, schedule, -0.7])
    gramians, seen = [], []
    for step in range(6):
        batch, outputs = _step_data(step).build(loss)
        gramians.append(_take_step(loss, step, [(batch, outputs)]).tolist())
        seen.append(list(loss.factors.values()))
        raw = loss(batch, outputs)[0]
        loss.take_observed()
        weights = [1.0, 0.5 + 1.5 * step / 8, -0.7]
        average = None
        for gramian in gramians[:-1]:
            average = (
                gramian
                if average is None
                else [
                    [decay * a + (1 - decay) * g for a, g in zip(row, new, strict=True)]
                    for row, new in zip(average, gramian, strict=True)
                ]
            )
        if step == 0:
            expected = [1.0] * 3
        else:
            weighted = [[average[i][j] * weights[i] * weights[j] for j in range(3)] for i in range(3)]
            expected = AGGREGATORS[method]()(torch.tensor(weighted, dtype=torch.float64), step).tolist()
            assert expected != [1.0] * 3
        assert seen[-1] == pytest.approx(expected, rel=1e-9)
        parts = loss.contributions(batch, outputs)[0].values()
        torch.testing.assert_close(raw, sum(w * f * p for w, f, p in zip(weights, expected, parts, strict=True)))
    assert any(a != b for a, b in zip(seen[4], seen[5], strict=True))


@pytest.mark.parametrize("method", _TWO)
def test_factors_of_two_objectives_in_closed_form(method: str) -> None:
    found_conflict = False
    for seed in range(6):
        parts = [{"type": "reading", "seed": seed, "scale": 0.3}, {"type": "reading", "seed": seed + 40}]
        ridge = {"reg_eps": 1e-10} if method == "upgrad" else {}
        loss = _balanced({"type": method, "decay": 0.0, **ridge}, *parts, weights=[0.5, 3.0])
        gramian = _take_step(loss, 0, [_step_data(seed).build(loss)])
        loss.on_step_begin(1)
        scale = torch.tensor([0.5, 3.0], dtype=torch.float64)
        weighted = (scale[:, None] * gramian * scale).tolist()
        found_conflict |= weighted[0][1] < 0
        assert list(loss.factors.values()) == pytest.approx(_TWO[method](weighted), rel=1e-6)
    assert found_conflict


def test_what_is_logged_has_its_factor() -> None:
    loss = _balanced("mgda", *_conflicting(0)[:2], weights=[0.5, 3.0])
    data = _step_data(0)
    _take_step(loss, 0, [data.build(loss)])
    loss.on_step_begin(1)
    value, metrics = loss(*data.build(loss))
    for name, weight in (("reading0", 0.5), ("reading1", 3.0)):
        assert loss.factors[name] != 1
        assert metrics[f"{name}_weight"].item() == pytest.approx(weight * loss.factors[name])
    weighted = sum(metrics[f"{name}_weight"] * metrics[f"{name}_loss"] for name in loss.names)
    assert metrics["total_loss"].item() == value.item() == pytest.approx(weighted.item())


def test_evaluation_uses_the_last_factors_and_leaves_them() -> None:
    loss = _balanced("mgda", *_conflicting(0))
    for step in range(3):
        _take_step(loss, step, [_step_data(step).build(loss)])
    factors, state = dict(loss.factors), {k: v.clone() for k, v in loss.state_dict().items()}
    loss.eval()
    _, metrics = loss(*_step_data(9).build(loss))
    assert loss.factors == factors and all(torch.equal(v, state[k]) for k, v in loss.state_dict().items())
    assert metrics["reading0_weight"].item() == pytest.approx(factors["reading0"])


def test_the_gramian_of_the_moment() -> None:
    loss = _balanced({"type": "mgda", "gramian": "current"}, *_conflicting(0))
    loss.on_step_begin(0)
    for seed in range(3):  # micro-batches, of which each has its own
        data = _step_data(seed)
        batch, outputs = data.build(loss)
        parts = list(loss.contributions(batch, outputs)[0].values())
        value, _ = loss(batch, outputs)
        factors = AGGREGATORS["mgda"]()(_explicit_gramian(parts, [data.rows["logps"]]), 0)
        assert list(loss.factors.values()) == pytest.approx(factors.tolist(), rel=1e-6)
        torch.testing.assert_close(value, sum(f * p for f, p in zip(factors, parts, strict=True)))
    last = dict(loss.factors)
    loss.eval()
    loss(*_step_data(9).build(loss))
    assert loss.factors == last, "evaluation has no gradients to balance"


def test_the_gramian_of_the_moment_is_that_of_all_ranks() -> None:
    loss = _balanced({"type": "mgda", "gramian": "current"}, *_conflicting(0)[:2])
    data = _step_data(0)
    batch, outputs = data.build(loss)
    other = torch.tensor([[3.0, -1.0], [-1.0, 0.5]], dtype=torch.float64)
    own = _explicit_gramian(list(loss.contributions(batch, outputs)[0].values()), [data.rows["logps"]])
    batch.ranks = Ranks(count=2, sum=lambda tensor: tensor + other)
    loss(batch, outputs)
    assert list(loss.factors.values()) == pytest.approx(AGGREGATORS["mgda"]()(own + other, 0).tolist())
    # Each rank observes its own part, since the driver adds them up.
    torch.testing.assert_close(loss.take_observed()["gramian"], own)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gramian_that_is_not_finite_is_left_out(bad: float) -> None:
    loss = _balanced("upgrad", *_conflicting(0))
    good = [_take_step(loss, step, [_step_data(step).build(loss)]) for step in range(2)]
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    broken = good[0].clone()
    broken[0, 0], broken[0, 1], broken[1, 0] = abs(bad), bad, bad
    cosines = loss.on_step_end(2, {"gramian": broken})
    assert set(cosines) == {"grad_cosine/reading1/reading2"}
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    loss.on_step_begin(3)
    assert all(math.isfinite(factor) for factor in loss.factors.values())


def test_steps_without_an_observation_change_nothing() -> None:
    loss = _balanced("upgrad", *_conflicting(0))
    assert loss.on_step_end(0, {}) is None
    assert _balanced(None, *_conflicting(0)).on_step_end(0, {}) is None
    assert loss.balancer.steps == 0


def test_pcgrad_draws_by_the_number_of_the_step() -> None:
    """So that every rank, and a resumed run, draws the same order."""
    loss = _balanced({"type": "pcgrad", "decay": 0.0}, *_conflicting(2))
    gramian = torch.tensor([[1.0, -0.6, -0.5], [-0.6, 1.0, -0.2], [-0.5, -0.2, 1.0]], dtype=torch.float64)
    loss.on_step_end(0, {"gramian": gramian})
    draws = set()
    for step in range(1, 9):
        loss.on_step_begin(step)
        assert list(loss.factors.values()) == AGGREGATORS["pcgrad"]()(gramian, step).tolist()
        draws.add(tuple(loss.factors.values()))
    assert len(draws) > 1


# Splitting


def _split(data: Data, ranks: Sequence[Sequence[Sequence[int]]], style: str) -> list[list[tuple[Data, Denominators]]]:
    """Parts of a batch with the denominators that DPO's or GRPO's trainer gives them: one divides the loss by the
    number of micro-batches afterwards, for the other the loss does so itself."""
    whole, processes = data.denominators(), len(ranks)
    found = []
    for parts in ranks:
        divisor = processes * (len(parts) if style == "dpo" else 1)
        shared = Denominators(
            sequences=whole.sequences / divisor,
            tokens=whole.tokens / divisor,
            chosen_tokens=whole.chosen_tokens / divisor,
            micro_batches=1.0 if style == "dpo" else len(parts),
            step_fraction=1 / divisor,
        )
        found.append([(data.take(part), shared) for part in parts])
    return found


@pytest.mark.parametrize(
    "ranks",
    [[[[0], [1, 2, 3], [4, 5]]], [[[0, 1, 2]], [[3, 4, 5]]], [[[0], [1, 2]], [[3, 4], [5]]]],
    ids=["micro-batches", "ranks", "both"],
)
@pytest.mark.parametrize("family, style", [("preference", "dpo"), ("policy", "grpo")])
def test_the_gramian_and_the_factors_do_not_depend_on_how_a_batch_is_split(
    ranks: list, family: str, style: str
) -> None:
    names = {"preference": ["sigmoid", "sft", "ipo"], "policy": ["grpo", "dapo", "luspo"]}[family]
    whole = _balanced("mgda", *names)
    replicas = [_balanced("mgda", *names) for _ in ranks]
    for step in range(4):
        data = random_data(family, size=6, seed=step)
        expected = _take_step(whole, step, [data.build(whole, data.denominators())])
        sums = torch.zeros_like(expected)
        total = torch.zeros((), dtype=torch.float64)
        for replica, parts in zip(replicas, _split(data, ranks, style), strict=True):
            replica.on_step_begin(step)
            for part, shared in parts:
                value, _ = replica(*part.build(replica, shared))
                total += shared.step_fraction * value.detach()
            sums += replica.take_observed()["gramian"]
        torch.testing.assert_close(sums, expected)
        torch.testing.assert_close(total, whole(*data.build(whole, data.denominators()))[0].detach())
        whole.take_observed()
        for replica in replicas:
            replica.on_step_end(step, {"gramian": sums})
            assert list(replica.factors.values()) == pytest.approx(list(whole.factors.values()), rel=1e-6)
    assert list(whole.factors.values()) != [1.0] * 3


# State


def test_the_state_continues_bit_for_bit() -> None:
    def make() -> ComposableLossFunction:
        return _balanced("pcgrad", *_conflicting(0))

    whole, factors, states = make(), [], []
    for step in range(6):
        states.append({name: value.clone() for name, value in whole.state_dict().items()})
        _take_step(whole, step, [_step_data(step).build(whole)])
        factors.append(dict(whole.factors))
    for start, state in enumerate(states):
        resumed = make()
        resumed.load_state_dict(state)
        for step in range(start, 6):
            _take_step(resumed, step, [_step_data(step).build(resumed)])
            assert resumed.factors == factors[step]


def test_the_state_stays_on_the_host_in_float64() -> None:
    loss = copy.deepcopy(_balanced("upgrad", "sigmoid", "sft")).to("meta").half()
    assert {name: (str(v.device), v.dtype) for name, v in loss.state_dict().items()} == {
        "balancer.average": ("cpu", torch.float64),
        "balancer.steps": ("cpu", torch.int64),
    }


# Cosines


def test_cosines_are_reported_at_the_steps_end() -> None:
    loss = _balanced("upgrad", "sigmoid", "sft", "constant")
    batch, outputs = random_data("preference").build(loss)
    first, second = (
        torch.autograd.grad(part, outputs.per_token_logps, retain_graph=True)[0].flatten()
        for part in list(loss.contributions(batch, outputs)[0].values())[:2]
    )
    loss.on_step_begin(0)
    loss(batch, outputs)
    metrics = loss.on_step_end(0, {"gramian": loss.take_observed()["gramian"].double()})
    expected = F.cosine_similarity(first, second, dim=0).item()
    assert metrics == {"grad_cosine/sigmoid0/sft1": pytest.approx(expected)} and -1 < expected < 1
    assert all(type(value) is float for value in metrics.values())


def test_cosines_of_the_step_not_of_the_average() -> None:
    balancer = make_balancer("upgrad", ["a", "b"])
    gramians = [torch.tensor([[4.0, x], [x, 9.0]], dtype=torch.float64) for x in (6.0, -6.0, 0.0)]
    found = []
    for gramian in gramians:
        balancer.update(gramian)
        found.append(balancer.cosines(gramian)["grad_cosine/a/b"])
    assert found == pytest.approx([1.0, -1.0, 0.0])


# Configuration


@pytest.mark.parametrize(
    ("balancing", "message"),
    [
        ("upgrd", r"no method 'upgrd' \(did you mean 'upgrad'"),
        ("", "no method ''"),
        ({"decay": 0.5}, "no method None.*known: upgrad, mgda, pcgrad, cagrad"),
        ({"type": "upgrad", "decay": 1.0}, "balancing 'upgrad': .*'decay'.* < 1, found 1.0"),
        ({"type": "upgrad", "decay": -0.1}, "balancing 'upgrad': .*'decay'.* >= 0"),
        ({"type": "upgrad", "decay": float("nan")}, "balancing 'upgrad', 'decay': expected a finite number"),
        ({"type": "upgrad", "decay": "0.9"}, "balancing 'upgrad', 'decay': expected float, found '0.9'"),
        ({"type": "upgrad", "decay": {"schedule": "constant", "value": 0.9}}, "'decay': expected float"),
        ({"type": "upgrad", "gramian": "now"}, r"'gramian': expected 'previous' \| 'current', found 'now'"),
        ({"type": "upgrad", "reg_eps": 0.0}, "balancing 'upgrad': .*'reg_eps'.* > 0"),
        ({"type": "upgrad", "c": 0.1}, r"balancing 'upgrad': .*no hyperparameter 'c'.*upgrad\(reg_eps"),
        ({"type": "mgda", "reg_eps": 0.1}, "balancing 'mgda': .*no hyperparameter 'reg_eps'"),
        ({"type": "cagrad", "c": -1}, "balancing 'cagrad': .*'c'.* >= 0"),
        ({"type": "cagrad", "c": None}, "balancing 'cagrad': .*'c'.*expected float, found None"),
        ({"type": "pcgrad", "seed": 1}, "balancing 'pcgrad': .*no hyperparameter 'seed'"),
    ],
    ids=str,
)
def test_mistakes_are_named(balancing: Any, message: str) -> None:
    config = {"type": "composed", "components": [{"type": "sigmoid"}, {"type": "sft"}], "balancing": balancing}
    with pytest.raises(LossConfigError, match=f"loss 'composed': .*{message}"):
        LossFunctionRegistry.build(config)


@pytest.mark.parametrize("balancing", [3, ["upgrad"], True])
def test_balancing_is_a_name_or_a_dict(balancing: Any) -> None:
    config = {"type": "composed", "components": [{"type": "sigmoid"}, {"type": "sft"}], "balancing": balancing}
    with pytest.raises(LossConfigError, match=r"'balancing'.*expected str \| dict"):
        LossFunctionRegistry.build(config)


def test_one_objective_cannot_be_balanced() -> None:
    with pytest.raises(LossConfigError, match="at least two components, found 1"):
        _balanced("upgrad", "sigmoid")


def test_options_reach_the_method() -> None:
    balancer = make_balancer({"type": "cagrad", "c": 1, "decay": 0, "gramian": "current"}, ["a", "b"])
    assert (balancer.aggregator.c, balancer.decay, balancer.source) == (1.0, 0.0, "current")
    assert repr(balancer) == "GradientBalancer(CAGrad, decay=0.0, gramian='current')"


# Training


def _train(balancing: Any, data: Data, losses: Callable[[Any], ComposableLossFunction]) -> list[list[float]]:
    """The objectives before and after a short training of log-probabilities, by hand as a trainer does it."""
    loss = losses(balancing)
    logits = data.rows["logps"].detach().neg().expm1().log().neg().requires_grad_()  # logps = logsigmoid(logits)
    optimizer = torch.optim.SGD([logits], lr=0.05)
    found = []
    for step in range(31):
        loss.on_step_begin(step)
        batch, outputs = data.with_rows(logps=F.logsigmoid(logits)).build(loss)
        total, metrics = loss(batch, outputs)
        found.append([metrics[f"{name}_loss"].item() for name in loss.names])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        loss.on_step_end(step, loss.take_observed())
    return [found[0], found[-1]]


@pytest.mark.parametrize("method", ["upgrad", "pcgrad", "mgda"])
def test_balancing_improves_both_of_two_objectives_in_conflict(method: str) -> None:
    """DPO against the likelihood of the rejected responses: their sum gives DPO up."""

    @LossFunctionRegistry.register("likelihood")
    class Likelihood(PreferenceLoss):
        def forward(self, batch: PreferenceBatch, model_outputs: ModelOutputs) -> tuple[Tensor, dict]:
            return -2 * model_outputs.logps.chunk(2)[1], {}

    def losses(balancing: Any) -> ComposableLossFunction:
        components = [{"type": "sigmoid", "beta": 1.0}, {"type": "likelihood"}]
        return LossFunctionRegistry.build({"type": "composed", "components": components, "balancing": balancing})

    data = random_data("preference", size=4, length=4, seed=3)
    data = replace(data, rows=data.rows | {"ref": data.rows["logps"].detach()})
    (dpo, likelihood), (plain_dpo, plain_likelihood) = _train(None, data, losses)
    assert dpo == pytest.approx(math.log(2))
    assert plain_likelihood < likelihood and plain_dpo > 1.05 * dpo
    _, (balanced_dpo, balanced_likelihood) = _train(method, data, losses)
    assert balanced_dpo < 0.85 * dpo and balanced_likelihood < 0.96 * likelihood
