"""From exceptions to one readable paragraph and an exit code; Ctrl-C and what was saved until then."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from bpkit.cli.command import Group
from bpkit.cli.terminal import say
from bpkit.installation.distribution import install_command

FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 1, 2, 130, 143
EXIT_CODES = (
    "Exit codes: 0 done · 1 failed while running · 2 an argument, option, file or policy cannot be used · "
    "130 interrupted (Ctrl-C) · 143 terminated."
)
DEBUG = "--debug"


class MissingExtra(RuntimeError):
    """An optional part of bpkit is not installed; the message says how to get it."""


_OF_FILES: dict[type[OSError], str] = {
    FileNotFoundError: "there is no such file or folder",
    FileExistsError: "a file of that name is there already",
    IsADirectoryError: "it is a folder; name a file",
    NotADirectoryError: "it is a file, where a folder is wanted",
    PermissionError: "you have no permission",
}
"""What the system's own errors mean, which say only their number."""
# PolicyError, ConfigError and what decoder and drafters refuse are ValueErrors.
_INPUT_ERRORS: tuple[type[Exception], ...] = (ValueError, *_OF_FILES)
_EXPECTED = (*_INPUT_ERRORS, OSError, MissingExtra, ImportError)


class Terminated(KeyboardInterrupt):
    """SIGTERM: a command ends as at Ctrl-C, with an exit code of its own."""


def end_when_terminated() -> None:
    """From now on SIGTERM raises Terminated, so that a command takes its workers along and says what was saved."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # whoever asks twice means it
    raise Terminated


@contextmanager
def when_interrupted(said: str | Callable[[], str]) -> Iterator[None]:
    """Around work that takes long: `said` follows the word "Interrupted." if the user ends it there.

    Args:
        said: what was saved and how to go on; a function is called at that moment.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(said if isinstance(said, str) else said())
        raise


def nothing_written(*paths: Path | None) -> Callable[[], str]:
    """What to say of files that are written at the end, for `when_interrupted`."""

    def said() -> str:
        states = [f"{path} is {'as it was' if path.exists() else 'not there'}" for path in paths if path is not None]
        return f"Nothing was written: {', '.join(states)}." if states else "Nothing was written."

    return said


def checkpoint_in(out: Path) -> Callable[[], str]:
    """What to say of a training run that writes `out/checkpoints/last.ckpt` as it goes, for `when_interrupted`."""

    def said() -> str:
        if not (out / "checkpoints" / "last.ckpt").is_file():
            return f"No checkpoint was written to {out} yet."
        return f"The last checkpoint is in {out / 'checkpoints'}; the same command goes on from there."

    return said


def exit_code(error: BaseException) -> int:
    """The exit code for an error that ended a command."""
    if isinstance(error, Terminated):
        return TERMINATED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return BAD_INPUT if isinstance(error, _INPUT_ERRORS) else FAILED


def explain(error: BaseException) -> str:
    """One paragraph: what is wrong and, where the message knows it, what to do."""
    if isinstance(error, KeyboardInterrupt):
        ended = "Terminated." if isinstance(error, Terminated) else "Interrupted."
        return " ".join([ended, *getattr(error, "__notes__", ())])
    said = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:  # of the system itself
        said = f"{error.filename}: {_OF_FILES.get(type(error), error.strerror)}"
    text = " ".join(said.split())
    if isinstance(error, _EXPECTED):
        return f"Error: {text or type(error).__name__}"
    return (
        f"Error: {type(error).__name__}: {text} (`bpkit {DEBUG} ...` shows where this comes from; if it looks like a "
        "fault of bpkit, `bpkit doctor --report` prints what a bug report needs)"
    )


def require(module: str, *, extra: str, purpose: str) -> None:
    """Raise MissingExtra unless an optional dependency is installed."""
    if importlib.util.find_spec(module) is None:
        raise MissingExtra(f"{purpose} needs {module}, which is not installed: {install_command(extra)}")


class ExplainingGroup(Group):
    """Commands whose errors, also those of plug-in commands, end in a paragraph and an exit code.

    Attributes:
        own: bpkit's commands in the order of the help; those of plug-ins come after them. `--debug` may also stand
            after one of these, while others may have such an option of their own.
    """

    own: tuple[str, ...] = ()

    def list_commands(self, ctx: Any) -> list[str]:
        places = {name: place for place, name in enumerate(self.own)}
        return sorted(super().list_commands(ctx), key=lambda name: places.get(name, len(places)))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # `--debug` after a command, but not after `--`, means what it does before the command.
        end = args.index("--") if "--" in args else len(args)
        start = next((place for place, one in enumerate(args[:end]) if one in self.own), end)
        if DEBUG in args[start:end]:
            args = [DEBUG, *args[:start], *(one for one in args[start:end] if one != DEBUG), *args[end:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            broken_pipe = isinstance(error, OSError) and error.errno == errno.EPIPE
            # Usage errors know how to show themselves, and a reader that went away needs no message.
            if broken_pipe or isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "format_message"):
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            elif not (isinstance(error, KeyboardInterrupt) and os.environ.get("LOCAL_RANK", "0") != "0"):
                say(explain(error))  # once, and not for each process that Lightning started
            raise typer.Exit(exit_code(error)) from None
