"""`bpkit policies`, `bpkit drafters` and `bpkit observers`: what the plug-ins offer. None imports torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bpkit import assets
from bpkit.cli import completion
from bpkit.cli.terminal import console
from bpkit.learn.trained_config import TrainedConfig
from bpkit.policy import PolicyError
from bpkit.registry.discovery import Entry, Registry, explain_conflict, registry
from bpkit.registry.policy_folder import is_policy_folder, read_policy_file

SCHEMA_VERSION = 1
"""Of what `--json` prints."""

_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def policies(
    name: Annotated[
        str | None,
        typer.Argument(help="Show this policy alone, and its options in full.", autocompletion=completion.policy_names),
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """List the policies, with their options and where they come from.

    With a name: what each option is. Options are given as `name:value` for the first one, or `name:key=value,...`.

    `bpkit policies`

    `bpkit policies threshold`

    Next: `bpkit generate --policy threshold:0.6 ...`, or `bpkit bench --policy ...` to compare some.
    """
    _list("policies", registry().policies, name, what="policy", as_json=as_json)


def drafters(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Show this drafter alone, and its options in full.", autocompletion=completion.drafter_names
        ),
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """List the kinds of drafters, with their options.

    A drafter is named by its folder or Hub name, from which its kind follows, or by one of these names.

    `bpkit drafters`

    `bpkit drafters ngram`

    Next: `bpkit generate --drafter ngram:max_ngram=4 "1, 2, 3, 1, 2,"`
    """
    _list("drafters", registry().drafters, name, what="drafter", as_json=as_json)


def observers(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Show this observer alone, and its options in full.", autocompletion=completion.observer_names
        ),
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """List the observers, which are told of every step.

    They are for metrics and logs; `generate` and `bench` take them.

    `bpkit observers`

    `bpkit observers jsonl`

    Next: `bpkit generate --observe jsonl:path=steps.jsonl "def area(r):"`
    """
    _list("observers", registry().observers, name, what="observer", as_json=as_json)


def _list(title: str, entries: Mapping[str, Entry], name: str | None, *, what: str, as_json: bool) -> None:
    known = registry()
    chosen = [known.find(what, name)] if name else [entries[n] for n in sorted(entries)]
    failures = dict(known.failures)
    described = []
    for entry in chosen:
        try:
            described.append(describe(entry, what))
        except PolicyError as error:
            failures[entry.name] = str(error)
    if as_json:
        report = {"schema_version": SCHEMA_VERSION, title: described, "failures": failures}
        typer.echo(json.dumps({**report, "disabled": known.disabled, "conflicts": conflicts(known)}, indent=2))
        return
    if name is None or not described:
        console().print(_table(title, described))
    else:
        _print_one(title, described[0])
    say_what_is_missing(failures, known)


def say_what_is_missing(failures: Mapping[str, str], known: Registry) -> None:
    """A line for each plug-in that failed or is disabled, and for each name that two claim."""
    for plugin, reason in sorted(failures.items()):
        console().print(f"[bold red]not loaded[/] [bold]{escape(plugin)}[/]: {escape(reason)}")
    for text in conflicts(known):
        console().print(f"[bold red]claimed twice[/] {escape(text)}")
    for plugin, how in sorted(known.disabled.items()):
        console().print(f"[yellow]disabled[/] [bold]{escape(plugin)}[/] by {escape(how)}")


def conflicts(known: Registry) -> list[str]:
    """Who claims what twice, and how to settle it."""
    return [explain_conflict(kind, claimed) for (kind, _), claimed in sorted(known.conflicts.items())]


def describe(entry: Entry, what: str = "policy") -> dict[str, Any]:
    """An entry as plain JSON values; docs/plugins.md has the keys. Raises PolicyError if its options do not load."""
    config = entry.load_config()
    described: dict[str, Any] = {"name": entry.name, "summary": entry.summary, "options": _options(config)}
    if what == "policy":
        trainable = config is not None and issubclass(config, TrainedConfig)
        described |= {"trainable": trainable, "weights": shipped_weights(entry.name) if trainable else []}
    origin = {"plugin": entry.plugin, "distribution": entry.distribution or None, "version": entry.version or None}
    return {**described, **origin}


def _options(config: type[BaseModel] | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, field in (config.model_fields if config else {}).items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        options[name] = {
            "default": to_jsonable_python(default),
            "required": field.is_required(),
            "description": field.description or "",
        }
    return options


def shipped_weights(policy: str) -> list[str]:
    """Names of the folders of weights that ship for a policy."""
    folder = Path(assets.__file__).parent / "policies"
    found = [folder / policy, *sorted(folder.glob(f"{policy}-*"))]
    return [one.name for one in found if is_policy_folder(one) and read_policy_file(one).policy == policy]


_TOLD = {"policies": "what it decides, and when", "drafters": "what it is", "observers": "what it does"}
_FLAGS = {"policies": "--policy", "drafters": "--drafter", "observers": "--observe"}


def _table(title: str, entries: list[dict[str, Any]]) -> Table:
    """A row for each, with its options and defaults below what it is."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column(f"{_TOLD[title]} (options and defaults)", overflow="fold")
    table.add_column("from", overflow="fold")
    for entry in entries:
        options = ", ".join(_option(n, o["default"], o["required"]) for n, o in entry["options"].items())
        told = Text(entry["summary"])
        if options:
            told.append(f"\n{options}", style="dim")
        table.add_row(escape(entry["name"]), told, escape(_origin(entry)))
    return table


def _print_one(title: str, entry: dict[str, Any]) -> None:
    """Everything about one: what it is, where it comes from, each option, and how it is asked for."""
    out = console()
    out.print(f"[bold]{escape(entry['name'])}[/] [dim]from {escape(_origin(entry))}[/]", soft_wrap=True)
    out.print(escape(entry["summary"]), soft_wrap=True)
    if entry.get("weights"):
        out.print(escape(f"Weights that ship: {', '.join(entry['weights'])}"), soft_wrap=True)
    if not entry["options"]:
        out.print(f"\nIt has no options: {_FLAGS[title]} {escape(entry['name'])}", soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("option", style="bold", no_wrap=True)
    table.add_column("default", overflow="fold")
    table.add_column("what it is", overflow="fold")
    for name, option in entry["options"].items():
        unset = "required" if option["required"] else "unset"
        default = unset if option["default"] in (None, "") else _typed(option["default"])
        table.add_row(escape(name), escape(default), escape(option["description"]))
    out.print(table)
    asked = f"{entry['name']}:{next(iter(entry['options']))}=VALUE"
    out.print(escape(f"Give options as {_FLAGS[title]} {asked}, with commas between them."), soft_wrap=True)


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
