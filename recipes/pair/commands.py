"""Commands that make the shipped pair again: prompts to train drafters and policies on, and the target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bpkit.cli import options, outputs
from bpkit.cli.errors import checkpoint_in, nothing_written, require, when_interrupted
from bpkit.cli.terminal import say

_SOURCES = "Where prompts come from; one or more"
_Maths = Annotated[
    Path | None,
    typer.Option(
        help="JSONL with `question` and `answer` (the layout of GSM8K); without it that domain is left out.",
        metavar="FILE",
        exists=True,
        dir_okay=False,
    ),
]


@options.takes(run=options.model_run)
def train_target(
    out: options.Out,
    maths: _Maths = None,
    layers: Annotated[int, typer.Option(help="Transformer layers.", min=1)] = 12,
    hidden_size: Annotated[int, typer.Option(help="Width; a multiple of 64.", min=64)] = 256,
    vocab_size: Annotated[int, typer.Option(help="Entries of the BPE tokenizer.", min=300)] = 4096,
    length: Annotated[int, typer.Option(help="Tokens in a training window.", min=2)] = 384,
    batch_size: Annotated[int, typer.Option(help="Windows a step on each device.", min=1)] = 20,
    start_from: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an earlier target to go on from, with its tokenizer.",
            metavar="FOLDER",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    *,
    run: dict[str, Any],
) -> None:
    """Train tokenizer and target from scratch.

    On maths, Python's standard library and generated structured text. Writes a folder; the same command goes on where
    it was interrupted.

    `bpkit --plugin recipes train-target --out runs/target --maths gsm8k_train.jsonl --minutes 75 --compile`

    Next: `bpkit --plugin recipes drafter-prompts --out prompts.jsonl`, and `bpkit train drafter`
    """
    require("lightning", extra="train", purpose="Training")
    from bpkit.cli.models import quiet_libraries
    from bpkit.learn.training.model import ModelRun
    from recipes.pair import target

    quiet_libraries()
    with when_interrupted(checkpoint_in(out)):
        target.train_target(
            out,
            maths=maths,
            run=ModelRun(batch_size=batch_size, **run),
            layers=layers,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            length=length,
            start_from=start_from,
        )
    outputs.say_written(out, f"bpkit train drafter --target {out} --out FOLDER --prompts FILE")


def drafter_prompts(
    out: Annotated[
        Path, typer.Option(help="JSONL with `prompt`, for `bpkit train drafter --prompts`.", metavar="FILE")
    ],
    maths: _Maths = None,
    per_domain: Annotated[int, typer.Option(help="Different openings of each domain.", min=1)] = 2000,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
) -> None:
    """Write the prompts that the shipped drafters learned from.

    Openings of the target's own training text, the domains in turn. The same arguments and sources give the same file.

    `bpkit --plugin recipes drafter-prompts --out prompts.jsonl --maths gsm8k_train.jsonl`

    Next: `bpkit train drafter --target runs/target --prompts prompts.jsonl --out runs/drafter`
    """
    from bpkit.files import check_writable
    from recipes.pair.corpus import training_prompts
    from recipes.pair.policy_prompts import write_jsonl

    check_writable(out, suffixes=(".jsonl",))
    with when_interrupted(nothing_written(out)):
        texts = training_prompts(maths, per_domain=per_domain, seed=seed)
    write_jsonl(({"prompt": text} for text in texts), out)
    say(f"wrote {out}: {len(texts)} prompts")
    say(f"Next: bpkit train drafter --target MODEL --prompts {out} --out FOLDER")


def policy_prompts(
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

    `bpkit --plugin recipes policy-prompts --out prompts.jsonl --code transformers --structured 700`

    Next: `bpkit trace --out TRACE --prompts prompts.jsonl`
    """
    from bpkit.cli.models import quiet_libraries

    quiet_libraries()
    from bpkit.files import check_writable
    from recipes.pair.policy_prompts import PromptSources, draw_prompts, package_version, write_prompts

    check_writable(out, suffixes=(".jsonl",))
    records_seed = seed if structured_seed is None else structured_seed
    with when_interrupted(nothing_written(out)):
        drawn = draw_prompts(PromptSources(maths, code, structured, records_seed), count=count, seed=seed)
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
