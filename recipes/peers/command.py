"""`bpkit --plugin recipes bench-peers`: bpkit against other libraries that decode speculatively, on one model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bpkit.assets import drafter_path, model_name, model_path, own_drafter, shipped
from bpkit.cli import options, outputs
from bpkit.cli.errors import when_interrupted
from bpkit.cli.outputs import Outputs, portable
from bpkit.cli.terminal import progress_bar
from bpkit.config import Config
from bpkit.prompts import INSTRUCTIONS, Prompt, choose_prompts, of_domains
from recipes.peers.contestants import ASSISTANT, DFLASH, Contestant, line_up

DEFAULT_LIMIT, DEFAULT_NEW_TOKENS = 4, 64
DEFAULT_PEERS = (
    "transformers-assisted",
    "transformers-assisted:4",
    "transformers-lookup",
    "transformers-lookup:4",
    "transformers-dflash",
    "transformers-dflash:4",
    "flashspec-model",
    "flashspec",
)
FOLDERS = {DFLASH: "drafter", ASSISTANT: "assistant"}
"""What bpkit calls the folders of both kinds."""
DEFAULT_POLICIES = ("fixed:3", "goodput")
_compared = partial(typer.Option, rich_help_panel="Who takes part")
_drafts = partial(typer.Option, rich_help_panel="Draft models", metavar="FOLDER")


def texts(
    domain: options.Domains = None,
    limit: Annotated[
        int | None,
        options.of_prompts(help=f"Prompts of each domain; by default {DEFAULT_LIMIT} of those that ship.", min=1),
    ] = None,
    prompts: options.Prompts = None,
    split: Annotated[str | None, options.of_prompts(help="Only prompts of this `split`.", metavar="NAME")] = None,
    chat: options.Chat = False,
) -> list[Prompt]:
    """The group of prompts. Raises ValueError for a split or a domain that there is not."""
    found, source = choose_prompts(prompts, (), None, shipped_limit=None, chat=chat), str(prompts or "what ships")
    if split is not None:
        known = sorted({prompt.split for prompt in found} - {""})
        if split not in known:
            raise ValueError(f"{source} has no prompts of split {split!r}; its splits: {', '.join(known) or 'none'}")
        found = [prompt for prompt in found if prompt.split == split]
    if limit is None and (prompts is None or str(prompts) == INSTRUCTIONS):
        limit = DEFAULT_LIMIT
    return of_domains(found, domain or (), limit, source=source)


@options.takes(
    texts=texts,
    files=outputs.figures,
    config=options.settings(
        {name: options.MODELS[name] for name in ("target", "config")}
        | {"max_new_tokens": options.SAMPLING["max_new_tokens"]}
        | options.PRODUCTS
        | options.seed("Of the order of prompts and of intervals; by default 0.")
        | options.threads("Threads of torch for all; by default each contestant at its own best.")
    ),
)
def bench_peers(
    dflash: Annotated[str | None, _drafts(help="A DFlash drafter of the target; by default its own.")] = None,
    assistant: Annotated[
        str | None, _drafts(help="A causal language model that drafts for the target; by default its own.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        _compared(
            help="A way of another library, with options as policies have them: `transformers-lookup:4`; repeat. By "
            f"default: {', '.join(DEFAULT_PEERS)}.",
            metavar="SPEC",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        _compared(
            "--policy",
            "-p",
            help="A policy of bpkit with a drafter, `fixed:4@dflash`, `goodput@assistant` or `fixed:4@ngram`; without "
            f"a drafter, with each of them; repeat. By default: {', '.join(DEFAULT_POLICIES)}.",
            metavar="SPEC@DRAFTER",
        ),
    ] = None,
    cost: Annotated[
        list[str] | None,
        _compared(
            help="What steps cost with a drafter, for policies that weigh it: a file of `bpkit calibrate`; repeat.",
            metavar="DRAFTER=FILE",
        ),
    ] = None,
    flashspec_python: Annotated[
        Path | None,
        _compared(help="Interpreter of an environment that has flashspec, which is left out without.", metavar="FILE"),
    ] = None,
    *,
    texts: list[Prompt],
    files: Outputs,
    config: Config,
) -> None:
    """Time bpkit against other libraries on one target.

    transformers' assisted generation, prompt lookup and DFlash decoding, flashspec, and policies of bpkit: greedy, on
    the CPU, on the same prompts, in turn, each library in a process of its own, each contestant at its best number of
    threads. Over plain decoding by transformers and by bpkit's loop, and whether the text is the same. What cannot run
    is named with what it said. While it runs, what is done lies beside the figures (`FILE.partial`), and the same
    command goes on from there.

    `bpkit --plugin recipes bench-peers --flashspec-python flashspec/bin/python --json peers.json`
    """
    target = model_path(config.target or shipped("target"))
    drafts = draft_models(target, {DFLASH: dflash, ASSISTANT: assistant})
    found, left_out = line_up(
        DEFAULT_PEERS if peer is None else peer,
        DEFAULT_POLICIES if policy is None else policy,
        drafts,
        costs(cost or []),
        None if flashspec_python is None else str(flashspec_python),
        config.runtime.products,
    )
    from bpkit.cli.models import quiet_libraries

    quiet_libraries()
    from recipes.peers.measure import Saved, measure
    from recipes.peers.models import encoded, whole_drafts
    from recipes.peers.report import print_peers

    tokens, threads = config.sampling.max_new_tokens or DEFAULT_NEW_TOKENS, config.runtime.threads
    tasks, seed = encoded(target, texts), config.sampling.seed or 0
    partial_file = None if files.figures is None else files.figures.with_name(f"{files.figures.name}.partial")
    asked = [
        target,
        tokens,
        str(threads),
        config.sampling.seed,
        [[one.name, dict(one.settings)] for one in found],
        [t.ids for t in tasks],
    ]
    saved = Saved(partial_file, asked)
    with when_interrupted(saved.says), progress_bar() as bar, whole_drafts(target, found) as contestants:
        report = measure(
            target,
            contestants,
            tasks,
            max_new_tokens=tokens,
            saved=saved,
            threads=threads if isinstance(threads, int) else None,
            seed=seed,
            progress=bar,
        )
    report["left_out"] = {**left_out, **report["left_out"]}
    report["settings"] |= {"target": shown(target), "contestants": {one.name: settings_of(one) for one in found}}
    files.deliver({"command": portable(sys.argv[1:]), **report}, print_peers)
    saved.remove()


def draft_models(target: str, given: Mapping[str, str | None]) -> dict[str, str]:
    """The draft models by kind: those that are named, or else those that were trained for the target, where it has any.

    Raises:
        FileNotFoundError: one that is named as a known model is not there.
    """
    found = {}
    for kind, name in given.items():
        folder = FOLDERS[kind]
        if name is not None:
            found[kind] = drafter_path(name, target, folder)
            continue
        with suppress(FileNotFoundError):  # drafters of a known model are installed apart
            if (own := own_drafter(target, folder)) is not None:
                found[kind] = str(own)
    return found


def settings_of(contestant: Contestant) -> dict[str, object]:
    """What was set, with the names of models and files as they are passed on."""
    return {
        name: shown(value) if isinstance(value, str) else value
        for name, value in contestant.settings.items()
        if value is not None
    }


def shown(path: str) -> str:
    """Of models that bpkit knows what they are called, and of other absolute paths the name."""
    name = model_name(path)
    return Path(name).name if Path(name).is_absolute() else name


def costs(given: Sequence[str]) -> dict[str, str]:
    """Cost files by drafter. Raises ValueError (CostError) or FileNotFoundError for what is none."""
    from bpkit.trace.cost import read_cost

    pairs = [text.partition("=")[::2] for text in given]
    for (drafter, file), text in zip(pairs, given, strict=True):
        if not drafter or not file:
            raise ValueError(f"--cost {text}: write a drafter and a file, such as dflash=costs.json")
        read_cost(file)
    return dict(pairs)
