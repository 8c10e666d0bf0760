"""What a command writes when its work is done: figures, a picture or a page; and how the command is recorded."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bpkit.cli.errors import nothing_written, require, when_interrupted
from bpkit.cli.terminal import Bar, console, progress_bar, say
from bpkit.files import PICTURES, check_writable, write_at_once, write_json

PAGES = (".html", ".htm")
Json = Annotated[Path | None, typer.Option("--json", help="Write all figures here.", metavar="FILE")]
Plot = Annotated[Path | None, typer.Option(help="Draw a picture here (.png, .svg or .pdf).", metavar="FILE")]
Page = Annotated[Path | None, typer.Option(help="Write a page with pictures here (.html).", metavar="FILE")]


class Outputs:
    """Files that are written at the end. One that cannot be is refused when this is made, not after minutes of work.

    Attributes:
        figures, picture, page: None for what was not asked for.
    """

    def __init__(self, figures: Path | None = None, *, plot: Path | None = None, page: Path | None = None) -> None:
        self.figures, self.picture, self.page = figures, plot, page
        if figures is not None:
            check_writable(figures)
        for path, purpose, suffixes in ((plot, "A plot", PICTURES), (page, "A report", PAGES)):
            if path is not None:
                require("matplotlib", extra="plot", purpose=purpose)
                check_writable(path, suffixes=suffixes)

    @contextmanager
    def pending(self) -> Iterator[Bar]:
        """Around the work: a progress bar. Whoever interrupts it is told that nothing was written."""
        with when_interrupted(nothing_written(self.figures, self.picture, self.page)), progress_bar() as bar:
            yield bar

    def deliver(
        self,
        result: Any,
        show: Callable[[Any, Console], None],
        draw: Callable[[Any, Path], None] | None = None,
        page: Callable[[Any], str] | None = None,
        *,
        write: Callable[[Path, Any], None] = write_json,
    ) -> None:
        """Write the figures, print the tables, draw the picture, write the page, and say what was written."""
        if self.figures is not None:
            write(self.figures, result)
        show(result, console())
        if self.picture is not None and draw is not None:
            draw(result, self.picture)
        if self.page is not None and page is not None:
            write_at_once(self.page, page(result))
        for path in (self.figures, self.picture, self.page):
            if path is not None:
                say(f"wrote {path}")


# Groups of options, for `bpkit.cli.options.takes`.


_ABSOLUTE = re.compile(r"(?<![^=:+,])[/~][^,+]*")
"""A path from the root or from home, as a whole argument or as the value of an option within one."""


def figures(json: Json = None) -> Outputs:
    """`--json`."""
    return Outputs(json)


def figures_and_plot(json: Json = None, plot: Plot = None) -> Outputs:
    """`--json` and `--plot`."""
    return Outputs(json, plot=plot)


def figures_and_page(json: Json = None, report: Page = None) -> Outputs:
    """`--json` and `--report`."""
    return Outputs(json, page=report)


def figures_plot_and_page(json: Json = None, plot: Plot = None, report: Page = None) -> Outputs:
    """`--json`, `--plot` and `--report`."""
    return Outputs(json, plot=plot, page=report)


def say_written(out: Path, following: str) -> None:
    """Say what came of it, once, and what to do with it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # Lightning starts further processes by the same command
        say(f"wrote {out}")
        say(f"Next: {following}")


def command_line() -> str:
    """The command that runs, as it was typed."""
    return shlex.join(["bpkit", *sys.argv[1:]])


def portable(arguments: Sequence[str]) -> str:
    """A command as it is recorded in what is passed on: of absolute paths only the name is kept, also within options.

    >>> portable(["train", "mlp", "/home/me/runs/trace", "--out", "runs/mlp"])
    'bpkit train mlp trace --out runs/mlp'
    >>> portable(["trace", "--drafter", "ngram+hierarchy:store=/home/me/store,order=model"])
    'bpkit trace --drafter ngram+hierarchy:store=store,order=model'
    """
    return shlex.join(["bpkit", *(_ABSOLUTE.sub(lambda path: Path(path[0]).name, a) for a in arguments)])
