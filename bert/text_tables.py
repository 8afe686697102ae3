"""Tables of text: a header and rows, to the terminal and as Markdown."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table

Rows = list[list[str]]


def markdown(rows: Rows) -> str:
    """A table in Markdown."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def print_table(rows: Rows, console: Console | None = None) -> None:
    """Print a table to the terminal."""
    table = Table(*(Column(name, overflow="fold") for name in rows[0]))
    for row in rows[1:]:
        table.add_row(*row)
    (console or Console()).print(table)
