"""Tables of figures: described once, printed by rich on a terminal of any width or written as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement


@dataclass(frozen=True)
class TableRow:
    """Cells, and `green` or `dim` where the row is to stand out or back."""

    cells: Sequence[str]
    style: str | None = None


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        head: of each column; line breaks are for the terminal.
        sections: rows that belong together; a terminal shows a gap between them.
        last_is_text: whether the last column holds text rather than figures.
    """

    title: str
    head: Sequence[str]
    sections: Sequence[Sequence[TableRow]]
    last_is_text: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """On narrow terminals columns stand closer, cells fold between words, and no figure is cut off."""
        table = rich.table.Table(title=escape(self.title), title_justify="left", box=box.SIMPLE_HEAD)
        last = len(self.head) - 1 if self.last_is_text else 0
        for place, title in enumerate(self.head):
            text: dict[str, Any] = {"overflow": "fold"} if place == last else {"justify": "right"}
            table.add_column(escape(title), **({"style": "bold"} if place == 0 else text))
        for rows in self.sections:
            for row in rows:
                table.add_row(*map(escape, row.cells), style=row.style)
            table.add_section()
        if Measurement.get(console, options.update(max_width=10_000), table).maximum <= options.max_width:
            yield table
        else:
            fold_between_words(table, console, options)
            yield table
            yield ""  # for the edge that it has lost

    def html(self) -> str:
        """A table that scrolls sideways where it is too wide; without the title."""
        heads = (title.replace("\n", " ") for title in self.head)
        rows = (row for section in self.sections for row in section)
        head = "".join(f"<th>{html.escape(title)}</th>" for title in heads)
        body = "".join(_html_row(row) for row in rows)
        kind = ' class="text"' if self.last_is_text else ""
        return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_row(row: TableRow) -> str:
    cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row.cells)
    return f'<tr class="dim">{cells}</tr>' if row.style == "dim" else f"<tr>{cells}</tr>"


def bracketed(interval: Sequence[float], form: str) -> str:
    """An interval without blanks, so that narrow terminals do not fold in its middle.

    >>> bracketed([0.5, 1.25], ".2f")
    '(0.50..1.25)'
    """
    low, high = interval
    return f"({low:{form}}..{high:{form}})"


def print_sentences(sentences: Iterable[str], console: Console) -> None:
    """A line for each, however long: the terminal folds it."""
    for sentence in sentences:
        console.print(escape(sentence), soft_wrap=True)


def fold_between_words(table: rich.table.Table, console: Console, options: ConsoleOptions) -> None:
    """Give each column the width of its longest word, and what is left to the columns in turn.

    Where even that is too wide, the first column, which holds names, is folded within its words.
    """
    table.padding = (0, 0)
    table.pad_edge = table.show_edge = False
    wide = options.update(max_width=10_000)
    measured = [[Measurement.get(console, wide, c) for c in (one.header, *one.cells)] for one in table.columns]
    widths = [max(words.minimum for words in cells) for cells in measured]
    lines = [max(words.maximum for words in cells) for cells in measured]
    spare = options.max_width - sum(widths) - (len(widths) - 1)  # a blank between columns
    widths[0] = max(widths[0] + min(spare, 0), 1)
    for place, line in enumerate(lines):
        more = min(max(spare, 0), line - widths[place])
        widths[place] += more
        spare -= more
    for column, width in zip(table.columns, widths, strict=True):
        column.width, column.overflow = width, "fold"
