"""Pictures of what moves and of gradients, compared with the log."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes

from trl_custom_losses.plotting.history import History
from trl_custom_losses.plotting.picture import Picture
from trl_custom_losses.plotting.run import pictures_of


def _pictures(entries: list[dict]) -> dict[str, Picture]:
    return {picture.name: picture for picture in pictures_of(History.from_log(entries))}


def _legend(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def _titles(picture: Picture) -> list[str]:
    return [axes.get_title(loc="left") for axes in picture.figure.axes]


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
    assert [axes.get_title(loc="left") for axes in moving.axes] == [
        "adaptive_beta",
        "label_smoothing (scheduled)",
    ]
    np.testing.assert_allclose(moving.axes[0].lines[0].get_ydata(), [0.1, 0.2, 0.3])
    cosine = pictures["gradient-cosines"].figure.axes[0]
    assert _legend(cosine) == ["a and b"] and cosine.lines[0].get_ydata().tolist() == [-0.5] * 3
    norms = pictures["gradient-norms"].figure.axes
    assert [axes.lines[0].get_ydata()[0] for axes in norms] == [1.0, 2.0, 0.25]
    assert norms[1].lines[1].get_ydata().tolist() == [3.0] * 3  # the norm of the weighted sum
    layers = pictures["gradient-layers"].figure.axes[0]
    assert [tick.get_text() for tick in layers.get_yticklabels()] == ["embedding", "layers.9", "layers.10"]
    assert layers.collections[0].get_array().tolist() == [[300, 600, 900], [2, 4, 6], [1, 2, 3]]


def test_a_scheduled_beta_and_an_adaptive_one_are_told_apart() -> None:
    entries = [{"step": s, "adaptive_beta": 0.1 * s, "beta": 0.3 / s, "adaptive_kl": 2.0 * s} for s in (1, 2)]
    picture = _pictures(entries)["hyperparameters"]
    assert _titles(picture) == ["adaptive_beta", "adaptive_kl", "beta (scheduled)"]
    assert [axes.get_ylabel() for axes in picture.figure.axes] == ["per nat", "nats per completion", "per nat"]


def test_compositions_within_others_have_panels_of_their_own() -> None:
    entry = {"grad_norm/pref": 1.0, "in/grad_norm/pref": 2.0, "in/grad_norm/sft": 3.0, "grad_norm/total": 4.0}
    entry |= {"grad_norm_weighted/pref": 5.0, "in/grad_norm_weighted/pref": 6.0, "in/grad_norm/total": 7.0}
    entry |= {"grad_cosine/in/pref": 0.5, "in/grad_cosine/pref/sft": -0.5}
    pictures = _pictures([{"step": s, **entry} for s in (1, 2)])
    before, within = "Gradient of each component before its weight", "Gradient of each component with its weight"
    norms = pictures["gradient-norms"]
    assert _titles(norms) == [before, f"{before}, in in", within, f"{within}, in in"]
    assert [[line.get_ydata()[0] for line in axes.lines] for axes in norms.figure.axes] == [[1], [2, 3], [5, 4], [6, 7]]
    assert _legend(norms.figure.axes[3]) == ["pref", "total"]
    cosines = pictures["gradient-cosines"].figure.axes
    assert [_legend(axes) for axes in cosines] == [["in and pref"], ["pref and sft"]]


def test_clipped_sequences_of_a_component_are_drawn_with_the_gradients() -> None:
    entries = [{"step": s, "a/clipped_sequences": 0.1 * s, "b/clipped_sequences": 0.2 * s} for s in (1, 2)]
    pictures = _pictures(entries)
    assert set(pictures) == {"gradient-norms"}
    (axes,) = pictures["gradient-norms"].figure.axes
    assert _legend(axes) == ["a/clipped_sequences", "b/clipped_sequences"]
    low, high = axes.get_ylim()
    assert -0.1 < low <= 0 and 1 <= high < 1.1


# The map of layers


@pytest.mark.parametrize(("low", "high"), [(1.0, 30.0), (0.015, 2.0), (3.0, 65.0), (1e-9, 1e4)])
@pytest.mark.parametrize("layers", [2, 12])
def test_the_colour_bar_has_readable_numbers_and_all_of_its_label(low: float, high: float, layers: int) -> None:
    values = np.geomspace(low, high, layers).tolist()
    entry = {f"grad_norm_layer/layers.{k}": value for k, value in enumerate(values)}
    figure = _pictures([{"step": s, **entry} for s in (1, 2)])["gradient-layers"].figure
    figure.canvas.draw()
    _, bar = figure.axes
    ticks = [*bar.yaxis.get_majorticklabels(), *bar.yaxis.get_minorticklabels()]
    shown = [tick for tick in ticks if tick.get_text() and low <= float(tick.get_text()) <= high]
    assert len(shown) >= 2
    places = sorted((tick.get_window_extent().y0, tick.get_window_extent().y1) for tick in shown)
    assert all(below[1] <= above[0] for below, above in pairwise(places))
    label = bar.yaxis.label.get_window_extent()
    assert label.y0 >= 0 and label.y1 <= figure.bbox.height


def test_the_map_of_a_long_run_has_no_more_columns_than_can_be_seen() -> None:
    figure = _pictures([{"step": s, "grad_norm_layer/head": 1.0 + s} for s in range(20_000)])["gradient-layers"].figure
    assert figure.axes[0].collections[0].get_array().shape[1] < 5_000
