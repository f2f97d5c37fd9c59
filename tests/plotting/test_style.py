"""How pictures look, whatever the names in them, and that nothing of it stays behind."""

from __future__ import annotations

from itertools import pairwise

import pytest

pytest.importorskip("matplotlib")

import matplotlib
from matplotlib.colors import to_rgb

from trl_custom_losses.plotting.style import STYLES, drawing, label_text, style


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("loss", "loss"),
        ("a\nb\x1b[0m\u202e", "a b [0m "),
        ("_hidden", " _hidden"),
        ("x" * 20 + "y" * 20, "x" * 18 + "…" + "y" * 18),
        ("$x$ <b>", "$x$ <b>"),
        ("", ""),
    ],
)
def test_names_become_labels(name: str, label: str) -> None:
    assert label_text(name) == label


def test_labels_can_be_shorter() -> None:
    assert label_text("abcdefghij", 4) == "ab…ij"


def test_curves_and_areas_are_told_apart_without_colour() -> None:
    for part in ("color", "marker", "hatch"):
        assert len({getattr(one, part) for one in STYLES}) == len(STYLES)
    assert len({str(one.dash) for one in STYLES}) == len(STYLES)
    grey = [0.299 * red + 0.587 * green + 0.114 * blue for red, green, blue in (to_rgb(s.color) for s in STYLES[:5])]
    assert all(abs(first - second) > 0.1 for first, second in pairwise(grey))
    assert style(len(STYLES)) == STYLES[0]


def test_areas_are_paler_than_their_edges() -> None:
    assert all(pale >= full for one in STYLES for pale, full in zip(one.pale, to_rgb(one.color), strict=True))


def test_settings_of_matplotlib_are_the_users_again() -> None:
    before = dict(matplotlib.rcParams)
    with drawing():
        assert matplotlib.rcParams["text.parse_math"] is False
    assert dict(matplotlib.rcParams) == before
