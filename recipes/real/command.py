"""Commands that judge policies on a real model: its prompts, and all figures in one file."""

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
    """Write prompts of five kinds to judge policies on a real model.

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


def real_summary(
    out: Annotated[Path, typer.Option("--json", help="Where all of it goes.", metavar="FILE")],
    peers: Annotated[Path, typer.Option(help="Of `bench-peers`.", metavar="FILE", exists=True, dir_okay=False)],
    evaluation: Annotated[
        list[str], typer.Option(help="Of `bpkit evaluate` on test prompts, by drafter; repeat.", metavar="DRAFTER=FILE")
    ],
    selection: Annotated[
        list[str],
        typer.Option(
            help="The same with validation prompts in the place of test prompts: what is called best is chosen here.",
            metavar="DRAFTER=FILE",
        ),
    ],
) -> None:
    """Sum up what was measured on a real model.

    Policies and bounds by replay, overall and by kind, beside what was timed; the best fixed size and the best policy
    of all drafters are chosen on validation prompts.

    `bpkit --plugin recipes real-summary --json real.json --peers p.json --evaluation ngram=e --selection ngram=s`
    """
    from recipes.real.summary import summarise

    check_writable(out, suffixes=(".json",))
    evaluations, selections = (
        {name: json.loads(file.read_bytes()) for name, file in named_files(given).items()}
        for given in (evaluation, selection)
    )
    report = summarise(json.loads(peers.read_bytes()), evaluations, selections)
    write_json(out, {"command": portable(sys.argv[1:]), **report})
    say(f"wrote {out}")
    say(json.dumps(report["headline"], indent=2))


def named_files(given: list[str]) -> dict[str, Path]:
    """Files by what stands before `=`. Raises ValueError."""
    pairs = [text.partition("=")[::2] for text in given]
    for (name, file), text in zip(pairs, given, strict=True):
        if not name or not Path(file).is_file():
            raise ValueError(f"{text}: write a drafter and a file that is there, such as ngram=evaluation.json")
    return {name: Path(file) for name, file in pairs}
