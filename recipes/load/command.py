"""The command that makes prompts to judge policies under load on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bpkit.cli.errors import nothing_written, when_interrupted
from bpkit.cli.terminal import say


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
