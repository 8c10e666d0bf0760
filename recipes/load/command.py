"""Commands on policies under load: prompts to judge them on, a table to set, and all figures in one file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from bpkit.cli.errors import nothing_written, when_interrupted
from bpkit.cli.outputs import portable
from bpkit.cli.terminal import say
from bpkit.files import check_writable, write_json
from recipes.real.command import named_files


def load_prompts(
    out: Annotated[
        Path, typer.Option(help="Folder for `pair.jsonl`, `real.jsonl` and their provenance.", metavar="FOLDER")
    ],
    maths: Annotated[
        Path,
        typer.Option(
            help="JSONL with `question`: the test split of GSM8K, or its first 400 lines.",
            metavar="FILE",
            exists=True,
            dir_okay=False,
        ),
    ],
    maths_train: Annotated[
        Path,
        typer.Option(help="JSONL with `question`: its training split.", metavar="FILE", exists=True, dir_okay=False),
    ],
    code: Annotated[
        list[str] | None,
        typer.Option(
            help="Installed Python package, or a folder, to draw definitions and prose from; repeat. By default "
            "networkx, rich, click and jinja2.",
            metavar="PACKAGE|FOLDER",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", min=0)] = 0,
) -> None:
    """Make prompts to judge policies under load on.

    `pair.jsonl` is for the shipped pair, `real.jsonl` for a model that chats; each has a `validation` and a `test`
    split. None begins like another, like a shipped prompt, or like one that a shipped model learned from. The same
    arguments and sources give the same files.

    `bpkit --plugin recipes load-prompts --out load --maths test.jsonl --maths-train train.jsonl`

    Next: `bpkit trace --prompts load/pair.jsonl --out TRACE`
    """
    from recipes.load.prompts import PACKAGES, LoadSources, load_prompts, write_sets

    sources = LoadSources(maths, maths_train, tuple(code or PACKAGES))
    with when_interrupted(nothing_written(out)):
        sets = load_prompts(sources, seed=seed)
    for file, found, fingerprint in write_sets(sets, out, sources, seed=seed):
        say(f"wrote {file}: {found} prompts, SHA-256 {fingerprint}")
    say(f"Next: bpkit trace --prompts {out / 'pair.jsonl'} --out TRACE")


def load_table(
    evaluation: Annotated[
        Path, typer.Argument(help="JSON of `bpkit evaluate-load`, on validation prompts.", exists=True, dir_okay=False)
    ],
) -> None:
    """Print the best fixed size of each load as a policy `batch_table`.

    `bpkit --plugin recipes load-table validation.json`
    """
    from recipes.load.summary import table_of

    print(table_of(json.loads(evaluation.read_bytes())))


def load_summary(
    out: Annotated[Path, typer.Option("--json", help="Where all of it goes.", metavar="FILE")],
    run: Annotated[
        list[str], typer.Option(help="JSON of `bpkit evaluate-load`, by name; repeat.", metavar="NAME=FILE")
    ],
    policy: Annotated[str, typer.Option(help="That the headline is of.", metavar="NAME")] = "joint",
) -> None:
    """Sum up what policies are worth under load, of several costs.

    `bpkit --plugin recipes load-summary --json load.json --run h100=h100.json --run cpu=cpu.json`
    """
    from recipes.load.summary import summarise

    check_writable(out, suffixes=(".json",))
    runs = {name: json.loads(file.read_bytes()) for name, file in named_files(run).items()}
    report = summarise(runs, policy)
    write_json(out, {"command": portable(sys.argv[1:]), **report})
    say(f"wrote {out}")
    say(json.dumps(report["headline"], indent=2))
