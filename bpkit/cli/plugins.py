"""`bpkit policies`, `drafters`, `observers` and `hooks`: what the plug-ins offer, and what they are. No torch."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from pydantic_core import to_jsonable_python
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bpkit.cli import completion
from bpkit.cli.terminal import console, text_table
from bpkit.learn.config import TrainedConfig
from bpkit.policy import PolicyError
from bpkit.registry import hookspecs
from bpkit.registry.discovery import Entry, Registry, explain_conflict, registry
from bpkit.registry.policy_folder import shipped_folders

SCHEMA_VERSION = 1
"""Of what `--json` prints."""

_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _name(kind: str) -> Any:
    """The argument of the three lists."""
    return typer.Argument(
        help=f"Show this {kind} alone, and its options in full.", autocompletion=completion.names(kind)
    )


def policies(name: Annotated[str | None, _name("policy")] = None, as_json: _AsJson = False) -> None:
    """List the policies, with their options and where they come from.

    With a name: what each option is. Options are given as `name:value` for the first one, or `name:key=value,...`.

    `bpkit policies`

    `bpkit policies threshold`

    Next: `bpkit generate --policy threshold:0.6 ...`, or `bpkit bench --policy ...` to compare some.
    """
    _list("policy", name, as_json)


def drafters(name: Annotated[str | None, _name("drafter")] = None, as_json: _AsJson = False) -> None:
    """List the kinds of drafters, with their options.

    A drafter is named by its folder or Hub name, from which its kind follows, or by one of these names.

    `bpkit drafters`

    `bpkit drafters ngram`

    Next: `bpkit generate --drafter ngram:max_ngram=4 "1, 2, 3, 1, 2,"`
    """
    _list("drafter", name, as_json)


def observers(name: Annotated[str | None, _name("observer")] = None, as_json: _AsJson = False) -> None:
    """List the observers, which are told of every step.

    They are for metrics and logs; `generate` and `bench` take them.

    `bpkit observers`

    `bpkit observers jsonl`

    Next: `bpkit generate --observe jsonl:path=steps.jsonl "def area(r):"`
    """
    _list("observer", name, as_json)


def hooks(
    name: Annotated[
        str | None,
        typer.Argument(help="Show only this hook.", autocompletion=lambda: list(hookspecs.hook_arguments())),
    ] = None,
    as_json: _AsJson = False,
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
    found = [_describe_hook(hook, known) for hook in ([name] if name is not None else hookspecs.hook_arguments())]
    if as_json:
        return _print_json({"hooks": found, "plugins": [_describe_plugin(one, known) for one in known.plugins]}, known)
    table = text_table("hook and what it is for", "plug-ins, in the order of calls", title="hooks")
    for column in table.columns:
        column.ratio, column.no_wrap, column.style = 1, False, ""
    for hook in found:
        told = Text(f"{hook['name']}({', '.join(hook['arguments'])})", style="bold")
        told.append(f"\n{hook['purpose']}\n", style="not bold")
        table.add_row(told, escape("\n".join(map(_implementation, hook["implementations"])) or "none"))
    console().print(table)
    _say_what_is_missing(known.failures, known)


_ABOUT = {
    "policy": ("policies", "--policy", "what it decides, and when"),
    "drafter": ("drafters", "--drafter", "what it is"),
    "observer": ("observers", "--observe", "what it does"),
}
"""Of each kind: what several are called, the option that takes one, and what a summary says."""


def _list(kind: str, name: str | None, as_json: bool) -> None:
    known = registry()
    entries = known.of_kind(kind)
    failures, described = dict(known.failures), []
    for entry in [known.find(kind, name)] if name else [entries[n] for n in sorted(entries)]:
        try:
            described.append(describe(entry, kind))
        except PolicyError as error:
            failures[entry.name] = str(error)
    if as_json:
        return _print_json({_ABOUT[kind][0]: described}, known, failures)
    if name is None or not described:
        console().print(_table(kind, described))
    else:
        _print_one(kind, described[0])
    _say_what_is_missing(failures, known)


def _print_json(what: dict[str, Any], known: Registry, failures: Mapping[str, str] | None = None) -> None:
    missing = {"failures": known.failures if failures is None else failures, "disabled": known.disabled}
    report = {"schema_version": SCHEMA_VERSION, **what, **missing, "conflicts": _conflicts(known)}
    typer.echo(json.dumps(report, indent=2))


def _say_what_is_missing(failures: Mapping[str, str], known: Registry) -> None:
    """A line for each plug-in that failed or is disabled, and for each name that two claim."""
    for plugin, reason in sorted(failures.items()):
        console().print(f"[bold red]not loaded[/] [bold]{escape(plugin)}[/]: {escape(reason)}")
    for text in _conflicts(known):
        console().print(f"[bold red]claimed twice[/] {escape(text)}")
    for plugin, how in sorted(known.disabled.items()):
        console().print(f"[yellow]disabled[/] [bold]{escape(plugin)}[/] by {escape(how)}")


def _conflicts(known: Registry) -> list[str]:
    return [explain_conflict(kind, claimed) for (kind, _), claimed in sorted(known.conflicts.items())]


def describe(entry: Entry, kind: str = "policy") -> dict[str, Any]:
    """An entry as plain JSON values; docs/plugins.md has the keys. Raises PolicyError if its options do not load."""
    config = entry.load_config()
    options = {}
    for name, field in (config.model_fields if config else {}).items():
        required, said = field.is_required(), field.description or ""
        default = None if required else field.get_default(call_default_factory=True)
        options[name] = {"default": to_jsonable_python(default), "required": required, "description": said}
    described: dict[str, Any] = {"name": entry.name, "summary": entry.summary, "options": options}
    if kind == "policy":
        trainable = config is not None and issubclass(config, TrainedConfig)
        weights = [one.name for one in shipped_folders(entry.name)] if trainable else []
        described |= {"trainable": trainable, "weights": weights}
    origin = {"plugin": entry.plugin, "distribution": entry.distribution or None, "version": entry.version or None}
    return {**described, **origin}


def _table(kind: str, entries: list[dict[str, Any]]) -> Table:
    """A row for each, with its options and defaults below what it is."""
    title, _, told_of = _ABOUT[kind]
    table = text_table("name", f"{told_of} (options and defaults)", "from", title=title)
    for entry in entries:
        options = ", ".join(_option(n, o["default"], o["required"]) for n, o in entry["options"].items())
        told = Text(entry["summary"])
        if options:
            told.append(f"\n{options}", style="dim")
        table.add_row(escape(entry["name"]), told, escape(_origin(entry)))
    return table


def _print_one(kind: str, entry: dict[str, Any]) -> None:
    """Everything about one: what it is, where it comes from, each option, and how it is asked for."""
    out, flag = console(), _ABOUT[kind][1]
    out.print(f"[bold]{escape(entry['name'])}[/] [dim]from {escape(_origin(entry))}[/]", soft_wrap=True)
    out.print(escape(entry["summary"]), soft_wrap=True)
    if entry.get("weights"):
        out.print(escape(f"Weights that ship: {', '.join(entry['weights'])}"), soft_wrap=True)
    if not entry["options"]:
        out.print(f"\nIt has no options: {flag} {escape(entry['name'])}", soft_wrap=True)
        return
    table = text_table("option", "default", "what it is")
    for name, option in entry["options"].items():
        unset = "required" if option["required"] else "unset"
        default = unset if option["default"] in (None, "") else _typed(option["default"])
        table.add_row(escape(name), escape(default), escape(option["description"]))
    out.print(table)
    asked = f"{entry['name']}:{next(iter(entry['options']))}=VALUE"
    out.print(escape(f"Give options as {flag} {asked}, with commas between them."), soft_wrap=True)


def _origin(entry: dict[str, Any]) -> str:
    return entry["distribution"] or f"{entry['plugin']} (not installed)"


def _option(name: str, default: Any, required: bool) -> str:
    """An option with its default as it would be typed; the name alone if nothing is set."""
    if default in (None, ""):
        return f"{name} (required)" if required else name
    return f"{name}={_typed(default)}"


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _describe_hook(hook: str, known: Registry) -> dict[str, Any]:
    """A hook and its implementations in the order of calls, as plain JSON values."""
    return {
        "name": hook,
        "arguments": list(hookspecs.hook_arguments()[hook]),
        "purpose": " ".join((inspect.getdoc(getattr(hookspecs, hook)) or "").split()),
        "implementations": [
            {
                **_describe_plugin(one.plugin_name, known),
                "function": f"{one.function.__module__}:{one.function.__qualname__}",
                "tryfirst": one.tryfirst,
                "trylast": one.trylast,
            }
            for one in known.calls(hook)
        ],
    }


def _describe_plugin(name: str, known: Registry) -> dict[str, Any]:
    """A plug-in by name, as plain JSON values; one that is not installed as a plug-in has no distribution."""
    plugin = known.plugins.get(name)
    facts = ("module", "distribution", "version")
    return {"plugin": name, **{fact: getattr(plugin, fact, None) or None for fact in facts}}


def _implementation(one: dict[str, Any]) -> str:
    origin = f"{one['distribution']} {one['version']}" if one["distribution"] else "not installed"
    marks = "".join(f", {mark}" for mark in ("tryfirst", "trylast") if one[mark])
    return f"{one['plugin']} ({origin}, {one['module']}{marks})"
