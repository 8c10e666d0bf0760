"""`bpkit policies` and `bpkit drafters`: what the installed plug-ins offer. Neither imports torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from bpkit.cli.terminal import console
from bpkit.policy import PolicyError
from bpkit.registry import Entry, find, registry

_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def policies(
    name: Annotated[str | None, typer.Argument(help="Show the options of this policy in full.")] = None,
    as_json: _AsJson = False,
) -> None:
    """List the policies: what each decides and when, its options, and which distribution it comes from.

    Examples: `bpkit policies`, `bpkit policies threshold`, `bpkit policies --json`
    """
    _list("policies", registry().policies, name, what="policy", as_json=as_json)


def drafters(
    name: Annotated[str | None, typer.Argument(help="Show the options of this drafter in full.")] = None,
    as_json: _AsJson = False,
) -> None:
    """List the kinds of drafters. A drafter is named by its folder or Hub name, or by one of these.

    Examples: `bpkit drafters`, and then `bpkit generate --drafter ngram:max_ngram=4 "1, 2, 3, 1, 2,"`
    """
    _list("drafters", registry().drafters, name, what="drafter", as_json=as_json)


def _list(title: str, entries: Mapping[str, Entry], name: str | None, *, what: str, as_json: bool) -> None:
    chosen = [find(entries, name, what=what)] if name else [entries[n] for n in sorted(entries)]
    failures = dict(registry().failures)
    described = []
    for entry in chosen:
        try:
            described.append(describe(entry))
        except PolicyError as error:
            failures[entry.name] = str(error)
    if as_json:
        typer.echo(json.dumps({title: described, "failures": failures}, indent=2))
        return
    console().print(_table(title, described, in_full=name is not None))
    for plugin, reason in sorted(failures.items()):
        console().print(f"[bold red]not loaded[/] [bold]{escape(plugin)}[/]: {escape(reason)}")


def describe(entry: Entry) -> dict[str, Any]:
    """An entry as plain JSON values. Raises PolicyError if its options cannot be imported."""
    config = entry.load_config()
    fields = config.model_fields if config else {}
    defaults = {n: f.get_default(call_default_factory=True) for n, f in fields.items()}
    return {
        "name": entry.name,
        "summary": entry.summary,
        "options": {
            n: {"default": list(d) if isinstance(d, tuple) else d, "description": fields[n].description or ""}
            for n, d in defaults.items()
        },
        "plugin": entry.plugin,
        "distribution": entry.distribution,
    }


def _table(title: str, entries: list[dict[str, Any]], *, in_full: bool) -> Table:
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("what it decides, and when" if title == "policies" else "what it is")
    table.add_column("options and defaults")
    table.add_column("distribution")
    for entry in entries:
        options = [_option(n, o["default"]) for n, o in entry["options"].items()]
        if in_full:
            texts = (o["description"] for o in entry["options"].values())
            options = [f"{option}\n  {text}" for option, text in zip(options, texts, strict=True)]
        table.add_row(
            *(escape(t) for t in (entry["name"], entry["summary"])),
            escape("\n".join(options)),
            escape(entry["distribution"]),
        )
    return table


def _option(name: str, default: Any) -> str:
    """An option with its default as it would be typed."""
    return f"{name} (unset)" if default is None else f"{name}={_typed(default)}"


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
