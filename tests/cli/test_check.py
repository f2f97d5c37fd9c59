"""`check`: what is checked, what is said of it, and the exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trl_custom_losses import LossFunctionRegistry
from trl_custom_losses.cli import check as module
from trl_custom_losses.testing import CHECKS, CheckReport, CheckResult, run_checks

from .running import BAD, GOOD, run

NEEDY = """
from trl_custom_losses import PreferenceBatch


def needy(batch: PreferenceBatch, outputs, *, strength: float):
    return strength * outputs.mean_logps, {}
"""
MISSING = "needs the hyperparameter 'strength'"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the kit was asked; it finds nothing wrong."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def passed(name: str, **values: Any) -> CheckReport:
        asked.append((name, values))
        return CheckReport(name, "preference", (CheckResult("returns", "it returns", "passed", seconds=0.1),))

    monkeypatch.setattr("trl_custom_losses.testing.run_checks", passed)
    return asked


def test_a_loss_that_passes_has_a_line_for_each_check() -> None:
    done = run("check", "sigmoid")
    *lines, summary = done.out.splitlines()
    assert done.code == 0 and done.err == ""
    named = [line.split() for line in lines if not line.startswith("        ")]  # without what notes continue
    assert [words[:2] for words in named] == [["ok", name] for name in CHECKS]
    assert summary.startswith(f"sigmoid (preference): all {len(CHECKS)} checks passed in ")


def test_a_loss_that_fails_shows_each_message_in_full(workshop: Path) -> None:
    (workshop / "bad_loss.py").write_text(BAD)
    done = run("check", "bad_loss.py")
    assert done.code == 1 and done.err == ""
    report = run_checks("bad_loss:attached")
    words = " ".join(done.out.split())
    assert [result.check for result in report.failed] and "metrics" in [result.check for result in report.failed]
    assert not report.not_run
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


def test_one_that_cannot_be_built_fails_and_the_others_are_checked(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first(name: str, **values: Any) -> CheckReport:
        return run_checks(name, checks=list(CHECKS)[:1], **values)

    monkeypatch.setattr("trl_custom_losses.testing.run_checks", first)
    (workshop / "parted.py").write_text(NEEDY + GOOD.format(name="parted"))
    (workshop / "alone.py").write_text(NEEDY)
    done = run("check", "parted.py")
    words = " ".join(done.out.split())
    assert done.code == 1 and done.err == ""
    assert "FAILED builds expected: The loss can be built, by its defaults and its `example`." in words
    assert f"loss 'parted:needy' {MISSING}" in words
    assert "parted:needy: could not be built" in done.out.splitlines()
    for name in ("parted_registered", "parted:Defined"):
        assert f"{name} (preference): all 1 checks passed in " in done.out
    assert done.out.splitlines()[-1].startswith("3 losses checked in ")
    assert done.out.splitlines()[-1].endswith(" s, 1 failed: parted:needy")
    for file, others in (("parted.py", 2), ("alone.py", 0)):
        found = run("check", file, "--json")
        assert (found.code, found.err, found.json["ok"]) == (1, "", False)
        failed = [loss for loss in found.json["losses"] if not loss["ok"]]
        assert len(failed) == 1 and len(found.json["losses"]) == others + 1
        (result,) = failed[0]["results"]
        assert result["status"] == "failed" and MISSING in result["message"]
    assert run("check", "alone:needy").err.startswith("error: ")


def test_checks_that_were_not_run_are_one_line_and_notes_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "because 'returns' failed"
    results = (
        CheckResult("builds", "it builds", "passed", note="it has no hyperparameters"),
        CheckResult("returns", "it returns", "failed", "it does not"),
        *(CheckResult(name, "anything", "not run", reason) for name in ("finite", "masks", "split")),
    )
    report = CheckReport("sft", "preference", results)
    monkeypatch.setattr("trl_custom_losses.testing.run_checks", lambda name, **values: report)
    done = run("check", "sft")
    assert done.code == 1
    assert done.out.splitlines() == [
        "ok      builds (it has no hyperparameters)",
        "FAILED  returns",
        "        expected: it returns",
        "        it does not",
        "-       3 checks not run, because 'returns' failed",
        "sft (preference): 1 of 5 checks failed, 3 not run in 0.0 s",
    ]
    found = run("check", "sft", "--json").json["losses"][0]["results"]
    assert [result["status"] for result in found] == ["passed", "failed", *["not run"] * 3]
    assert [result["note"] for result in found] == ["it has no hyperparameters", *[""] * 4]
    monkeypatch.setattr(LossFunctionRegistry, "names", classmethod(lambda cls, family=None: ["sft"]))
    assert run("check", "--all").out.splitlines() == [
        "FAILED  sft (preference): 1 of 5 checks failed, 3 not run in 0.0 s",
        "        returns: it does not",
    ]


def test_a_loss_that_raises_is_not_checked_further(workshop: Path) -> None:
    (workshop / "raises.py").write_text(GOOD.format(name="raises").replace("_Helper", "Raising"))
    done = run("check", "raises:Raising")
    names = [line.split()[1] for line in done.out.splitlines() if line.startswith(("ok", "FAILED"))]
    (line,) = [line for line in done.out.splitlines() if line.startswith("-")]
    left = len(CHECKS) - len(names)
    assert done.code == 1 and names == list(CHECKS)[: len(names)] and left > 0
    assert line == f"-       {left} checks not run, because '{names[-1]}' failed"


def test_a_loss_is_named_by_an_import_path_from_the_working_directory(workshop: Path) -> None:
    (workshop / "named_here.py").write_text(GOOD.format(name="named_here"))
    done = run("check", "named_here:Defined")
    assert done.code == 0, done.out
    assert "named_here:Defined (preference): all" in done.out


def test_all_are_checked_with_their_examples(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("check", "--all")
    assert done.code == 0
    assert [name for name, _ in calls] == LossFunctionRegistry.names()
    assert all(values == {} for _, values in calls)  # the kit takes what a loss's `example` says then
    lines = done.out.splitlines()
    assert len(lines) == len(calls) + 2 and lines[0].startswith(
        "ok      adaptive_dpo (preference): all 1 checks passed"
    )


def test_all_names_those_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(name: str, **values: Any) -> CheckReport:
        status, message = ("passed", "") if name == "sft" else ("failed", "it is wrong")
        return CheckReport(name, "preference", (CheckResult("returns", "it returns", status, message),))

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


def test_values_are_those_given_alone(calls: list) -> None:
    run("check", "multi_objective_dpo", "-p", "auxiliary_weights={safety: 2.0}", "--hyperparameter", "base=ipo")
    assert calls == [("multi_objective_dpo", {"auxiliary_weights": {"safety": 2.0}, "base": "ipo"})]


def test_a_value_that_excludes_the_example_is_checked() -> None:
    assert run("check", "consistency", "-p", "mode=rdrop").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a loss or a file, or --all"),
        (["sigmoid", "--all"], "give a loss or a file, or --all"),
        (["--all", "-p", "beta=1"], "values belong to one loss"),
        (["sigmoid", "-p", "beta"], "expected NAME=VALUE, found 'beta'"),
        (["sigmoid", "-p", "=1"], "expected NAME=VALUE"),
        (["sigmoid", "-p", "beta=[1"], "is not YAML"),
        (["sigmoid", "-p", "beta=0.1", "-p", "beta=0.2"], "'beta' is given twice"),
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
        (["leaves.py"], "could not import 'leaves' from leaves.py: SystemExit: 3"),
        (["leaves:loss"], "could not import 'leaves' for 'leaves:loss': SystemExit: 3"),
        (["two"], "there is no loss named 'two': did you mean two.py?"),
        (["."], "`check` takes a name, 'module:loss' or a Python file, found the folder ."),
        (["x" * 300], "there is no loss named 'xxx"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, workshop: Path) -> None:
    for name in ("a-b", "json", "empty"):
        (workshop / f"{name}.py").write_text("from trl_custom_losses import PreferenceLoss\n")
    (workshop / "broken.py").write_text("1 / 0\n")
    (workshop / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    (workshop / "two.py").write_text(GOOD.format(name="two"))
    done = run("check", *words)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert message in done.err


def test_the_module_reads_numbers_that_yaml_leaves_text() -> None:
    assert module._number("1e-3") == 1e-3 and module._number("1e") == "1e" and module._number([1]) == [1]
