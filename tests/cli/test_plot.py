"""`plot`: files are written and named, and what is missing is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .running import launch, run

PNG = b"\x89PNG"


def write_run(folder: Path) -> Path:
    """A run's folder with a log of four steps."""
    history = [
        {"step": step, "epoch": step / 4, "loss": 1 / step, "pref_loss": 1 / step, "sft_loss": 2.0, "pref_weight": 1.0}
        for step in range(1, 5)
    ]
    checkpoint = folder / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    state = {"global_step": 4, "max_steps": 4, "logging_steps": 1, "log_history": history}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    return folder


def paths(text: str) -> list[Path]:
    return [Path(line) for line in text.splitlines()]


def test_a_run_is_drawn_and_every_file_named(workshop: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    write_run(workshop / "run")
    done = run("plot", "run", "--output", "pictures")
    assert done.code == 0, done.err
    *pictures, report = paths(done.out)
    assert pictures and all(path.read_bytes().startswith(PNG) for path in pictures)
    assert report.suffix == ".html" and "<html" in report.read_text().lower()
    assert {path.resolve() for path in (*pictures, report)} == {p.resolve() for p in Path("pictures").rglob("*.*")}


def test_a_loss_is_drawn_where_it_is_told(workshop: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    done = run("plot", "--loss", "sigmoid", "--output", "some/where.png")
    assert done.code == 0, done.err
    assert paths(done.out) == [Path("some/where.png")] and Path("some/where.png").read_bytes().startswith(PNG)
    assert paths(run("plot", "--loss", "hinge").out) == [Path("hinge.png")] and Path("hinge.png").is_file()


@pytest.mark.parametrize("words", [[], ["run", "--loss", "sigmoid"]])
def test_usage_errors(words: list[str]) -> None:
    done = run("plot", *words)
    assert done.code == 2 and "give the folder of a run, or --loss NAME" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere"),
        (["--loss", "sigmod"], "there is no loss named 'sigmod'"),
        (["--loss", "own.py"], "`plot --loss` takes a name or 'module:loss', found 'own.py'"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, workshop: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    done = run("plot", *words)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and message in done.err


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    program = "import sys; sys.modules['matplotlib'] = None; from trl_custom_losses.cli import main; main()"
    done = launch("plot", "run", cwd=tmp_path, program=program)
    assert (done.code, done.out) == (1, "")
    assert done.err.count("\n") == 1
    assert done.err.startswith("error: ") and "pip install 'trl-custom-losses[plot]'" in done.err


def test_what_an_import_error_without_a_name_says_is_printed(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('its library is of another version')\n")
    done = launch("plot", "run", cwd=tmp_path)
    assert done.code == 1 and done.err.count("\n") == 1
    assert "its library is of another version" in done.err and "None" not in done.err
    assert "pip install 'trl-custom-losses[plot]'" in done.err
