"""Commands that judge policies on a real model: its prompts, and all figures in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bpkit.cli.errors import nothing_written, when_interrupted
from bpkit.cli.terminal import say
from bpkit.files import check_writable
from recipes.pair.policy_prompts import write_jsonl


def real_prompts(
    out: Annotated[
        Path, typer.Option(help="JSONL for `--prompts`, and for `--split` of `bpkit evaluate`.", metavar="FILE")
    ],
    maths: Annotated[
        Path,
        typer.Option(
            help="JSONL with `question`: the test split of GSM8K, or a part that holds the questions wanted.",
            metavar="FILE",
            exists=True,
            dir_okay=False,
        ),
    ],
    maths_train: Annotated[
        Path,
        typer.Option(help="JSONL with `question`: its training split.", metavar="FILE", exists=True, dir_okay=False),
    ],
    closed: Annotated[
        bool, typer.Option("--closed", help="Write the second test instead, which is to be opened once.")
    ] = False,
) -> None:
    """Write the prompts of five kinds that policies are judged on with a real model.

    Chat, maths, code, rewriting and conversion; each line has its kind as `domain` and its `split`. Questions of
    GSM8K are at https://github.com/openai/grade-school-math.

    `bpkit --plugin recipes real-prompts --out real.jsonl --maths test.jsonl --maths-train train.jsonl`

    Next: `bpkit trace --target smollm2 --prompts real.jsonl --out TRACE`
    """
    from recipes.real.prompts import real_prompts as chosen

    check_writable(out, suffixes=(".jsonl",))
    with when_interrupted(nothing_written(out)):
        prompts = chosen(maths, maths_train, closed=closed)
    keys = ("id", "domain", "split")
    write_jsonl(({**{k: getattr(p, k) for k in keys}, "chat": True, "prompt": p.text} for p in prompts), out)
    say(f"wrote {out}: {len(prompts)} prompts")
    say(f"Next: bpkit trace --target smollm2 --prompts {out} --out TRACE")
