"""The files of a report, and what happens where one cannot be drawn or written."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.image import imread

from trl_custom_losses import LossConfigError
from trl_custom_losses.plotting import plot_run, run
from trl_custom_losses.plotting.history import History
from trl_custom_losses.plotting.run import pictures_of

from .runs import composed_log, write_state


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
    (picture, *_) = pictures_of(History.from_log(entries))
    assert len(picture.figure.axes[0].get_legend().get_texts()) == 2  # also for a name that begins with an underscore


@pytest.mark.parametrize("end", ["", "/sub"])
def test_a_folder_that_cannot_be_written_is_one_readable_message(tmp_path: Path, end: str) -> None:
    (tmp_path / "file").write_text("")
    state = write_state(tmp_path / "run", composed_log())
    with pytest.raises(LossConfigError, match=r"the report cannot be written to .*/file.*: (File exists|Not a dir)"):
        plot_run(state, f"{tmp_path / 'file'}{end}")


def test_a_picture_that_fails_does_not_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(history: History) -> None:
        raise ZeroDivisionError("no ink")

    monkeypatch.setattr(run, "_PAINTERS", (run._PAINTERS[0], broken, *run._PAINTERS[1:]))
    state = write_state(tmp_path, composed_log())
    (tmp_path / "report" / "weights.png").mkdir(parents=True)  # one that cannot be written
    with caplog.at_level(logging.WARNING):
        report = plot_run(state)
    assert [path.stem for path in report.pictures] == ["loss", "components", "margins", "optimisation"]
    assert len(report.titles) == 4 and "<h2>Which component drives the loss</h2>" in report.html.read_text()
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "the report lacks a picture, 'broken': ZeroDivisionError: no ink"
    assert second.startswith("the report lacks a picture, 'How the components are weighted': LossConfigError: ")


@pytest.mark.parametrize("value", [1e99, 1e100, 1e300, 1.7e308, -1e308])
def test_enormous_values_can_be_drawn(tmp_path: Path, value: float, recwarn: pytest.WarningsRecorder) -> None:
    entries = [
        {"step": s, "loss": value * (-1) ** s, "grad_norm_layer/head": 1.0, "rewards/margins": 1.0}
        | {"rewards/margins/std": value, "a_loss": value, "a_weight": 2.0, "total_loss": value}
        for s in range(1, 5)
    ]
    report = plot_run(write_state(tmp_path, entries))
    assert {"gradient-layers", "margins"} <= {path.stem for path in report.pictures}
    assert not [str(warning.message) for warning in recwarn]
