"""Tables, printed with rich if it is installed and as plain text otherwise."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("Finding", "nbytes", "render", "seconds", "show")

# A row of `doctor`: subject, finding, consequence, and whether something is missing.
Finding = tuple[str, str, str, bool]


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; a column whose name begins with ``>`` is right-aligned."""
    if sys.stdout.isatty() and (table := _rich(columns, rows)) is not None:
        from rich.console import Console

        Console().print(table)
    else:
        print(render(columns, rows))


def _rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    try:
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        return None
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def render(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text."""
    lines = [[column.lstrip(">") for column in columns], *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column.startswith(">") else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    )


def nbytes(number: int | None) -> str:
    """Return a number of bytes as text, in a suitable unit."""
    if number is None:
        return "?"
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{number} B" if unit == "B" else f"{value:,.1f} {unit}"


def seconds(number: float) -> str:
    """Return a duration as text, in a suitable unit."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{max(number, 0):.0f} s"
