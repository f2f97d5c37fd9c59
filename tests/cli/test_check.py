"""`check`: what is checked, what is said of it, and the exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trl_custom_losses import LossFunctionRegistry
from trl_custom_losses.cli import check as module
from trl_custom_losses.testing import CHECKS, CheckReport, CheckResult, run_checks

from .running import BAD, GOOD, run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the kit was asked; it finds nothing wrong."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def passed(name: str, **values: Any) -> CheckReport:
        asked.append((name, values))
        return CheckReport(name, "preference", (CheckResult("returns", "it returns", "", 0.1),))

    monkeypatch.setattr("trl_custom_losses.testing.run_checks", passed)
    return asked


def test_a_loss_that_passes_has_a_line_for_each_check() -> None:
    done = run("check", "sigmoid")
    *lines, summary = done.out.splitlines()
    assert done.code == 0 and done.err == ""
    assert [line.split() for line in lines] == [["ok", name] for name in CHECKS]
    assert summary.startswith(f"sigmoid (preference): all {len(CHECKS)} checks passed in ")


def test_a_loss_that_fails_shows_each_message_in_full(workshop: Path) -> None:
    (workshop / "bad_loss.py").write_text(BAD)
    done = run("check", "bad_loss.py")
    assert done.code == 1 and done.err == ""
    report = run_checks("bad_loss:attached")
    words = " ".join(done.out.split())
    assert [result.check for result in report.failed] and "metrics" in [result.check for result in report.failed]
    for result in report.results:
        assert f"{'ok' if result.ok else 'FAILED'} {result.check}" in words
        if not result.ok:
            assert f"expected: {result.description}" in words and " ".join(result.message.split()) in words
    assert f"{len(report.failed)} of {len(CHECKS)} checks failed" in done.out
    assert "\x1b" not in done.out


def test_json_holds_the_reports_and_nothing_else(workshop: Path) -> None:
    (workshop / "bad_json.py").write_text(BAD)
    done = run("check", "bad_json.py", "--json")
    assert done.code == 1 and done.err == ""
    assert list(done.json) == ["ok", "losses"] and done.json["ok"] is False
    (loss,) = done.json["losses"]
    assert set(loss) == {"loss", "family", "ok", "seconds", "results"}
    assert (loss["loss"], loss["family"], loss["ok"]) == ("bad_json:attached", "preference", False)
    assert [result["check"] for result in loss["results"]] == list(CHECKS)
    assert run("check", "sft", "--json").json["ok"] is True


def test_of_a_file_every_loss_is_checked(workshop: Path, calls: list) -> None:
    (workshop / "sub").mkdir()
    (workshop / "sub" / "several.py").write_text(GOOD.format(name="several"))
    done = run("check", "sub/several.py")
    assert done.code == 0
    assert calls == [("several_registered", {}), ("several:Defined", {})]
    assert "2 losses checked in 0.2 s, all passed" in done.out


def test_a_loss_is_named_by_an_import_path_from_the_working_directory(workshop: Path) -> None:
    (workshop / "named_here.py").write_text(GOOD.format(name="named_here"))
    done = run("check", "named_here:Defined")
    assert done.code == 0, done.out
    assert "named_here:Defined (preference): all" in done.out


def test_all_are_checked_with_their_examples(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("check", "--all")
    assert done.code == 0
    assert [name for name, _ in calls] == LossFunctionRegistry.names()
    assert dict(calls)["consistency"] == {"threshold": -0.5}
    assert dict(calls)["composed"] == dict(LossFunctionRegistry.get("composed").example)
    lines = done.out.splitlines()
    assert len(lines) == len(calls) + 2 and lines[0].startswith(
        "ok      adaptive_dpo (preference): all 1 checks passed"
    )


def test_all_names_those_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(name: str, **values: Any) -> CheckReport:
        message = "" if name == "sft" else "it is wrong"
        return CheckReport(name, "preference", (CheckResult("returns", "it returns", message, 0.0),))

    monkeypatch.setattr("trl_custom_losses.testing.run_checks", failing)
    monkeypatch.setattr(LossFunctionRegistry, "names", classmethod(lambda cls, family=None: ["sft", "ipo", "hinge"]))
    done = run("check", "--all")
    assert done.code == 1
    assert "FAILED  ipo (preference): 1 of 1 checks failed" in done.out
    assert "        returns: it is wrong" in done.out
    assert "3 losses checked in 0.0 s, 2 failed: ipo, hinge" in done.out


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("js_divergence", "js_divergence"),
        ("[{type: sigmoid, weight: 2.0}]", [{"type": "sigmoid", "weight": 2.0}]),
        ("a=b", "a=b"),
    ],
)
def test_values_are_yaml(text: str, value: Any, calls: list) -> None:
    assert run("check", "sigmoid", "-p", f"option={text}").code == 0
    assert calls == [("sigmoid", {"option": value})]
    assert type(calls[0][1]["option"]) is type(value)


def test_values_take_the_place_of_the_example(calls: list) -> None:
    run("check", "multi_objective_dpo", "-p", "auxiliary_weights={safety: 2.0}", "--hyperparameter", "base=ipo")
    (_, values), example = calls[0], LossFunctionRegistry.get("multi_objective_dpo").example
    assert values == {**example, "auxiliary_weights": {"safety": 2.0}, "base": "ipo"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a loss or a file, or --all"),
        (["sigmoid", "--all"], "give a loss or a file, or --all"),
        (["--all", "-p", "beta=1"], "values belong to one loss"),
        (["sigmoid", "-p", "beta"], "expected NAME=VALUE, found 'beta'"),
        (["sigmoid", "-p", "=1"], "expected NAME=VALUE"),
        (["sigmoid", "-p", "beta=[1"], "is not YAML"),
    ],
)
def test_usage_errors(words: list[str], message: str) -> None:
    done = run("check", *words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sigmoid", "-p", "beta=-1"], "hyperparameter 'beta': expected a value > 0, found -1"),
        (["sigmoid", "-p", "betta=1"], "has no hyperparameter 'betta' (did you mean 'beta'?)"),
        (["nowhere.py"], "there is no file nowhere.py"),
        (["a-b.py"], "a-b.py cannot be imported: rename it"),
        (["json.py"], "the name of json.py is that of another module"),
        (["broken.py"], "could not import 'broken' from broken.py: ZeroDivisionError"),
        (["empty.py"], "empty.py holds no loss: register one"),
        (["two.py", "-p", "beta=1"], "two.py holds two_registered, two:Defined: check 'module:loss' instead"),
        (["two:Missing"], "module 'two' has no 'Missing'"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, workshop: Path) -> None:
    for name in ("a-b", "json", "empty"):
        (workshop / f"{name}.py").write_text("from trl_custom_losses import PreferenceLoss\n")
    (workshop / "broken.py").write_text("1 / 0\n")
    (workshop / "two.py").write_text(GOOD.format(name="two"))
    done = run("check", *words)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert message in done.err


def test_the_module_reads_numbers_that_yaml_leaves_text() -> None:
    assert module._number("1e-3") == 1e-3 and module._number("1e") == "1e" and module._number([1]) == [1]
