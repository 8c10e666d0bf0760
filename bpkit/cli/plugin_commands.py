"""Commands that plug-ins add to the command line. One that fails is noted, adds nothing and takes nobody along."""

from __future__ import annotations

from typing import Any

import typer
from typer.main import get_command_name
from typer.models import DefaultPlaceholder

from bpkit.registry.discovery import Registry, call

HOOK = "bpkit_register_commands"


def add_plugin_commands(app: typer.Typer, known: Registry) -> None:
    """Let each plug-in add its commands, in the order of hook calls; one that comes first stands first in the help."""
    whose = dict.fromkeys(_names(app), "bpkit itself")
    for implementation in known.calls(HOOK):
        plugin = implementation.plugin_name
        if plugin in known.failures:
            continue
        before = _Kept(app)
        try:
            call(implementation, app=app)
            for name in (added := before.added(app)):
                if name in whose or added.count(name) > 1:
                    raise ValueError(f"command {name!r} is there already, of {whose.get(name, 'this plug-in')}")
            if app.registered_callback is not before.callback:
                raise ValueError("it replaced the options before the command")
        except (Exception, SystemExit) as error:
            before.restore(app)
            known.failures[plugin] = f"its commands: {type(error).__name__}: {error}"
        else:
            before.give_panel(app, f"Plug-in {plugin}")
            whose.update(dict.fromkeys(added, f"plug-in {plugin!r}"))


class _Kept:
    """What a Typer app held before a plug-in was handed it."""

    def __init__(self, app: typer.Typer) -> None:
        self.commands, self.groups = list(app.registered_commands), list(app.registered_groups)
        self.callback: Any = app.registered_callback

    def added(self, app: typer.Typer) -> list[str]:
        """Names of commands and groups that came after."""
        return [_name(one) for one in self._new(app)]

    def give_panel(self, app: typer.Typer, title: str) -> None:
        """Put those that came after into a panel of the help, unless they asked for one."""
        for one in self._new(app):
            if isinstance(one.rich_help_panel, DefaultPlaceholder) or one.rich_help_panel is None:
                one.rich_help_panel = title

    def _new(self, app: typer.Typer) -> list[Any]:
        old = {id(one) for one in (*self.commands, *self.groups)}
        return [one for one in (*app.registered_commands, *app.registered_groups) if id(one) not in old]

    def restore(self, app: typer.Typer) -> None:
        app.registered_commands[:], app.registered_groups[:] = self.commands, self.groups
        app.registered_callback = self.callback


def _names(app: typer.Typer) -> list[str]:
    return [_name(one) for one in (*app.registered_commands, *app.registered_groups)]


def _name(one: Any) -> str:
    """What users type for a command or a group of Typer."""
    if isinstance(one.name, str):
        return one.name
    inner = getattr(one, "typer_instance", None)
    if inner is not None and isinstance(inner.info.name, str):
        return inner.info.name
    callback = one.callback if inner is None else getattr(inner.registered_callback, "callback", None)
    return get_command_name(getattr(callback, "__name__", ""))
