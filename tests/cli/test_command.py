"""The command as a whole: how it starts and how it ends."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trl_custom_losses
from trl_custom_losses import LossConfigError
from trl_custom_losses.cli import main

from .running import ROOT, launch, run

COMMANDS = ["list", "show", "new", "check", "dpo", "grpo", "plot", "env"]


def test_help_has_every_command_with_a_whole_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = run("--help")
    assert done.code == 0 and "\x1b" not in done.out
    lines = done.out.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == COMMANDS
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)
    assert all(len(line) <= 80 for line in done.out.splitlines())


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("dpo", "grpo")])
def test_each_command_explains_itself(command: str) -> None:
    done = run(command, "--help")
    assert done.code == 0 and f"Usage: trl-custom-losses {command}" in done.out
    assert run(command, "-h").out == done.out


@pytest.mark.parametrize(
    ("command", "usage"),
    [("show", "{NAME}"), ("new", "{NAME}"), ("check", "[LOSS]"), ("plot", "[RUN_DIR]")],
)
def test_arguments_are_written_in_capitals(command: str, usage: str) -> None:
    assert run(command, "--help").out.splitlines()[0] == f"Usage: trl-custom-losses {command} [OPTIONS] {usage}"


def test_without_a_command_there_is_help() -> None:
    assert "Commands:" in run().out + run().err


def test_the_version() -> None:
    assert run("--version").out == f"trl-custom-losses {trl_custom_losses.__version__}\n"
    done = launch("--version", cwd=ROOT)
    assert (done.code, done.out) == (0, f"trl-custom-losses {trl_custom_losses.__version__}\n")


def test_an_unknown_command_is_a_usage_error() -> None:
    done = run("lst")
    assert done.code == 2 and "lst" in done.err


def test_errors_are_one_line_unless_a_traceback_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("show", "nope")
    assert done.code == 1 and done.err.startswith("error: ") and "Traceback" not in done.err
    with pytest.raises(LossConfigError, match="nope"):
        main(["--traceback", "show", "nope"])
    monkeypatch.setenv("TRL_CUSTOM_LOSSES_TRACEBACK", "1")
    with pytest.raises(LossConfigError, match="nope"):
        main(["show", "nope"])


def test_an_error_of_several_lines_becomes_one(workshop: Path) -> None:
    (workshop / "lines.py").write_text("raise RuntimeError('first\\nsecond')\n")
    done = run("check", "lines.py")
    assert done.err.count("\n") == 1 and "RuntimeError: first second" in done.err


def test_what_is_not_a_users_mistake_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a fault of this package")

    monkeypatch.setattr("trl_custom_losses.cli.show.loss_card", broken)
    with pytest.raises(RuntimeError, match="a fault of this package"):
        main(["show", "sigmoid"])


@pytest.mark.parametrize("words", [["list"], ["check", "sft"]])
def test_a_pipe_that_closes_is_no_error(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "trl_custom_losses", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""


def test_trl_is_not_imported_unless_it_trains(tmp_path: Path) -> None:
    program = """
import sys
from trl_custom_losses.cli import main

for words in (["list"], ["show", "grpo"], ["new", "mine", "--family", "policy"], ["check", "sft"], ["env"], ["--help"]):
    try:
        main(words)
    except SystemExit as ended:
        assert not ended.code, (words, ended.code)
    loaded = sorted({"trl", "transformers", "accelerate", "datasets", "peft", "matplotlib"} & set(sys.modules))
    assert not loaded, (words, loaded)
"""
    done = launch(cwd=tmp_path, program=program)
    assert done.code == 0, done.err[-2000:]


def test_it_is_installed_as_a_program() -> None:
    (entry,) = [
        found for found in importlib.metadata.entry_points(group="console_scripts") if found.name == "trl-custom-losses"
    ]
    assert entry.load() is main
