"""What the checks of a loss found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "not run"]


class LossCheckError(AssertionError):
    """A loss failed checks; the message lists each of them. `report` is the whole `CheckReport`."""

    def __init__(self, report: CheckReport) -> None:
        super().__init__(str(report))
        self.report = report


@dataclass(frozen=True)
class CheckResult:
    """What one check found.

    Args:
        check: Its name.
        description: What holds for a loss that passes.
        status: "passed", "failed", or "not run", because a check before it failed on which it stands.
        message: What is wrong, by how much, and the usual cause; or why it was not run.
        note: What the loss declares or is that leaves the check, or a part of it, nothing to say.
        seconds: It took.
    """

    check: str
    description: str
    status: Status
    message: str = ""
    note: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the loss passed."""
        return self.status == "passed"


@dataclass(frozen=True)
class CheckReport:
    """What all checks of a loss found.

    Args:
        loss: Its name.
        family: Its family.
        results: One for each check, in their order.
    """

    loss: str
    family: str
    results: tuple[CheckResult, ...]

    def _with_status(self, status: Status) -> tuple[CheckResult, ...]:
        return tuple(result for result in self.results if result.status == status)

    @property
    def failed(self) -> tuple[CheckResult, ...]:
        """Results of the checks that the loss failed."""
        return self._with_status("failed")

    @property
    def passed(self) -> tuple[CheckResult, ...]:
        """Results of the checks that the loss passed."""
        return self._with_status("passed")

    @property
    def not_run(self) -> tuple[CheckResult, ...]:
        """Checks that mean nothing for the loss as long as others fail."""
        return self._with_status("not run")

    @property
    def ok(self) -> bool:
        """Whether the loss passed every check."""
        return len(self.passed) == len(self.results)

    @property
    def seconds(self) -> float:
        """That all checks took."""
        return sum(result.seconds for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        results = [asdict(result) | {"ok": result.ok} for result in self.results]
        return {"loss": self.loss, "family": self.family, "ok": self.ok, "seconds": self.seconds, "results": results}

    def __str__(self) -> str:
        lines = [f"loss '{self.loss}' ({self.family}): {len(self.passed)} of {len(self.results)} checks passed"]
        lines += [f"\n{result.check}: {result.message}" for result in self.failed]
        if self.not_run:
            lines.append(f"\n{len(self.not_run)} checks not run: {self.not_run[0].message}")
        return "\n".join(lines)
