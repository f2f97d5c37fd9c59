"""`check`: the conformance kit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from ..errors import LossConfigError
from ..registry import LossFunctionRegistry
from .files import look_here, losses_in
from .options import AsJson
from .output import coloured, paragraph, print_json

if TYPE_CHECKING:
    from ..testing import CheckReport


def check(
    loss: Annotated[
        str | None, typer.Argument(help="A registered name, an import path 'module:loss', or a Python file.")
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
    from ..testing import run_checks

    look_here()
    names = LossFunctionRegistry.names() if loss is None else _named(loss, values)
    reports = []
    for name in names:
        report = run_checks(name, **{**_example(name), **values})
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
        return [loss]
    names = losses_in(Path(loss))
    if values and len(names) > 1:
        raise LossConfigError(f"`-p` is for one loss, but {loss} holds {', '.join(names)}: check 'module:loss' instead")
    return names


def _example(name: str) -> dict[str, Any]:
    return dict(LossFunctionRegistry.get(name).example)


def _parsed(words: list[str]) -> dict[str, Any]:
    """Hyperparameters of `name=value` words."""
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"expected NAME=VALUE, found {word!r}", param_hint="-p")
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


def _mark(ok: bool) -> str:
    return coloured("ok    ", "green") if ok else coloured("FAILED", "red")


def _summary(report: CheckReport) -> str:
    total = len(report.results)
    result = f"all {total} checks passed" if report.ok else f"{len(report.failed)} of {total} checks failed"
    return f"{report.loss} ({report.family or 'not built'}): {result} in {report.seconds:.1f} s"


def _compact(report: CheckReport) -> str:
    return "\n".join([f"{_mark(report.ok)}  {_summary(report)}", *_messages(report)])


def _full(report: CheckReport) -> str:
    lines = []
    for result in report.results:
        lines.append(f"{_mark(result.ok)}  {result.check}")
        if not result.ok:
            lines += [_indented(f"expected: {result.description}"), _indented(result.message)]
    return "\n".join([*lines, _summary(report)])


def _messages(report: CheckReport) -> list[str]:
    return [_indented(f"{result.check}: {result.message}") for result in report.failed]


def _indented(text: str) -> str:
    """The text in full, its lines kept and wrapped."""
    return "\n".join(paragraph(line, 8) for line in text.splitlines() if line.strip())
