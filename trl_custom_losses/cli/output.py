"""How the commands print: tables and paragraphs as wide as the terminal, plain text in pipes, JSON for programs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import typer

_GAP = "  "


def print_json(value: Any) -> None:
    """Print `value` as JSON; what JSON does not know is printed as Python would."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=repr))


def terminal_width() -> int | None:
    """Columns of the terminal, or of `COLUMNS`; None where the output goes elsewhere and lines may be long."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return None
    return max(shutil.get_terminal_size().columns, 40)


def bold(text: str) -> str:
    """`text` for a heading; `typer.echo` drops the codes where the output is no terminal."""
    return text if "NO_COLOR" in os.environ else typer.style(text, bold=True)


def coloured(text: str, colour: str) -> str:
    """`text` in a colour, on terminals alone."""
    return text if "NO_COLOR" in os.environ else typer.style(text, fg=colour, bold=True)


def paragraph(text: str, indent: int = 0, hanging: int = 0, width: int | None = None) -> str:
    """`text` wrapped at `width`, the terminal's (at most 100) if not given, its words whole.

    Args:
        text: One paragraph.
        indent: Columns left free before it.
        hanging: Columns left free before its second and further lines, beyond `indent`.
        width: Columns.
    """
    width = width or min(terminal_width() or 80, 100)
    first, other = " " * indent, " " * (indent + hanging)
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=other,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, beneath: Sequence[str] | None = None
) -> str:
    """Rows under a header; no word is ever cut.

    Args:
        header: Of the columns.
        rows: Of texts; the last column may be long and is wrapped.
        width: Columns of the terminal; None for one line a row.
        beneath: A text of each row that stands under it; at its end where a row is one line.
    """
    texts = list(beneath or [""] * len(rows))
    if width is None and beneath:
        header, rows = [*header, "what it is"], [[*row, text] for row, text in zip(rows, texts, strict=True)]
        texts = [""] * len(rows)
    widths = [max(len(row[index]) for row in (header, *rows)) for index in range(len(header) - 1)]
    left = sum(widths) + len(_GAP) * len(widths)
    lines = []
    for row, text in zip((header, *rows), ("", *texts), strict=True):
        *cells, last = row
        start = "".join(cell.ljust(size) + _GAP for cell, size in zip(cells, widths, strict=True))
        room = len(last) + 1 if width is None else max(width - left, 20)
        wrapped = textwrap.wrap(last, room, break_long_words=False, break_on_hyphens=False)
        lines.append((start + ("\n" + " " * left).join(wrapped)).rstrip())
        if text:
            lines.append(paragraph(text, indent=4, width=width))
    return "\n".join([bold(lines[0]), *lines[1:]])
