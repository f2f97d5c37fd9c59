"""What is drawn of a run, compared with its log."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from trl_custom_losses.plotting import plot_run
from trl_custom_losses.plotting.history import History
from trl_custom_losses.plotting.lines import LONG, running_mean, window_of
from trl_custom_losses.plotting.picture import Picture
from trl_custom_losses.plotting.run import pictures_of

from .runs import composed_log, nested_log, write_state


def _pictures(entries: list[dict]) -> dict[str, Picture]:
    return {picture.name: picture for picture in pictures_of(History.from_log(entries))}


def _axes(entries: list[dict], picture: str, index: int = 0) -> Axes:
    return _pictures(entries)[picture].figure.axes[index]


def _ends(area: PolyCollection) -> dict[float, tuple[float, float]]:
    """Lower and upper end of a filled area at each step, read off what is drawn."""
    points = np.concatenate([path.vertices for path in area.get_paths()])
    return {
        float(step): (points[points[:, 0] == step, 1].min(), points[points[:, 0] == step, 1].max())
        for step in np.unique(points[:, 0])
    }


def _legend(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


# The stack


def test_the_stack_has_the_heights_of_the_weighted_components() -> None:
    axes = _axes(composed_log(4), "components")
    down, up = axes.collections
    assert _legend(axes) == ["bonus", "pref", "total"]
    for step, (low, high) in _ends(down).items():  # bonus is negative: 0.5 * -0.1 * step
        assert (low, high) == pytest.approx((-0.05 * step, 0.0))
    for step, (low, high) in _ends(up).items():
        assert (low, high) == pytest.approx((0.0, 2.0 / step))
    total = axes.lines[0]
    np.testing.assert_allclose(total.get_ydata(), [2.0 / step - 0.05 * step for step in (1, 2, 3, 4)])


def test_positive_components_stand_on_each_other() -> None:
    entries = [
        {"step": s, "total_loss": 4.0, "a_loss": 1.0, "a_weight": 1.0, "b_loss": 2.0, "b_weight": 1.5} for s in (1, 2)
    ]
    first, second = _axes(entries, "components").collections
    assert _ends(first) == {1.0: (0.0, 1.0), 2.0: (0.0, 1.0)}
    assert _ends(second) == {1.0: (1.0, 4.0), 2.0: (1.0, 4.0)}
    assert first.get_hatch() != second.get_hatch()  # told apart without colour


def test_what_is_below_zero_hangs_from_zero() -> None:
    entries = [
        {"step": s, "total_loss": -1.0, "a_loss": 2.0, "a_weight": 1.0}
        | {"b_loss": -1.0, "b_weight": 1.0, "c_loss": -2.0, "c_weight": 1.0}
        for s in (1, 2)
    ]
    assert [_ends(area)[1.0] for area in _axes(entries, "components").collections] == [(0, 2), (-1, 0), (-3, -1)]


def test_a_gap_in_the_log_is_a_gap_in_the_stack() -> None:
    entries = composed_log(7)
    for entry in entries:
        if entry["step"] == 4 and "pref_loss" in entry:
            entry["pref_loss"] = math.nan
    up = _axes(entries, "components").collections[1]
    assert len(up.get_paths()) == 2
    assert 4.0 not in _ends(up)


def test_a_composition_within_another_has_its_own_stack() -> None:
    pictures = _pictures(nested_log())
    outer, inner = (pictures[name].figure.axes[0] for name in ("components", "components-2"))
    assert _legend(outer) == ["a", "b", "total"] and _legend(inner) == ["c", "d", "total"]
    np.testing.assert_allclose(inner.lines[0].get_ydata(), [2 * 0.3 * s + 0.25 / s for s in range(1, 6)])
    top = _ends(outer.collections[1])
    assert [top[s][1] for s in range(1, 6)] == pytest.approx(outer.lines[0].get_ydata())
    assert "differs" not in pictures["components"].caption


def test_a_total_that_its_parts_do_not_make_up_is_told() -> None:
    entries = composed_log(3)
    for entry in entries:
        entry.update({"total_loss": entry["total_loss"] + 1} if "total_loss" in entry else {})
    assert "differs from the logged total by up to" in _pictures(entries)["components"].caption


def test_a_component_that_crosses_zero_changes_sides_where_it_does() -> None:
    values = {1: 1.0, 2: -3.0}
    entries = [{"step": s, "total_loss": v, "a_loss": v, "a_weight": 1.0} for s, v in values.items()]
    up, down = _axes(entries, "components").collections
    assert _ends(up) == {1.0: (0, 1), 1.25: (0, 0), 2.0: (0, 0)}
    assert _ends(down) == {1.0: (0, 0), 1.25: (0, 0), 2.0: (-3, 0)}


def test_a_single_log_has_an_area_with_some_width() -> None:
    down, up = _axes(composed_log(1), "components").collections
    assert list(_ends(up)) == list(_ends(down)) == [0.6, 1.4]
    assert _axes(composed_log(1), "components").lines[0].get_xdata().tolist() == [1]
    widest, _ = _axes(composed_log(1), "margins").collections
    assert list(_ends(widest)) == [0.6, 1.4]


def test_a_component_that_was_never_finite_is_told_and_hides_no_other() -> None:
    entries = composed_log(4)
    for entry in entries:
        entry.update({"bonus_loss": math.nan} if "bonus_loss" in entry else {})
    picture = _pictures(entries)["components"]
    stacked, plain = picture.figure.axes
    assert _legend(stacked) == ["bonus (never finite)", "pref", "total"]
    assert _legend(plain) == ["bonus (never finite)", "pref"]
    assert _ends(stacked.collections[0])[2.0] == (0.0, 1.0)
    assert "bonus was never finite." in picture.caption


def _many(components: int, datasets: tuple[str, ...]) -> list[dict]:
    entries: list[dict] = []
    for step in (1, 2):
        losses = {f"c{k:02}_loss": 1.0 + k for k in range(components)}
        total = {"loss": 1.0, "total_loss": sum(losses.values())}
        entries.append({"step": step} | losses | {f"c{k:02}_weight": 1.0 for k in range(components)} | total)
        entries += [{"step": step, **{f"eval_{name}_{key}": v for key, v in losses.items()}} for name in datasets]
    return entries


def test_a_legend_has_one_entry_for_each_component_and_each_evaluation_set(recwarn: pytest.WarningsRecorder) -> None:
    stacked, plain = _pictures(_many(5, ("one", "two", "three")))["components"].figure.axes
    names = [f"c{k:02}" for k in range(5)]
    assert _legend(stacked) == [*names, "total"]
    assert _legend(plain) == [*names, "evaluation: one", "evaluation: two", "evaluation: three"]
    points = [line for line in plain.lines if line.get_linestyle() == "None"]
    assert [line.get_marker() for line in points] == ["o", "s", "D"] * 5  # the data set's, in the component's colour
    assert len({line.get_markeredgecolor() for line in points}) == 5


def test_no_legend_is_cut_off_and_matplotlib_complains_of_nothing(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    entries = _many(8, tuple(f"a data set with a long name, {k}" for k in range(14)))
    for entry in entries:
        entry |= {f"grad_norm/{'component' * 5}{k}": 1.0 for k in range(30)}
    pictures = _pictures(entries)
    for name in ("components", "gradient-norms", "loss"):
        figure = pictures[name].figure
        figure.canvas.draw()
        ends = [axes.get_window_extent() for axes in figure.axes]
        for axes, below in zip(figure.axes, ends[1:], strict=False):
            assert axes.get_legend().get_window_extent().y0 > below.y1
        last = figure.axes[-1].get_legend()
        assert last is None or last.get_window_extent().y0 > 0
    recwarn.clear()
    plot_run(write_state(tmp_path, entries))
    assert not [str(warning.message) for warning in recwarn]


def test_of_many_components_the_smallest_are_one_area() -> None:
    picture = _pictures(_many(12, ()))["components"]
    stacked, plain = picture.figure.axes
    kept = [f"c{k:02}" for k in range(5, 12)]
    assert _legend(stacked) == [*kept, "5 others", "total"] and _legend(plain) == kept
    low, high = _ends(stacked.collections[-1])[1.0]
    assert (low, high) == (6 + 7 + 8 + 9 + 10 + 11 + 12, 78)
    assert "5 components that add least" in picture.caption


# Curves


def test_evaluations_are_points_apart_from_the_curve() -> None:
    axes = _axes(composed_log(6), "loss")
    curve, points = axes.lines
    assert curve.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
    assert points.get_linestyle() == "None" and points.get_marker() == "o"
    assert points.get_xdata().tolist() == [2, 4, 6] and points.get_ydata().tolist() == [5.0, 7.0, 9.0]
    assert _legend(axes) == ["loss", "evaluation"]


def test_margins_have_bands_for_spread_and_range() -> None:
    axes = _axes(composed_log(4), "margins")
    widest, band = axes.collections
    assert _ends(widest) == {s: (pytest.approx(-0.2), pytest.approx(0.4 * s)) for s in (1.0, 2.0, 3.0, 4.0)}
    assert _ends(band) == {s: (pytest.approx(0.05 * s), pytest.approx(0.15 * s)) for s in (1.0, 2.0, 3.0, 4.0)}


def test_rewards_have_the_logged_standard_deviation() -> None:
    entries = [
        {"step": s, "reward": 1.0, "reward_std": 0.25, **{f"rewards/{f}/{end}": v for f in "ab" for end, v in ends}}
        for s in (1, 2)
        for ends in [(("mean", 2.0 * s), ("std", 0.5))]
    ]
    figure = _pictures(entries)["reward"].figure
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Total reward", "Reward of a", "Reward of b"]
    assert _ends(figure.axes[0].collections[0]) == {1.0: (0.75, 1.25), 2.0: (0.75, 1.25)}
    assert _ends(figure.axes[2].collections[0]) == {1.0: (1.5, 2.5), 2.0: (3.5, 4.5)}


def test_there_are_pictures_only_of_what_was_logged() -> None:
    assert _pictures([]) == {}
    assert set(_pictures([{"step": 1, "loss": math.nan}])) == set()
    assert set(_pictures([{"step": 1, "loss": 1.0}])) == {"loss"}
    assert set(_pictures([{"step": s, "mine/x": float(s)} for s in (1, 2)])) == {"others"}
    others = _pictures([{"step": s, "x": s, "y": 1.0} for s in (1, 2)])["others"]
    assert "1 that never changed" in others.caption and len(others.figure.axes) == 1


# Long runs


def test_running_means_leave_gaps_and_do_not_reach_over_the_ends() -> None:
    values = np.array([1.0, 3.0, math.nan, 5.0, 7.0])
    np.testing.assert_allclose(running_mean(values, 3), [2.0, 2.0, math.nan, 6.0, 6.0])
    np.testing.assert_array_equal(running_mean(values, 1), values)


def test_a_long_run_is_drawn_thin_with_its_running_mean() -> None:
    number = LONG + 50
    values = np.random.default_rng(0).normal(size=number)
    axes = _axes([{"step": s, "loss": v} for s, v in enumerate(values.tolist())], "loss")
    thin, thick = axes.lines
    np.testing.assert_allclose(thin.get_ydata(), values)
    half = window_of(number) // 2
    assert thick.get_ydata()[100] == pytest.approx(values[100 - half : 101 + half].mean())
    assert thin.get_linewidth() < thick.get_linewidth()
    assert "running mean" in _pictures([{"step": s, "loss": 1.0 + s} for s in range(number)])["loss"].caption


def test_no_more_points_are_drawn_than_can_be_seen() -> None:
    values = np.zeros(50_000)
    values[12_345], values[23_456] = 7.0, -8.0  # peaks
    entries = [{"step": s, "loss": v, "total_loss": v, "a_loss": v, "a_weight": 1.0} for s, v in enumerate(values)]
    pictures = _pictures(entries)
    thin, thick = pictures["loss"].figure.axes[0].lines
    assert len(thin.get_xdata()) < 10_000 and len(thick.get_xdata()) < 10_000
    assert (thin.get_ydata().max(), thin.get_ydata().min()) == (7.0, -8.0)
    assert (thick.get_xdata()[0], thick.get_xdata()[-1]) == (0, 49_999)
    stacked = pictures["components"].figure.axes[0]
    assert len(_ends(stacked.collections[0])) < 10_000


def test_steps_are_whole_numbers() -> None:
    axes = _axes([{"step": s, "loss": 1.0 * s} for s in (1, 2)], "loss")
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_names_that_differ_in_their_middles_have_different_titles() -> None:
    names = [f"{'x' * 30}{k}{'y' * 30}" for k in range(3)]
    figure = _pictures([{"step": s, **{name: float(s) for name in names}} for s in (1, 2)])["others"].figure
    assert len({axes.get_title(loc="left") for axes in figure.axes}) == 3


def test_twenty_thousand_logs_are_no_burden(tmp_path: Path) -> None:
    entries = [{"step": s, "loss": 1.0 / (1 + s), "entropy": 0.5, "grad_norm": 2.0} for s in range(20_000)]
    report = plot_run(write_state(tmp_path, entries))
    assert report.html.stat().st_size < 2_000_000
