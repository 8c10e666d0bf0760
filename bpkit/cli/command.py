"""Commands and groups whose help names values by what they are: flags take none, `N` is a number, `FILE` a file.

Typer prints the Python type instead, such as `<bool>` and `<int range>`, and has no hook for another class of options.
So options and arguments are given ours where a command is asked for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

_KINDS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


class Argument(TyperArgument):
    """An argument called `NAME`, in brackets where it may be left out, as manuals do."""

    @property
    def display_name_raw(self) -> str:
        return self.metavar or self.name.upper()

    def display_type_rich(self, ctx: Any) -> str | None:
        return None

    def get_usage_pieces(self, ctx: Any) -> list[str]:
        name = self.display_name_raw + ("..." if self.nargs != 1 else "")
        return [name if self.required else f"[{name}]"]


class Option(TyperOption):
    """An option with what it takes; a flag takes nothing."""

    def display_type_rich(self, ctx: Any) -> str | None:
        if self.is_flag:
            return None
        if self.metavar:
            return str(self.metavar)
        described = self.type_descriptor
        if described.is_choice:
            return "|".join(str(getattr(choice, "value", choice)) for choice in described.choices or ())
        return _KINDS.get(next(iter(get_args(described.annotation)), described.annotation), "VALUE")


def named_by_kind(parameters: list[Any]) -> list[Any]:
    """The same parameters, of the classes above."""
    for parameter in parameters:
        if type(parameter) is TyperArgument:
            parameter.__class__ = Argument
        elif type(parameter) is TyperOption:
            parameter.__class__ = Option
    return parameters


class Command(TyperCommand):
    """A command with such help."""

    def get_params(self, ctx: Any) -> list[Any]:
        return named_by_kind(super().get_params(ctx))


class Group(TyperGroup):
    """A group with such help, also of the commands in it that plug-ins made."""

    def get_params(self, ctx: Any) -> list[Any]:
        return named_by_kind(super().get_params(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return dressed(super().get_command(ctx, cmd_name))


def dressed(command: Any) -> Any:
    """The same command or group, of the classes above unless it has one of its own."""
    if type(command) is TyperCommand:
        command.__class__ = Command
    elif type(command) is TyperGroup:
        command.__class__ = Group
    return command
