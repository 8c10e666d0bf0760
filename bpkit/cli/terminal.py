"""Where commands write: results to stdout, everything else to stderr; plain text where there is no terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

WIDTH_OF_FILES = 160
"""Columns where output goes to a file or pipe, so that tables are not folded to 80."""


def plain(stream: TextIO) -> bool:
    """Whether a stream must get no escape codes: asked for by NO_COLOR or TERM=dumb, or no terminal.

    FORCE_COLOR turns them on where there is no terminal, and NO_COLOR is stronger, as in Python itself.
    """
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown"):
        return True
    return not (stream.isatty() or os.environ.get("FORCE_COLOR"))


def be_plain_where_asked() -> None:
    """Keep Typer, which writes help and usage errors, to the same; it would also colour on some build servers."""
    if plain(sys.stdout) or plain(sys.stderr):
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"  # read when its module is imported, for help and errors
        loaded: Any = sys.modules.get("typer.rich_utils")
        if loaded is not None:
            loaded.FORCE_TERMINAL = False


def console(*, stderr: bool = False) -> Console:
    """A console that writes no escape codes where none are wanted."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH_OF_FILES
    # Without a colour system there is no bold either: nothing but text.
    return Console(stderr=stderr, width=width, highlight=False, color_system=None if plain(stream) else "auto")


def say(text: str) -> None:
    """A line on stderr, as it is: no markup, no folding."""
    print(text, file=sys.stderr, flush=True)


def text_table(*columns: str, title: str | None = None) -> Table:
    """A table of texts, which fold; those of the first column, which are bold, do not."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for place, name in enumerate(columns):
        how: dict[str, Any] = {"overflow": "fold"} if place else {"style": "bold", "no_wrap": True}
        table.add_column(name, **how)
    return table


class Bar:
    """One progress bar on stderr. `start` names a phase and its number of ticks."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("loading", total=None)

    def start(self, phase: str, total: int) -> None:
        self._progress.reset(self._task, description=phase, total=total)

    def show(self, phase: str, done: int, total: int) -> None:
        """Name what is being done, and how far it is."""
        self._progress.update(self._task, description=phase, completed=done, total=total)

    def tick(self) -> None:
        self._progress.advance(self._task)


@contextmanager
def progress_bar() -> Iterator[Bar]:
    """A bar that goes away when it is done, and that is not there at all without a terminal that can move it."""
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console(stderr=True), transient=True, disable=not shows_bars()) as progress:
        yield Bar(progress)


def shows_bars() -> bool:
    """Whether progress bars make sense: on a terminal, which must take escape codes."""
    return sys.stderr.isatty() and not plain(sys.stderr)
