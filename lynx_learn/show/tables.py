"""Tables for the terminal and for pages."""

from dataclasses import dataclass
from typing import Any

import rich.table
from rich import box
from rich.console import Console

from ..errors import printable

# Columns of a page, and those between two columns of a table.
WIDTH, GAP = 80, 2


@dataclass(frozen=True)
class Table:
    """Heads and rows, which a terminal shows and a page holds as Markdown. Names in them may come from anybody's files."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", printable(self.title))
        object.__setattr__(self, "rows", [[printable(" ".join(cell.split())) for cell in row] for row in self.rows])

    def without(self, *names: str) -> "Table":
        """The same without these columns."""
        kept = [index for index, name in enumerate(self.head) if name not in names]
        return Table(self.title, [self.head[i] for i in kept], [[row[i] for i in kept] for row in self.rows])

    @property
    def markdown(self) -> str:
        """Without the title; a cell may hold whatever means something there."""
        rows = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        lines = [self.head, ["---"] * len(self.head), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def __rich__(self) -> rich.table.Table:
        """At most 80 columns wide; the first column is left-aligned, the others right-aligned."""
        made = rich.table.Table(
            title=self.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
        )
        widths = fit([[name, *(row[index] for row in self.rows)] for index, name in enumerate(self.head)])
        for index, (name, width) in enumerate(zip(self.head, widths, strict=True)):
            made.add_column(name, justify="left" if index == 0 else "right", width=width, overflow="fold")
        for row in self.rows:
            made.add_row(*row)
        return made


def fit(columns: list[list[str]]) -> list[int]:
    """Widths with which columns fit: cells wrap between words, first where that narrows most, then within words."""
    words = [max((len(word) for cell in column for word in cell.split()), default=1) for column in columns]
    widths = [max(least, *map(len, column[1:] or [""])) for least, column in zip(words, columns, strict=True)]
    while (excess := sum(widths) + GAP * len(widths) - 1 - WIDTH) > 0:
        most = max(range(len(widths)), key=lambda i: (widths[i] - words[i], widths[i]))
        least = words[most] if widths[most] > words[most] else 1
        widths[most] = max(least, widths[most] - excess) if least > 1 else widths[most] - 1
    return widths


def show(*parts: object) -> None:
    """Print to standard output; paths and other lines of text stay whole, so that they can be copied."""
    plain: dict[str, Any] = {"markup": False, "emoji": False}  # names may hold brackets and colons
    console = Console(**plain)
    if not console.is_terminal:
        console = Console(width=WIDTH, **plain)
    for part in parts:
        is_text = isinstance(part, str)
        console.print(part, highlight=False, soft_wrap=is_text, end="\n" if is_text else "\n\n")
