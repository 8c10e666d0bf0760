"""`bpkit hooks`: every hook, what it is for, and which plug-ins implement it, in the order of calls."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any

import pluggy
import typer
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bpkit.cli import completion
from bpkit.cli.plugins import SCHEMA_VERSION, conflicts, say_what_is_missing
from bpkit.cli.terminal import console
from bpkit.registry import hookspecs
from bpkit.registry.discovery import Registry, registry


def hooks(
    name: Annotated[
        str | None, typer.Argument(help="Show only this hook.", autocompletion=completion.hook_names)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the hooks, and which plug-ins implement each.

    With exact arguments, what each hook is for, and the plug-ins in the order in which they are called.

    `bpkit hooks`

    `bpkit hooks bpkit_register_policies`

    Next: `bpkit new` starts a distribution with a plug-in in it.
    """
    known = registry()
    if name is not None:
        hookspecs.check_hook_name(name)
    found = [describe_hook(hook, known) for hook in ([name] if name is not None else hookspecs.hook_arguments())]
    if as_json:
        plugins = [describe_plugin(plugin, known) for plugin in known.plugins]
        report = {"schema_version": SCHEMA_VERSION, "hooks": found, "plugins": plugins}
        missing = {"failures": known.failures, "disabled": known.disabled, "conflicts": conflicts(known)}
        typer.echo(json.dumps({**report, **missing}, indent=2))
        return
    console().print(_table(found))
    say_what_is_missing(known.failures, known)


def describe_hook(hook: str, known: Registry) -> dict[str, Any]:
    """A hook and its implementations in the order of calls, as plain JSON values."""
    return {
        "name": hook,
        "arguments": list(hookspecs.hook_arguments()[hook]),
        "purpose": " ".join((inspect.getdoc(getattr(hookspecs, hook)) or "").split()),
        "implementations": [_describe_call(one, known) for one in known.calls(hook)],
    }


def _describe_call(implementation: pluggy.HookImpl, known: Registry) -> dict[str, Any]:
    function = implementation.function
    return {
        **describe_plugin(implementation.plugin_name, known),
        "function": f"{function.__module__}:{function.__qualname__}",
        "tryfirst": implementation.tryfirst,
        "trylast": implementation.trylast,
    }


def describe_plugin(name: str, known: Registry) -> dict[str, Any]:
    """A plug-in by name, as plain JSON values; one that is not installed as a plug-in has no distribution."""
    plugin = known.plugins.get(name)
    return {
        "plugin": name,
        "module": plugin.module if plugin else None,
        "distribution": (plugin.distribution or None) if plugin else None,
        "version": (plugin.version or None) if plugin else None,
    }


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table(title="hooks", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("hook and what it is for", overflow="fold", ratio=1)
    table.add_column("plug-ins, in the order of calls", overflow="fold", ratio=1)
    for hook in found:
        told = Text(f"{hook['name']}({', '.join(hook['arguments'])})", style="bold")
        told.append(f"\n{hook['purpose']}\n", style="not bold")
        table.add_row(told, escape("\n".join(_line(one) for one in hook["implementations"]) or "none"))
    return table


def _line(one: dict[str, Any]) -> str:
    origin = f"{one['distribution']} {one['version']}" if one["distribution"] else "not installed"
    marks = "".join(f", {mark}" for mark in ("tryfirst", "trylast") if one[mark])
    return f"{one['plugin']} ({origin}, {one['module']}{marks})"
