"""From exceptions to one readable paragraph and an exit code."""

from __future__ import annotations

import errno
import importlib.util
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from bpkit.cli.terminal import say

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
EXIT_CODES = (
    "Exit codes: 0 done · 1 failed while running · 2 an argument, option, file or policy cannot be used · "
    "130 interrupted."
)


class MissingExtra(RuntimeError):
    """An optional part of bpkit is not installed; the message says how to get it."""


# PolicyError, ConfigError and what decoder and drafters refuse are ValueErrors.
_INPUT_ERRORS = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
_EXPECTED = (*_INPUT_ERRORS, OSError, MissingExtra, ImportError)


def exit_code(error: BaseException) -> int:
    """The exit code for an error that ended a command."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return BAD_INPUT if isinstance(error, _INPUT_ERRORS) else FAILED


def explain(error: BaseException) -> str:
    """One paragraph: what is wrong and, where the message knows it, what to do."""
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted."
    text = " ".join(str(error).split())
    if isinstance(error, _EXPECTED):
        return f"Error: {text or type(error).__name__}"
    return f"Error: {type(error).__name__}: {text} (`bpkit --debug ...` shows where this comes from)"


def require(module: str, *, extra: str, purpose: str) -> None:
    """Raise MissingExtra unless an optional dependency is installed."""
    if importlib.util.find_spec(module) is None:
        raise MissingExtra(f"{purpose} needs {module}, which is not installed: pip install 'bpkit[{extra}]'")


class ExplainingGroup(TyperGroup):
    """Commands whose errors, also those of plug-in commands, end in a paragraph and an exit code."""

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
            else:
                say(explain(error))
            raise typer.Exit(exit_code(error)) from None
