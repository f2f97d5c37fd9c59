"""Which logged metrics are a composition's components, also where compositions are nested."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from trl_custom_losses.plotting.components import Group, groups_of
from trl_custom_losses.plotting.history import History

from .runs import composed_log, nested_log


def _groups(entries: list[dict]) -> list[Group]:
    return groups_of(History.from_log(entries).train)


def _names(groups: list[Group]) -> dict[str, list[str]]:
    return {group.name: [part.name for part in group.components] for group in groups}


def test_components_of_one_composition() -> None:
    (group,) = _groups(composed_log(3))
    assert _names([group]) == {"": ["bonus", "pref"]}
    np.testing.assert_allclose(group.weighted(), [[-0.05, -0.1, -0.15], [2.0, 1.0, 2 / 3]])
    assert group.missing_share() < 1e-12


def test_components_of_a_composition_within_another_are_told_apart() -> None:
    groups = _groups(nested_log())
    assert _names(groups) == {"": ["a", "b"], "b": ["c", "d"]}
    assert all(group.missing_share() < 1e-12 for group in groups)


def test_a_name_that_occurs_twice_belongs_where_the_log_says() -> None:
    """Also where the numbers would leave it open."""
    entries = [
        {"step": step, "total_loss": 3.0 * step, "outer/total_loss": step}
        | {"sft_loss": float(step), "sft_weight": 1.0, "outer_loss": float(step), "outer_weight": 2.0}
        | {"outer/sft_loss": 2.0 * step, "outer/sft_weight": 0.5}
        for step in (1, 2, 3)
    ]
    groups = _groups(entries)
    assert {group.name: [part.key for part in group.components] for group in groups} == {
        "": ["outer", "sft"],
        "outer": ["outer/sft"],
    }
    assert _names(groups)["outer"] == ["sft"]


def test_a_component_stands_for_what_it_is_made_of() -> None:
    """With a weight of 1, `b` and its own components add the same to the total."""
    entries = nested_log()
    for entry in entries:
        entry |= {"b_weight": 1.0, "total_loss": 1.5 * entry["a_loss"] + entry["b_loss"]}
    assert _names(_groups(entries)) == {"": ["a", "b"], "b": ["c", "d"]}


def test_a_single_loss_has_no_components() -> None:
    assert _groups([{"step": 1, "loss": 1.0, "adaptive_beta": 0.1}]) == []
    assert _groups([{"step": 1, "base_loss": 1.0, "total_loss": 2.0}]) == []  # without a weight


def test_components_without_a_total_are_still_drawn() -> None:
    entries = [{key: value for key, value in entry.items() if key != "total_loss"} for entry in composed_log(3)]
    (group,) = _groups(entries)
    assert group.total is None and group.missing_share() == 0.0 and len(group.components) == 2


def test_a_term_of_the_compositions_own_shows_as_missing() -> None:
    entries = composed_log(3)
    for entry in entries:
        if "total_loss" in entry:
            entry["total_loss"] += 0.5
    (group,) = _groups(entries)
    assert group.missing_share() == pytest.approx(0.5 / 2.45)


def test_a_step_without_one_component_is_unknown() -> None:
    entries = composed_log(3)
    del entries[1]["bonus_loss"]
    (group,) = _groups(entries)
    assert np.isnan(group.weighted()[0]).tolist() == [False, True, False]


def test_a_pair_that_the_total_does_not_hold_is_no_component() -> None:
    foreign = {"value_loss": 9.0, "value_weight": 3.0}
    entries = [entry | foreign if "pref_loss" in entry else entry for entry in composed_log(3)]
    assert _names(_groups(entries)) == {"": ["bonus", "pref"]}


def test_components_that_never_were_finite_are_kept() -> None:
    nan = float("nan")
    for name in ("bonus_loss", "bonus_weight"):
        entries = [entry | ({name: nan} if name in entry else {}) for entry in composed_log(3)]
        (group,) = _groups(entries)
        assert [(part.name, part.finite) for part in group.components] == [("bonus", False), ("pref", True)]
        assert [part.name for part in group.never_finite] == ["bonus"]


def test_nested_components_are_told_apart_by_the_steps_that_are_finite() -> None:
    entries = nested_log()
    entries[2] |= {"c_loss": float("nan"), "b_loss": float("nan"), "b/total_loss": float("nan")}
    entries[2] |= {"total_loss": float("nan")}
    assert _names(_groups(entries)) == {"": ["a", "b"], "b": ["c", "d"]}
