"""What the checks of a loss found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
        message: What is wrong, by how much, and the usual cause; empty if the check passed.
        seconds: It took.
    """

    check: str
    description: str
    message: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the loss passed."""
        return not self.message


@dataclass(frozen=True)
class CheckReport:
    """What all checks of a loss found.

    Args:
        loss: Its name.
        family: Its family.
        results: One for each check that ran, in their order.
    """

    loss: str
    family: str
    results: tuple[CheckResult, ...]

    @property
    def failed(self) -> tuple[CheckResult, ...]:
        """Results of the checks that the loss did not pass."""
        return tuple(result for result in self.results if not result.ok)

    @property
    def passed(self) -> tuple[CheckResult, ...]:
        """Results of the checks that the loss passed."""
        return tuple(result for result in self.results if result.ok)

    @property
    def ok(self) -> bool:
        """Whether the loss passed every check."""
        return not self.failed

    @property
    def seconds(self) -> float:
        """That all checks took."""
        return sum(result.seconds for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        results = [asdict(result) | {"ok": result.ok} for result in self.results]
        return {"loss": self.loss, "family": self.family, "ok": self.ok, "seconds": self.seconds, "results": results}

    def __str__(self) -> str:
        head = f"loss '{self.loss}' ({self.family}): {len(self.passed)} of {len(self.results)} checks passed"
        failures = [f"\n{result.check}: {result.message}" for result in self.failed]
        return "\n".join([head, *failures])
