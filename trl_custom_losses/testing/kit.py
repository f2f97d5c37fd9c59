"""Running the checks on a loss."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Collection
from typing import Any

from ..errors import LossConfigError
from ..hyperparameters import suggestion
from ..types import Family
from . import checks as _checks  # noqa: F401 - fills CHECKS
from .check import CHECKS, Check, CheckFailure, describe
from .report import CheckReport, CheckResult, LossCheckError, Status
from .subject import Subject, subject_of


def check_loss(
    loss: Any, /, *, checks: Collection[str] | None = None, family: Family | None = None, **hyperparameters: Any
) -> CheckReport:
    """Check that a loss is right: `check_loss("my_losses:MyLoss", beta=0.1)`.

    Args:
        loss: A registered name, an import path `package.module:attribute`, a config with `type`, a class, a function or
            a loss object.
        checks: Names of the checks to run; all of `CHECKS` if not given.
        family: Of a function that does not say its own.
        **hyperparameters: For the loss; where there are none, or one without a default is missing, those of its
            `example`.

    Returns:
        What each check found.

    Raises:
        LossCheckError: Checks failed; the message lists all of them.
        LossConfigError: It is no loss, its hyperparameters are refused, or a check is unknown.
    """
    report = run_checks(loss, checks=checks, family=family, **hyperparameters)
    if not report.ok:
        raise LossCheckError(report)
    return report


def run_checks(
    loss: Any, /, *, checks: Collection[str] | None = None, family: Family | None = None, **hyperparameters: Any
) -> CheckReport:
    """As `check_loss`, but a report of failed checks is returned as well."""
    subject = subject_of(loss, hyperparameters, family)
    built = subject.build()
    results: list[CheckResult] = []
    blocked = ""
    for one in select(checks):
        if blocked:
            results.append(CheckResult(one.name, one.description, "not run", f"because '{blocked}' failed"))
            continue
        result = run_check(one, subject)
        results.append(result)
        if one.first and not result.ok:
            blocked = one.name
    return CheckReport(subject.name, str(built.family), tuple(results))


def select(names: Collection[str] | None) -> list[Check]:
    """The checks of these names, in the order of `CHECKS`; all if None.

    Raises:
        LossConfigError: There is no such check.
    """
    for name in names or ():
        if name not in CHECKS:
            raise LossConfigError(f"there is no check named {name!r}{suggestion(name, CHECKS)}: {', '.join(CHECKS)}")
    return [one for name, one in CHECKS.items() if names is None or name in names]


def run_check(one: Check, subject: Subject) -> CheckResult:
    """Run one check."""
    start = time.perf_counter()
    message, note = "", None
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # a few steps of random numbers are no run that a loss could warn about
            note = one.run(subject)
    except CheckFailure as failure:
        message = f"{failure}. Usual cause: {one.usual_cause}"
    except (Exception, SystemExit) as error:
        message = describe(error)
    status: Status = "failed" if message else "passed"
    return CheckResult(one.name, one.description, status, message, note or "", time.perf_counter() - start)


def parametrize_with_checks(
    *losses: Any, checks: Collection[str] | None = None, family: Family | None = None, **hyperparameters: Any
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that makes one test of each check of each loss, for pytest.

        @parametrize_with_checks("my_losses:MyLoss", beta=0.1)
        def test_my_loss(check):
            check()

    Args:
        *losses: As for `check_loss`.
        checks: Names of the checks; all if not given.
        family: Of functions that do not say their own.
        **hyperparameters: For every loss.

    Raises:
        LossConfigError: As for `check_loss`, while tests are collected.
    """
    import pytest

    cases = []
    for loss in losses:
        subject = subject_of(loss, hyperparameters, family)
        cases += [pytest.param(_Test(one, subject), id=f"{subject.name}-{one.name}") for one in select(checks)]
    return pytest.mark.parametrize("check", cases)


class _Test:
    """One check of one loss, which raises if it fails."""

    def __init__(self, check: Check, subject: Subject) -> None:
        self.check, self.subject = check, subject

    def __call__(self) -> None:
        result = run_check(self.check, self.subject)
        if not result.ok:
            raise LossCheckError(CheckReport(self.subject.name, str(self.subject.family), (result,)))
