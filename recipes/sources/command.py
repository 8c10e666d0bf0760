"""The command that sums up what several sources of drafts gain."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bpkit.cli.outputs import portable
from bpkit.cli.terminal import say
from bpkit.files import check_writable, write_json

_OF_PAIR = "Of a pair, as NAME=FILE; repeat for more pairs."


def sources_summary(
    out: Annotated[Path, typer.Option("--json", help="Where all of it goes.", metavar="FILE")],
    live: Annotated[list[str], typer.Option(help=f"Of `bpkit bench`. {_OF_PAIR}", metavar="NAME=FILE")],
    replay: Annotated[
        list[str], typer.Option(help=f"Of `bpkit evaluate` on test prompts. {_OF_PAIR}", metavar="NAME=FILE")
    ],
    single: Annotated[
        list[str],
        typer.Option(help="The best fixed size of a source, as in the bench.", metavar="NAME=SPEC"),
    ],
    rule: Annotated[list[str], typer.Option(help="A fixed rule, as in the bench.", metavar="NAME=SPEC")],
    last_pass: Annotated[Path, typer.Option(help="Of `bench-digits`.", metavar="FILE", exists=True, dir_okay=False)],
    rows: Annotated[
        list[str] | None, typer.Option(help=f"Of `bpkit bench --batch-size N`. {_OF_PAIR}", metavar="NAME=FILE")
    ] = None,
    method: Annotated[str, typer.Option(help="The policy that is judged, as in the bench.")] = "portfolio",
) -> None:
    """Sum up what a policy that picks among sources gains.

    Over the best single source and size and over fixed rules, live and by replay, by kind of text. The best single one
    is the evaluation's, chosen on validation prompts.

    `bpkit --plugin recipes sources-summary --live smollm2=live.json --replay smollm2=replay.json ... --json out.json`
    """
    from recipes.sources.summary import Pair, summarise

    check_writable(out, suffixes=(".json",))
    of_replay, of_rows = _by_name(replay), _by_name(rows or [])
    pairs = {
        name: Pair(
            _read(file),
            _read(of_rows[name]) if name in of_rows else None,
            _read(of_replay[name]),
            _all_of(single, name),
            _all_of(rule, name),
        )
        for name, file in _by_name(live).items()
    }
    write_json(out, {"command": portable(sys.argv[1:]), **summarise(pairs, method, _read(str(last_pass)))})
    say(f"wrote {out}")


def _by_name(given: list[str]) -> dict[str, str]:
    """Values by the name before the first `=`. Raises ValueError where there is none."""
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals:
            raise ValueError(f"{one!r}: write NAME=FILE")
        found[name] = value
    return found


def _all_of(given: list[str], name: str) -> list[str]:
    return [value for key, _, value in (one.partition("=") for one in given) if key == name]


def _read(file: str) -> Any:
    return json.loads(Path(file).read_text(encoding="utf-8"))
