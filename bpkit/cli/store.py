"""`bpkit store`: n-grams and a corpus for the drafter `hierarchy`, from traces or texts, in a folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bpkit.cli.errors import nothing_written, require, when_interrupted
from bpkit.cli.evaluate import SPLIT_HELP, parse_split
from bpkit.cli.outputs import portable, say_written
from bpkit.cli.terminal import Bar, console, progress_bar, text_table
from bpkit.prompts import read_prompts

if TYPE_CHECKING:
    from bpkit.draft.stores.files import StoreFacts

app = typer.Typer(
    no_args_is_help=True,
    help="""Make and look at stores of n-grams, for the drafter `hierarchy`.

`bpkit store build TRACE --out STORE`
""",
)
_what = partial(typer.Option, rich_help_panel="What it is made from")
_size = partial(typer.Option, rich_help_panel="Size")
NGRAMS, NGRAM_SIZE, MAX_TOKENS = 100_000, 5, 20_000_000


@app.command("build")
def build(
    out: Annotated[Path, typer.Option(help="Folder for the store; one that is there is replaced.", metavar="FOLDER")],
    traces: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of `bpkit trace` of one target, whose outputs are taken.", metavar="TRACE"),
    ] = None,
    texts: Annotated[
        Path | None,
        _what(help="JSONL, or `.txt` with a text on each line, instead of traces; needs --target.", metavar="FILE"),
    ] = None,
    column: Annotated[str, _what(help="Key of the texts in JSONL.", metavar="NAME")] = "text",
    target: Annotated[
        str | None,
        _what(
            help="Whose tokenizer reads the texts: folder or Hub name, or a name from `bpkit models`.", metavar="MODEL"
        ),
    ] = None,
    split: Annotated[
        str | None,
        _what(help=f"Take the training prompts alone. {SPLIT_HELP}", metavar="A,B,C|FILE"),
    ] = None,
    seed: Annotated[int, _what(help="Of the split, as in `bpkit evaluate`.")] = 0,
    ngrams: Annotated[int, _size(help="N-grams that are kept, the commonest.", min=0)] = NGRAMS,
    ngram_size: Annotated[int, _size(help="Tokens of an n-gram.", min=2, max=16)] = NGRAM_SIZE,
    max_tokens: Annotated[
        int, _size(help="More tokens than these are refused; building takes about 150 bytes for each.", min=1)
    ] = MAX_TOKENS,
) -> None:
    """Make a store from a target's answers or other texts.

    Two tables: the n-grams that most of the texts have, and all of the texts with their suffixes in order. What is
    judged must not be in the store: with --split the prompts that `bpkit evaluate` holds out stay out.

    `bpkit store build TRACE --out STORE --split 0.4,0.2,0.4`

    `bpkit store build --texts texts.jsonl --target smollm2 --out STORE`

    Next: `bpkit generate --drafter hierarchy:store=STORE ...`
    """
    if bool(traces) == (texts is not None):
        raise ValueError("name traces, or a file with --texts: one of both")
    if texts is not None and target is None:
        raise ValueError("--texts needs --target: the model whose tokenizer reads the texts")
    from bpkit.cli.models import quiet_libraries
    from bpkit.draft.stores.build import make_tables
    from bpkit.draft.stores.files import check_store_folder, write_store

    quiet_libraries()
    check_store_folder(out)
    with when_interrupted(nothing_written(out / "store.json")), progress_bar() as bar:
        if texts is not None:
            found, facts = of_file(texts, column, str(target), split, seed, bar)
        else:
            require("pyarrow", extra="traces", purpose="A trace")
            found, facts = of_traces(traces or [], target, split, seed, bar)
        count = sum(map(len, found))
        if count > max_tokens:
            raise ValueError(
                f"the texts have {count:,} tokens, and --max-tokens is {max_tokens:,}: take fewer texts or raise it"
            )
        if count == 0:
            raise ValueError("there are no texts to make a store from; with --split, no training prompts are left")
        tables = make_tables(found, vocab_size=facts["vocab_size"], n=ngram_size, most=ngrams, progress=bar)
    sizes = {"texts": len(found), "tokens": count, "n": ngram_size, "ngrams": len(tables.ngrams)}
    made = described(**facts, **sizes, part=part_of(split, seed))
    write_store(out, made, tables)
    say_written(out, f"bpkit generate --drafter hierarchy:store={out} ...")


Found = tuple[list[Sequence[int]], dict[str, Any]]
"""Token ids of each text, and what is known of their origin."""


def of_traces(traces: Sequence[Path], target: str | None, split: str | None, seed: int, bar: Bar) -> Found:
    """The outputs of traces. Raises ValueError if they are of several targets."""
    from bpkit.draft.vocabulary import fingerprint_tokenizer
    from bpkit.trace.store.joined import open_trace

    opened = [open_trace(path) for path in traces]
    targets = {(trace.manifest.target.name, trace.manifest.target.fingerprint) for trace in opened}
    if len(targets) > 1:
        raise ValueError(f"the traces are of several targets ({', '.join(sorted(n for n, _ in targets))}): take one's")
    places = [training(trace.ids, trace.domains, split, seed) for trace in opened]
    bar.start("reading", sum(map(len, places)))
    found: list[Sequence[int]] = []
    for trace, chosen in zip(opened, places, strict=True):
        for place in chosen:
            found.append(trace[place].output_tokens.tolist())
            bar.tick()
    name, fingerprint = targets.pop()
    return found, {
        "target": name,
        "target_fingerprint": fingerprint,
        "tokenizer": fingerprint_tokenizer(folder_of(target or name)),
        "vocab_size": opened[0].spec.vocab_size,
        "source": [f"trace {path.name}" for path in traces],
    }


def of_file(file: Path, column: str, target: str, split: str | None, seed: int, bar: Bar) -> Found:
    """The texts of a file, read by a target's tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    from bpkit.assets import model_name
    from bpkit.draft.vocabulary import fingerprint_tokenizer

    rows = read_prompts(file, column)
    path = folder_of(target)
    tokenizer = AutoTokenizer.from_pretrained(path)
    places = training([row.id for row in rows], [row.domain for row in rows], split, seed)
    bar.start("reading", len(places))
    found: list[Sequence[int]] = []
    for place in places:
        found.append(tokenizer(rows[place].text, add_special_tokens=False)["input_ids"])
        bar.tick()
    return found, {
        "target": model_name(path),
        "tokenizer": fingerprint_tokenizer(path),
        "vocab_size": AutoConfig.from_pretrained(path).get_text_config().vocab_size,
        "source": [f"texts {file.name}"],
    }


