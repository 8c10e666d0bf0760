"""Where commands write: results to stdout, everything else to stderr; plain text where there is no terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

WIDTH_OF_FILES = 160
"""Columns where output goes to a file or pipe, so that tables are not folded to 80."""


def console(*, stderr: bool = False) -> Console:
    """A console that honours NO_COLOR and writes no escape codes where there is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH_OF_FILES
    return Console(stderr=stderr, width=width, highlight=False)


def say(text: str) -> None:
    """A line on stderr, as it is: no markup, no folding."""
    print(text, file=sys.stderr, flush=True)


class Bar:
    """One progress bar on stderr. `start` names a phase and its number of ticks."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("loading", total=None)

    def start(self, phase: str, total: int) -> None:
        self._progress.reset(self._task, description=phase, total=total)

    def tick(self) -> None:
        self._progress.advance(self._task)


@contextmanager
def progress_bar() -> Iterator[Bar]:
    """A bar that goes away when it is done, and that is not there at all without a terminal."""
    err = console(stderr=True)
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        yield Bar(progress)
