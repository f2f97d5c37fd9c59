"""`check`: the conformance kit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from ..errors import LossConfigError
from ..registry import LossFunctionRegistry
from .files import look_here, losses_in, refuse_paths
from .options import AsJson
from .output import coloured, paragraph, print_json

if TYPE_CHECKING:
    from ..testing import CheckReport
    from ..testing.report import Status


def check(
    loss: Annotated[
        str | None,
        typer.Argument(metavar="LOSS", help="A registered name, an import path 'module:loss', or a Python file."),
    ] = None,
    hyperparameters: Annotated[
        list[str] | None,
        typer.Option("--hyperparameter", "-p", metavar="NAME=VALUE", help="A value, in YAML; may be repeated."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Check every registered loss, with its example.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check that a loss is right.

    Shapes, gradients, masks, splitting a batch, extreme numbers, saved state and more, on random data. Of a Python
    file, every loss that it registers or defines is checked. The exit code is 1 if any check failed.
    """
    if every == (loss is not None):
        raise typer.BadParameter("give a loss or a file, or --all")
    values = _parsed(hyperparameters or [])
    if values and every:
        raise typer.BadParameter("values belong to one loss, not to --all", param_hint="-p")
    look_here()
    names = LossFunctionRegistry.names() if loss is None else _named(loss, values)
    reports = []
    for name in names:
        report = _checked(name, values, only=name == loss)
        reports.append(report)
        if not as_json:
            typer.echo(_compact(report) if every else _full(report))
    failed = [report.loss for report in reports if not report.ok]
    if as_json:
        print_json({"ok": not failed, "losses": [report.to_dict() for report in reports]})
    elif len(reports) > 1:
        seconds = sum(report.seconds for report in reports)
        end = f"{len(failed)} failed: {', '.join(failed)}" if failed else "all passed"
        typer.echo(f"\n{len(reports)} losses checked in {seconds:.1f} s, {end}")
    if failed:
        raise typer.Exit(1)


def _named(loss: str, values: dict[str, Any]) -> list[str]:
    if not loss.endswith(".py"):
        refuse_paths(loss, "check", takes_files=True)
        return [loss]
    names = losses_in(Path(loss))
    if values and len(names) > 1:
        raise LossConfigError(f"`-p` is for one loss, but {loss} holds {', '.join(names)}: check 'module:loss' instead")
    return names


def _checked(name: str, values: dict[str, Any], *, only: bool) -> CheckReport:
    """The report on one loss; one of several that cannot be built has failed, and the others are still checked."""
    from ..testing import CheckReport, CheckResult, run_checks

    try:
        return run_checks(name, **values)
    except LossConfigError as error:
        if only:
            raise
        description = "The loss can be built, by its defaults and its `example`."
        return CheckReport(name, "", (CheckResult("builds", description, "failed", str(error)),))


def _parsed(words: list[str]) -> dict[str, Any]:
    """Hyperparameters of `name=value` words."""
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"expected NAME=VALUE, found {word!r}", param_hint="-p")
        if name in values:
            raise typer.BadParameter(f"'{name}' is given twice", param_hint="-p")
        try:
            values[name] = _number(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise typer.BadParameter(f"{word!r} is not YAML: {error}", param_hint="-p") from error
    return values


def _number(value: Any) -> Any:
    """`value`, or the number that a text such as 1e-3 is, which YAML leaves a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


_MARKS = {"passed": ("ok    ", "green"), "failed": ("FAILED", "red"), "not run": ("-     ", "yellow")}


def _marked(status: Status, text: str) -> str:
    """The text behind the mark of a status, wrapped."""
    return f"{coloured(*_MARKS[status])}  {paragraph(text, 8).lstrip()}"


def _summary(report: CheckReport) -> str:
    if not report.family:
        return f"{report.loss}: could not be built"
    total, failed, not_run = len(report.results), len(report.failed), len(report.not_run)
    result = f"all {total} checks passed" if report.ok else f"{failed} of {total} checks failed"
    result += f", {not_run} not run" if not_run else ""
    return f"{report.loss} ({report.family}): {result} in {report.seconds:.1f} s"


def _compact(report: CheckReport) -> str:
    return "\n".join(
        [f"{coloured(*_MARKS['passed' if report.ok else 'failed'])}  {_summary(report)}", *_messages(report)]
    )


def _full(report: CheckReport) -> str:
    lines = []
    for result in report.results:
        if result.status == "not run":
            continue
        lines.append(_marked(result.status, f"{result.check} ({result.note})" if result.note else result.check))
        if result.status == "failed":
            lines += [_indented(f"expected: {result.description}"), _indented(result.message)]
    for reason, count in Counter(result.message for result in report.not_run).items():
        lines.append(_marked("not run", f"{count} check{'s' if count > 1 else ''} not run, {reason}"))
    return "\n".join([*lines, _summary(report)])


def _messages(report: CheckReport) -> list[str]:
    return [_indented(f"{result.check}: {result.message}") for result in report.failed]


def _indented(text: str) -> str:
    """The text in full, its lines kept and wrapped."""
    return "\n".join(paragraph(line, 8) for line in text.splitlines() if line.strip())
