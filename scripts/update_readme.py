"""Write the table of losses into the README, from the registry.

    python scripts/update_readme.py [--check]

With --check nothing is written; the exit status is 1 if the table is out of date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trl_custom_losses.cards import markdown_table

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- losses: start -->", "<!-- losses: end -->"


def with_table(text: str) -> str:
    """The README's text with the table between its markers made anew."""
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    if not rest or not tail:
        raise ValueError(f"the README lacks the markers {START} and {END}")
    return f"{head}{START}\n{markdown_table()}\n{END}{tail}"


def main(arguments: list[str] | None = None) -> int:
    """Update the README or check it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the table is up to date")
    options = parser.parse_args(arguments)
    text = README.read_text()
    updated = with_table(text)
    if options.check:
        return int(text != updated)
    README.write_text(updated)
    return 0


if __name__ == "__main__":
    sys.exit(main())
