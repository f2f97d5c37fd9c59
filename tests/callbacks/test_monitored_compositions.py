"""What the gradient monitor reports of compositions within other losses, and how it is named."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trl_custom_losses import ComposableLossFunction, Loss, LossFunctionRegistry
from trl_custom_losses.callbacks import LossFunctionCallback

from .runs import Run, Slopes, one_pair, two


def clipped(base: Loss, bound: float) -> Loss:
    loss = LossFunctionRegistry.build({"type": "clipped_loss", "base_loss": "sigmoid", "max_grad_norm": bound})
    loss.losses[0] = base
    return loss


def test_a_composition_within_another_reports_its_own() -> None:
    inner = ComposableLossFunction({"a": Slopes(chosen=1.0), "x": Slopes(chosen=0.0, rejected=1.0)}, {"a": 2.0})
    found = Run(ComposableLossFunction({"a": Slopes(chosen=3.0), "in": inner}, {"in": 0.5})).step(one_pair())
    root, norm = math.sqrt(2), math.sqrt(10)
    assert found == pytest.approx(
        {
            "grad_norm/a": 3 * root,
            "grad_norm_weighted/a": 3 * root,
            "grad_norm/in": norm,
            "grad_norm_weighted/in": norm / 2,
            "grad_norm/total": math.sqrt(2 * 4**2 + 2 * 0.5**2),
            "grad_cosine/a/in": 2 / math.sqrt(5),
            "in/grad_norm/a": root,
            "in/grad_norm_weighted/a": 2 * root,
            "in/grad_norm/x": root,
            "in/grad_norm_weighted/x": root,
            "in/grad_norm/total": norm,
            "in/grad_cosine/a/x": 0,
        }
    )


def test_names_begin_with_the_whole_path() -> None:
    inner = ComposableLossFunction({"in": two()})
    found = Run(ComposableLossFunction({"out": inner, "a": Slopes(chosen=3.0)})).step(one_pair())
    assert found["out/in/grad_cosine/a/b"] == pytest.approx(6 / math.sqrt(180))
    assert found["out/in/grad_norm/b"] == pytest.approx(math.sqrt(10)) == found["out/in/grad_norm_weighted/b"]
    assert {key for key in found if key.endswith("/b")} == {
        f"out/in/{name}/b" for name in ("grad_norm", "grad_norm_weighted", "grad_cosine/a")
    }


@pytest.mark.parametrize("bound", [0.5, 100.0])
def test_a_clipped_composition_reports_before_and_after_clipping(bound: float) -> None:
    found = Run(clipped(two(weights={"a": 2.0}), bound)).step(one_pair())
    total = math.sqrt(2 * 7**2 + 2 * 2**2)
    assert found["base/grad_norm/total"] == pytest.approx(total)
    assert found["grad_norm/clipped_loss"] == pytest.approx(min(total, bound))
    assert found["base/grad_norm/a"] == pytest.approx(math.sqrt(18))
    assert found["base/grad_cosine/a/b"] == pytest.approx(6 / math.sqrt(180))
    assert all(key.startswith("base/") for key in found if key != "grad_norm/clipped_loss")


def test_a_clipped_component_counts_as_it_is_clipped() -> None:
    loss = ComposableLossFunction({"c": clipped(two(), 0.5), "a": Slopes(chosen=3.0)}, {"c": 4.0})
    found = Run(loss).step(one_pair())
    assert found["grad_norm/c"] == pytest.approx(0.5) and found["grad_norm_weighted/c"] == pytest.approx(2)
    assert found["c/base/grad_norm/total"] == pytest.approx(math.sqrt(2 * 4**2 + 2 * 2**2))
    assert "grad_norm/clipped_loss" not in found


@pytest.mark.parametrize("around, named", [("a", "in/grad_cosine/a/b"), ("c", "grad_cosine/a/b")])
@pytest.mark.parametrize("watched", [True, False])
def test_cosines_of_balancing_are_named_with_their_place_where_they_must_be(
    around: str, named: str, watched: bool
) -> None:
    """Another component of the name `a` would be taken for the one that they are of."""
    inner = two(balancing="upgrad")
    run = Run(ComposableLossFunction({"in": inner, around: Slopes(chosen=0.0, rejected=1.0)}))
    told: list[dict[str, Any]] = []
    if watched:
        told.append(run.step(one_pair()))
    else:
        run.loss(*one_pair())
        LossFunctionCallback(run.loss, run, told.append).on_step_end(None, run.state, None)
    cosines = {key: value for key, value in told[0].items() if key.endswith("grad_cosine/a/b")}
    assert cosines == {named: pytest.approx(6 / math.sqrt(180))}
