"""The command that sums up what trees gain over chains."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from bpkit.cli.errors import require
from bpkit.cli.outputs import portable
from bpkit.cli.terminal import progress_bar, say
from bpkit.files import check_writable, write_json
from bpkit.progress import Progress

_OF_TRACE = "of drafts with branches; of a case, as NAME=FOLDER; repeat for more cases."
_OF_METHOD = "of which the fastest on validation prompts counts; as NAME=SPEC; repeat for more specs and methods."


def trees_summary(
    out: Annotated[Path, typer.Option("--json", help="Where all of it goes.", metavar="FILE")],
    validation: Annotated[
        list[str], typer.Option(help=f"Trace of validation prompts, {_OF_TRACE}", metavar="NAME=FOLDER")
    ],
    test: Annotated[list[str], typer.Option(help=f"Trace of test prompts, {_OF_TRACE}", metavar="NAME=FOLDER")],
    cost: Annotated[
        list[str] | None,
        typer.Option(help="What steps cost, under a name; repeat.", metavar="NAME=FILE|PRESET"),
    ] = None,
    chain: Annotated[
        list[str] | None, typer.Option(help=f"A policy on chains, {_OF_METHOD}", metavar="NAME=SPEC")
    ] = None,
    tree: Annotated[
        list[str] | None, typer.Option(help=f"A policy on trees, {_OF_METHOD}", metavar="NAME=SPEC")
    ] = None,
    live: Annotated[
        list[str] | None,
        typer.Option(
            help="`bpkit bench` on trees, with chains such as fixed:6@block-diffusion; of a case, repeat for more.",
            metavar="NAME=FILE",
        ),
    ] = None,
    live_policy: Annotated[str, typer.Option(help="The policy on trees that is judged, as in the bench.")] = "tree",
    branches: Annotated[
        int | None, typer.Option(help="Of trees at most; by default those that were traced.", min=2)
    ] = None,
    orders: Annotated[int, typer.Option(help="Of test prompts, for policies with a memory.", min=1)] = 4,
    limit: Annotated[int | None, typer.Option(help="Prompts of each domain, the first ones.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of orders and intervals.", min=0)] = 0,
) -> None:
    """Sum up what trees gain over chains.

    Acceptance length at equal numbers of verified nodes, tokens/s that cost models say, and if there are benches, by
    the clock. Whatever is chosen (block sizes, rules, options) is chosen on validation prompts, and judged on test
    prompts.

    `bpkit --plugin recipes trees-summary --validation a=VALIDATION --test a=TEST --cost h200=h200-4b --json trees.json`
    """
    require("pyarrow", extra="traces", purpose="A trace")
    from bpkit.trace.cost import read_cost
    from recipes.trees.summary import summarise

    check_writable(out, suffixes=(".json",))
    tests, costs = (
        _pairs(test),
        [read_cost(file).model_copy(update={"name": name}) for name, file in _pairs(cost or []).items()],
    )
    folders = _pairs(validation)
    if folders.keys() != tests.keys():
        raise ValueError("--validation and --test name different cases: give each a trace of both")
    methods = _methods(chain or []), _methods(tree or [])
    options: dict[str, Any] = {"costs": costs, "branches": branches, "orders": orders, "limit": limit, "seed": seed}
    with progress_bar() as bar:
        cases = {name: _case(folders[name], tests[name], *methods, progress=bar, **options) for name in folders}
    report = summarise(cases, _live(live or [], live_policy))
    write_json(out, {"command": portable(sys.argv[1:]), **report})
    say(f"wrote {out}")
    say(json.dumps(report["headline"], indent=2))


def _case(
    validation: str,
    test: str,
    chains: Any,
    trees: Any,
    *,
    costs: list[Any],
    branches: int | None,
    orders: int,
    limit: int | None,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Figures of one pair of traces."""
    from bpkit.learn.training.prompts import Part
    from bpkit.trace.store.joined import open_trace
    from recipes.trees.drafts import kept
    from recipes.trees.nodes import NODES, at_most, on_average
    from recipes.trees.replays import replays_of
    from recipes.trees.speed import SpeedCase, speeds

    opened = [open_trace(folder, branches) for folder in (validation, test)]
    tuned_on, judged_on = (Part(trace, range(len(trace)), limit=limit) for trace in opened)
    spec, manifest = opened[1].spec, opened[1].manifest
    progress.start("counting nodes", len(tuned_on) + len(judged_on))
    before, after = ([*_ticked(kept(part, spec.branches), progress)] for part in (tuned_on, judged_on))
    replays = replays_of(tuned_on, judged_on, spec, manifest.seed, NODES, progress)
    case = SpeedCase(tuned_on, judged_on, spec, manifest.seed, costs, orders, seed, progress)
    return {
        "settings": {
            "target": spec.target,
            "drafter": spec.drafter,
            "branches": spec.branches,
            "sampling": manifest.sampling,
            "prompts": {"validation": len(before), "test": len(after)},
            "costs": {cost.name: cost.description for cost in costs},
            "seed": seed,
        },
        "nodes": {
            "at_most": at_most(before, after, spec.branches, nodes=NODES, seed=seed, replays=replays),
            "on_average": on_average(before, after, nodes=NODES, seed=seed),
        },
        "speed": speeds(case, chains, trees) if costs else {},
    }


def _ticked(items: Iterable[Any], progress: Progress) -> Iterable[Any]:
    for item in items:
        progress.tick()
        yield item


def _live(given: list[str], policy: str) -> dict[str, Any]:
    """Of the cases that have benches; chains are the fixed sizes that have a drafter of their own, without branches."""
    from recipes.trees.summary import Live

    found = {}
    for name, file in _pairs(given).items():
        report = json.loads(Path(file).read_bytes())
        parts = {one: one.partition("@") for one in report["overall"]["policies"]}
        chains = [
            one
            for one, (size, at, drafter) in parts.items()
            if size.startswith("fixed:") and at and "branches=" not in drafter
        ]
        found[name] = Live(report, policy, chains)
    return found


def _methods(given: list[str]) -> dict[str, list[str]]:
    """Specs by method."""
    found: dict[str, list[str]] = {}
    for text in given:
        name, spec = _pair(text)
        found.setdefault(name, []).append(spec)
    return found


def _pairs(given: list[str]) -> dict[str, str]:
    """By what stands before `=`. Raises ValueError."""
    return dict(map(_pair, given))


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise ValueError(f"{text}: write a name and what it is of, such as greedy=TRACE")
    return name, value
