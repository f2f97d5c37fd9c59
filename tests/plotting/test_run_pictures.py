"""What is drawn of a run, compared with its log."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.image import imread

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


# Curves


def test_evaluations_are_points_apart_from_the_curve() -> None:
    axes = _axes(composed_log(6), "loss")
    curve, points = axes.lines
    assert curve.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
    assert points.get_linestyle() == "None" and points.get_marker() == "o"
    assert points.get_xdata().tolist() == [2, 4, 6] and points.get_ydata().tolist() == [5.0, 7.0, 9.0]
    assert _legend(axes) == ["loss", "loss (evaluation)"]


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


def test_what_moves_and_what_gradients_do_is_shown() -> None:
    entries = [
        {
            "step": s,
            "adaptive_beta": 0.1 * s,
            "label_smoothing": 0.3 / s,
            "grad_cosine/a/b": -0.5,
            "grad_norm/a": 1.0,
            "grad_norm/total": 3.0,
            "grad_norm_weighted/a": 2.0,
            "clipped_sequences": 0.25,
            "grad_norm_layer/layers.10": 1.0 * s,
            "grad_norm_layer/layers.9": 2.0 * s,
            "grad_norm_layer/embedding": 300.0 * s,
            "learning_rate": 1e-4,
        }
        for s in (1, 2, 3)
    ]
    pictures = _pictures(entries)
    moving = pictures["hyperparameters"].figure
    assert [axes.get_title(loc="left") for axes in moving.axes] == ["beta", "label_smoothing"]
    np.testing.assert_allclose(moving.axes[0].lines[0].get_ydata(), [0.1, 0.2, 0.3])
    cosine = pictures["gradient-cosines"].figure.axes[0]
    assert _legend(cosine) == ["a and b"] and cosine.lines[0].get_ydata().tolist() == [-0.5] * 3
    norms = pictures["gradient-norms"].figure.axes
    assert [axes.lines[0].get_ydata()[0] for axes in norms] == [1.0, 2.0, 0.25]
    assert norms[1].lines[1].get_ydata().tolist() == [3.0] * 3  # the norm of the weighted sum
    layers = pictures["gradient-layers"].figure.axes[0]
    assert [tick.get_text() for tick in layers.get_yticklabels()] == ["embedding", "layers.9", "layers.10"]
    assert layers.collections[0].get_array().tolist() == [[300, 600, 900], [2, 4, 6], [1, 2, 3]]


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


def test_twenty_thousand_logs_are_no_burden(tmp_path: Path) -> None:
    entries = [{"step": s, "loss": 1.0 / (1 + s), "entropy": 0.5, "grad_norm": 2.0} for s in range(20_000)]
    report = plot_run(write_state(tmp_path, entries))
    assert report.html.stat().st_size < 2_000_000


# Files


def test_the_pictures_are_written(tmp_path: Path) -> None:
    report = plot_run(write_state(tmp_path / "run", composed_log()), tmp_path / "elsewhere")
    assert report.html == tmp_path / "elsewhere" / "report.html"
    assert [path.stem for path in report.pictures] == ["loss", "components", "weights", "margins", "optimisation"]
    for path in report.pictures:
        image = imread(path)
        assert image.shape[1] > 1000 and image[..., :3].std() > 0.05  # something is drawn
    assert plot_run(tmp_path / "run").html == tmp_path / "run" / "report" / "report.html"


@pytest.mark.parametrize(
    "name", ["$x^{$", "_hidden", "a\nb", "ünï 名前", "x" * 300, "%s {0}", "<script>alert(1)</script>"]
)
def test_any_name_can_be_drawn(tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder) -> None:
    entries = [
        {"step": s, "total_loss": 1.0, f"{name}_loss": 1.0, f"{name}_weight": 1.0, f"odd {name}": s} for s in (1, 2)
    ]
    report = plot_run(write_state(tmp_path, entries))
    assert [path.stem for path in report.pictures] == ["components", "weights", "others"]
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]
    axes = _axes(entries, "components")
    assert len(_legend(axes)) == 2  # also for a name that begins with an underscore
