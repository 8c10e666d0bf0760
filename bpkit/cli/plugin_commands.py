"""Commands that plug-ins add to the command line. One that fails is noted, adds nothing and takes nobody along."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer
from typer.main import get_group
from typer.models import DefaultPlaceholder

from bpkit.registry.discovery import Registry, call

HOOK = "bpkit_register_commands"


def add_plugin_commands(app: typer.Typer, known: Registry, *, own: Iterable[str]) -> None:
    """Let each plug-in make its commands, in the order of hook calls, and add them to those of bpkit, called `own`."""
    whose = dict.fromkeys(own, "of bpkit itself")
    for implementation in known.calls(HOOK):
        plugin, made = implementation.plugin_name, typer.Typer()
        try:
            call(implementation, app=made)
            names = _checked_names(made, whose)
        except (Exception, SystemExit) as error:
            known.fail(plugin, f"its commands: {type(error).__name__}: {error}")
            continue
        added: list[Any] = [*made.registered_commands, *made.registered_groups]
        for one in added:
            if isinstance(one.rich_help_panel, DefaultPlaceholder) or one.rich_help_panel is None:
                one.rich_help_panel = f"Plug-in {plugin}"
        app.registered_commands += made.registered_commands
        app.registered_groups += made.registered_groups
        whose.update(dict.fromkeys(names, f"of plug-in {plugin!r}"))


def _checked_names(made: typer.Typer, whose: dict[str, str]) -> list[str]:
    """The names of what a plug-in made. Raises ValueError if they will not do."""
    if made.registered_callback is not None:
        raise ValueError("it replaced the options before the command")
    names = list(get_group(made).commands)
    if len(names) < len(made.registered_commands) + len(made.registered_groups):
        raise ValueError("it has two commands of one name")
    for name in names:
        if name in whose:
            raise ValueError(f"command {name!r} is there already, {whose[name]}")
    return names