def training(ids: Sequence[str], domains: Sequence[str], split: str | None, seed: int) -> Sequence[int]:
    """Places of the texts that go into a store."""
    from bpkit.judge.evaluation.splits import split_prompts

    if split is None:
        return range(len(ids))
    return split_prompts(ids, domains, seed=seed, rule=parse_split(split)).train


def part_of(split: str | None, seed: int) -> str:
    """Which prompts are in the store, in words; of a file of prompts its name."""
    return "all" if split is None else f"train of {Path(split).name}, seed {seed}"


def folder_of(name: str) -> str:
    """What transformers is given for a target as it is called in traces."""
    from bpkit.assets import model_path, shipped

    return str(shipped("target")) if name == "shipped target" else model_path(name)


def described(**facts: Any) -> StoreFacts:
    """The facts of a store that is made now, by this command."""
    import numpy as np

    from bpkit import __version__
    from bpkit.draft.stores.files import StoreFacts
    from bpkit.files import utc

    versions = {"bpkit": __version__, "numpy": np.__version__}
    return StoreFacts(**facts, made=utc(), command=portable(sys.argv[1:]), versions=versions)


@app.command("show")
def show(
    store: Annotated[Path, typer.Argument(help="Folder of `bpkit store build`.", metavar="STORE")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what is in a store and how it came to be.

    `bpkit store show STORE`
    """
    from bpkit.draft.stores.files import open_store
    from bpkit.files import json_text

    facts = open_store(store).facts
    if as_json:
        typer.echo(json_text(facts), nl=False)
        return
    size = sum(file.stat().st_size for file in store.glob("*.npy"))
    rows = {
        "target": f"{facts.target} (weights {facts.target_fingerprint or 'not known'})",
        "tokenizer": f"{facts.tokenizer or 'not known'}, {facts.vocab_size:,} token ids",
        "made from": f"{', '.join(facts.source)}; prompts: {facts.part}",
        "corpus": f"{facts.texts:,} texts, {facts.tokens:,} tokens",
        "n-grams": f"{facts.ngrams:,} of {facts.n} tokens",
        "size": f"{size / 1e6:.1f} MB",
        "made": facts.made,
        "command": facts.command,
        "versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
    }
    table = text_table("", str(store))
    for row in rows.items():
        table.add_row(*row)
    console().print(table)
