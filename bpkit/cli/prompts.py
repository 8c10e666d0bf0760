"""`bpkit prompts`: prompts to train policies on, so that those that ship are left for judging."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bpkit.cli.errors import nothing_written, when_interrupted
from bpkit.cli.terminal import say

_SOURCES = "Where prompts come from; one or more"


def prompts(
    out: Annotated[
        Path, typer.Option(help="JSONL with `id`, `domain` and `prompt`, for `bpkit trace`.", metavar="FILE")
    ],
    maths: Annotated[
        Path | None,
        typer.Option(
            help="JSONL with `question` and `answer`, such as the training questions of GSM8K.",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            rich_help_panel=_SOURCES,
        ),
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(
            help="Functions and classes of an installed Python package, such as transformers, or of a folder.",
            metavar="PACKAGE|FOLDER",
            rich_help_panel=_SOURCES,
        ),
    ] = None,
    structured: Annotated[
        int,
        typer.Option(
            help="JSON, tables and logs: documents to generate and to draw from.",
            min=0,
            metavar="N",
            rich_help_panel=_SOURCES,
        ),
    ] = 0,
    structured_seed: Annotated[
        int | None,
        typer.Option(help="Of the generated documents; by default --seed.", metavar="N", rich_help_panel=_SOURCES),
    ] = None,
    count: Annotated[int, typer.Option(help="Prompts of each domain.", min=1)] = 600,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    parts: Annotated[int, typer.Option(help="Files of equal size, numbered from 0.", min=1)] = 1,
) -> None:
    """Make prompts to train policies on.

    Openings of questions, definitions and records, the domains in turn, so that those that ship are left for judging.
    None begins like a prompt that ships with bpkit, and no two begin alike: others are drawn in the place of such. The
    same arguments and sources give the same file.

    `bpkit prompts --out prompts.jsonl --maths gsm8k_train.jsonl --code transformers --structured 700`

    Next: `bpkit trace --out TRACE --prompts prompts.jsonl`
    """
    from bpkit.cli.models import quiet_libraries

    quiet_libraries()
    from bpkit.judge.wall_clock.report import check_writable
    from bpkit.learn.training.policy_prompts import Sources, draw_prompts, package_version, write_prompts

    check_writable(out, suffixes=(".jsonl",))
    records_seed = seed if structured_seed is None else structured_seed
    with when_interrupted(nothing_written(out)):
        drawn = draw_prompts(Sources(maths, code, structured, records_seed), count=count, seed=seed)
    arguments = {
        "maths": maths,
        "code": code if code is None else Path(code).name,
        "code_version": package_version(code),
        "structured": structured,
        "structured_seed": records_seed,
        "count": count,
        "seed": seed,
        "parts": parts,
    }
    files = write_prompts(drawn, out, parts=parts, arguments=arguments)
    say(
        f"wrote {', '.join(map(str, files))}: {count} prompts each of {', '.join(drawn.fingerprints)}. Replaced: "
        f"{drawn.repeats} that began like another, {drawn.shipped} like a shipped one."
    )
    say(f"Next: bpkit trace --out TRACE --prompts {files[0]}")
