"""Tables of figures on narrow terminals: columns stand closer, cells fold between words, and no figure is cut off."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table


class Fitted:
    """A table that fits itself to the console it is printed on. Where there is room it is as it was."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if Measurement.get(console, options.update(max_width=10_000), self.table).maximum > options.max_width:
            fold_between_words(self.table, console, options)
            yield self.table
            yield ""  # for the edge that it has lost
        else:
            yield self.table


def fold_between_words(table: Table, console: Console, options: ConsoleOptions) -> None:
    """Give each column the width of its longest word, and what is left to the columns in turn.

    Where even that is too wide, the first column, which holds names, is folded within its words.
    """
    table.padding = (0, 0)
    table.pad_edge = table.show_edge = False
    measured = [_measured(column, console, options) for column in table.columns]
    widths = [words.minimum for words in measured]
    spare = options.max_width - sum(widths) - (len(widths) - 1)  # a blank between columns
    widths[0] = max(widths[0] + min(spare, 0), 1)
    for place, words in enumerate(measured):
        more = min(max(spare, 0), words.maximum - widths[place])
        widths[place] += more
        spare -= more
    for column, width in zip(table.columns, widths, strict=True):
        column.width, column.overflow = width, "fold"


def _measured(column: Column, console: Console, options: ConsoleOptions) -> Measurement:
    """The longest word and the longest line of a column, its header included."""
    wide = options.update(max_width=10_000)
    found = [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)]
    return Measurement(max(one.minimum for one in found), max(one.maximum for one in found))
