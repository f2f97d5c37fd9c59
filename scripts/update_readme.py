"""Write tables into the README: losses from the registry, checks from the conformance kit, speed from the benchmarks.

    python scripts/update_readme.py [--check]

With --check nothing is written; the exit status is 1 if a table is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from trl_custom_losses.cards import markdown_table
from trl_custom_losses.testing import CHECKS

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "benchmark_results" / "cpu"
#: Cases of the benchmarks in the README's order.
SHOWN = ("trainers", "ddp", "counts", "grouping")
CASES = ("trainers", "ddp", "counts", "components", "engines", "grouping", "imports")
PAGE = RESULTS.parent / "README.md"


def table_of_checks() -> str:
    """All checks of the conformance kit: name, and what holds for a loss that passes."""
    rows = [f"| `{check.name}` | {check.description} |" for check in CHECKS.values()]
    return "\n".join(["| check | what holds for a loss that passes |", "|---|---|", *rows])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def tables_of_benchmarks(cases: Sequence[str] = SHOWN, left_out: str = ", logging") -> str:
    """What `scripts/benchmark.py` last measured into `scripts/benchmark_results/cpu`, and how.

    Args:
        cases: Of the benchmarks.
        left_out: Rows whose first cell ends so are left out; none if empty.
    """
    found = [json.loads((RESULTS / f"{case}.json").read_text()) for case in cases]
    parts = []
    for one in found:
        rows = [row for row in one["table"] if not left_out or not row[0].endswith(left_out)]
        parts.append(f"**{one['title']}** ({one['date']}, `{one['command']}`)\n\n{markdown(rows)}")
    packages = found[0]["environment"]["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "trl", "transformers"))
    return "\n\n".join([*parts, f"{found[0]['hardware']}; {versions}."])


def page_of_benchmarks() -> str:
    """All cases, whole."""
    return f"# What `scripts/benchmark.py` measured last\n\n{tables_of_benchmarks(CASES, '')}\n"


TABLES: dict[str, Callable[[], str]] = {
    "losses": markdown_table,
    "checks": table_of_checks,
    "benchmarks": tables_of_benchmarks,
}


def with_tables(text: str) -> str:
    """The README's text with the tables between their markers made anew."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
        head, _, rest = text.partition(start)
        _, _, tail = rest.partition(end)
        if not rest or not tail:
            raise ValueError(f"the README lacks the markers {start} and {end}")
        text = f"{head}{start}\n{table()}\n{end}{tail}"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Update the README or check it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the tables are up to date")
    options = parser.parse_args(arguments)
    pages = {README: with_tables(README.read_text()), PAGE: page_of_benchmarks()}
    if options.check:
        return int(any(not path.exists() or path.read_text() != text for path, text in pages.items()))
    for path, text in pages.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
