"""The factors of gradient balancing from step to step, against a reference that keeps every Gramian."""

from __future__ import annotations

import math

import pytest
import torch

from trl_custom_losses import Ranks
from trl_custom_losses.balancing.gradients import AGGREGATORS

from .compositions import balanced, conflicting, explicit_gramian, step_data, take_step

pytestmark = pytest.mark.usefixtures("registered")

_TWO = {  # in closed form, for two objectives
    "upgrad": lambda g: [1 + max(-g[0][1], 0) / g[0][0], 1 + max(-g[0][1], 0) / g[1][1]],
    "pcgrad": lambda g: [1 + max(-g[0][1], 0) / g[0][0], 1 + max(-g[0][1], 0) / g[1][1]],
    "mgda": lambda g: [2 * _nearest(g[0][0], g[1][1], g[0][1]), 2 * _nearest(g[1][1], g[0][0], g[0][1])],
}


def _nearest(own: float, other: float, product: float) -> float:
    """The first gradient's share in the shortest vector between two."""
    return min(max((other - product) / (own + other - 2 * product), 0.0), 1.0)


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("method", AGGREGATORS)
def test_factors_come_from_the_steps_before(method: str, decay: float) -> None:
    """factors_t = aggregator(D E_t-1 D), with E a moving average that starts from the first Gramian."""
    schedule = {"schedule": "linear", "start": 0.5, "end": 2.0, "total_steps": 8}
    loss = balanced({"type": method, "decay": decay}, *conflicting(1), weights=[1.0, schedule, -0.7])
    gramians, seen = [], []
    for step in range(6):
        batch, outputs = step_data(step).build(loss)
        gramians.append(take_step(loss, step, [(batch, outputs)]).tolist())
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
        loss = balanced({"type": method, "decay": 0.0, **ridge}, *parts, weights=[0.5, 3.0])
        gramian = take_step(loss, 0, [step_data(seed).build(loss)])
        loss.move_to_step(1)
        scale = torch.tensor([0.5, 3.0], dtype=torch.float64)
        weighted = (scale[:, None] * gramian * scale).tolist()
        found_conflict |= weighted[0][1] < 0
        assert list(loss.factors.values()) == pytest.approx(_TWO[method](weighted), rel=1e-6)
    assert found_conflict


def test_what_is_logged_has_its_factor() -> None:
    loss = balanced("mgda", *conflicting(0)[:2], weights=[0.5, 3.0])
    data = step_data(0)
    take_step(loss, 0, [data.build(loss)])
    loss.move_to_step(1)
    value, metrics = loss(*data.build(loss))
    for name, weight in (("reading0", 0.5), ("reading1", 3.0)):
        assert loss.factors[name] != 1
        assert metrics[f"{name}_weight"].item() == pytest.approx(weight * loss.factors[name])
    weighted = sum(metrics[f"{name}_weight"] * metrics[f"{name}_loss"] for name in loss.names)
    assert metrics["total_loss"].item() == value.item() == pytest.approx(weighted.item())


def test_evaluation_uses_the_last_factors_and_leaves_them() -> None:
    loss = balanced("mgda", *conflicting(0))
    for step in range(3):
        take_step(loss, step, [step_data(step).build(loss)])
    factors, state = dict(loss.factors), {k: v.clone() for k, v in loss.state_dict().items()}
    loss.eval()
    _, metrics = loss(*step_data(9).build(loss))
    assert loss.factors == factors and all(torch.equal(v, state[k]) for k, v in loss.state_dict().items())
    assert metrics["reading0_weight"].item() == pytest.approx(factors["reading0"])


def test_the_gramian_of_the_moment() -> None:
    loss = balanced({"type": "mgda", "gramian": "current"}, *conflicting(0))
    loss.move_to_step(0)
    for seed in range(3):  # micro-batches, of which each has its own
        data = step_data(seed)
        batch, outputs = data.build(loss)
        parts = list(loss.contributions(batch, outputs)[0].values())
        value, _ = loss(batch, outputs)
        factors = AGGREGATORS["mgda"]()(explicit_gramian(parts, [data.rows["logps"]]), 0)
        assert list(loss.factors.values()) == pytest.approx(factors.tolist(), rel=1e-6)
        torch.testing.assert_close(value, sum(f * p for f, p in zip(factors, parts, strict=True)))
    last = dict(loss.factors)
    loss.eval()
    loss(*step_data(9).build(loss))
    assert loss.factors == last, "evaluation has no gradients to balance"


def test_the_gramian_of_the_moment_is_that_of_all_ranks() -> None:
    loss = balanced({"type": "mgda", "gramian": "current"}, *conflicting(0)[:2])
    data = step_data(0)
    batch, outputs = data.build(loss)
    other = torch.tensor([[3.0, -1.0], [-1.0, 0.5]], dtype=torch.float64)
    own = explicit_gramian(list(loss.contributions(batch, outputs)[0].values()), [data.rows["logps"]])
    batch.ranks = Ranks(count=2, sum=lambda tensor: tensor + other)
    loss(batch, outputs)
    assert list(loss.factors.values()) == pytest.approx(AGGREGATORS["mgda"]()(own + other, 0).tolist())
    # Each rank observes its own part, since the driver adds them up.
    torch.testing.assert_close(loss.take_observed()["gramian"], own)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gramian_that_is_not_finite_is_left_out(bad: float) -> None:
    loss = balanced("upgrad", *conflicting(0))
    good = [take_step(loss, step, [step_data(step).build(loss)]) for step in range(2)]
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    broken = good[0].clone()
    broken[0, 0], broken[0, 1], broken[1, 0] = abs(bad), bad, bad
    cosines = loss.on_step_end(2, {"gramian": broken})
    assert set(cosines) == {"grad_cosine/reading1/reading2"}
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    loss.move_to_step(3)
    assert all(math.isfinite(factor) for factor in loss.factors.values())


def test_steps_without_an_observation_change_nothing() -> None:
    loss = balanced("upgrad", *conflicting(0))
    assert loss.on_step_end(0, {}) is None
    assert balanced(None, *conflicting(0)).on_step_end(0, {}) is None
    assert loss.balancer.steps == 0


def test_pcgrad_draws_by_the_number_of_the_step() -> None:
    """So that every rank, and a resumed run, draws the same order."""
    loss = balanced({"type": "pcgrad", "decay": 0.0}, *conflicting(2))
    gramian = torch.tensor([[1.0, -0.6, -0.5], [-0.6, 1.0, -0.2], [-0.5, -0.2, 1.0]], dtype=torch.float64)
    loss.on_step_end(0, {"gramian": gramian})
    draws = set()
    for step in range(1, 9):
        loss.move_to_step(step)
        assert list(loss.factors.values()) == AGGREGATORS["pcgrad"]()(gramian, step).tolist()
        draws.add(tuple(loss.factors.values()))
    assert len(draws) > 1
