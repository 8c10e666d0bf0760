"""`bpkit evaluate-load`: judge policies on a simulated server, at each load."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from bpkit.cli import completion, options, outputs
from bpkit.cli.errors import nothing_written, require
from bpkit.cli.evaluate import DEFAULT_SPLIT, SPLIT_HELP, all_policies, parse_split, provenance
from bpkit.cli.outputs import Outputs
from bpkit.cli.terminal import progress_bar
from bpkit.config import Config
from bpkit.sizes import parse_sizes

if TYPE_CHECKING:
    from bpkit.judge.load import LoadCase
    from bpkit.registry.resolve import PolicyLike
    from bpkit.trace.cost import NamedCost

Number = TypeVar("Number", int, float)
PARTS = ("train", "validation", "test", "all")
_load = partial(typer.Option, rich_help_panel="Loads")
_how = partial(typer.Option, rich_help_panel="How to judge")


@options.takes(files=outputs.figures_plot_and_page, config=options.settings({"config": options.MODELS["config"]}))
def evaluate_load(
    trace: Annotated[Path, typer.Argument(help="Folder that `bpkit trace` made.", metavar="TRACE")],
    cost: Annotated[
        str,
        typer.Option(
            help="What steps of several rows cost: a file of `bpkit calibrate --batch-sizes`, or a preset.",
            metavar="FILE|PRESET",
            autocompletion=completion.presets,
        ),
    ],
    policy: options.PolicySpecs = None,
    *,
    concurrency: Annotated[
        str | None,
        _load(
            help="Requests that run at once, as long as any are left; by default 1, 2, 4, ... up to 128 or what COST "
            "prices, unless another load is named.",
            metavar="N,N,...",
        ),
    ] = None,
    rate: Annotated[
        str | None, _load(help="Requests that arrive by themselves, a second (Poisson).", metavar="X,X,...")
    ] = None,
    max_rows: Annotated[int | None, _load(help="Of `--rate`: requests that run at once, at most.", min=1)] = None,
    changing: Annotated[
        str | None,
        _load(help="One load that rises and falls, such as 1,4,16,64,16,4,1: rows at once, level by level."),
    ] = None,
    requests: Annotated[
        int | None, _load(help="Requests of a run; by default 64, or 4 for each row if that is more.", min=1)
    ] = None,
    max_tokens: Annotated[
        int | None, _load(help="Positions of a step at most; prompts are read in what is left of them.", min=1)
    ] = None,
    mixed_passes: Annotated[
        bool | None,
        _load(
            "--mixed-passes/--own-passes",
            help="Prompts are read in the passes of rows that run, as in vLLM, or in their own, as in bpkit; by "
            "default as the cost model's engine does.",
        ),
    ] = None,
    files: Outputs,
    block_sizes: Annotated[
        str | None,
        _how(help="Fixed sizes that policies are compared with, such as 2-8+16; size 1 is always among them."),
    ] = None,
    seeds: Annotated[
        int, _how(help="Runs of each policy and load, each with prompts and an order of its own.", min=1)
    ] = 5,
    seed: Annotated[int, _how(help="The first of them; also of the split.")] = 0,
    bound_seeds: Annotated[
        int,
        _how(help="Seeds that are also served by who knows what every draft is worth; 0: none. They take long.", min=0),
    ] = 1,
    slo_tpot_ms: Annotated[
        float | None, _how(help="Milliseconds an output token may take, for goodput.", metavar="MS", min=0.0)
    ] = None,
    decisions: Annotated[
        str, _how(help="`charged`: decision time takes time on the server; `free`: it does not.")
    ] = "charged",
    split: Annotated[str, _how(help=SPLIT_HELP, metavar="A,B,C|FILE")] = DEFAULT_SPLIT,
    part: Annotated[str, _how(help="Prompts to serve: `train`, `validation`, `test` or `all`.")] = "test",
    domain: Annotated[list[str] | None, _how(help="Only prompts of this domain; repeat for more.")] = None,
    num_workers: Annotated[int, _how(help="Processes; no more than cores that are idle.", min=1)] = 1,
    branches: Annotated[
        int | None,
        _how("--branches", help="Of a trace of drafts with branches, how many of them at most; 1: chains.", min=1),
    ] = None,
    allow_leak: Annotated[
        bool, _how("--allow-leak", help="Judge a trained policy also on prompts that it was trained or chosen on.")
    ] = False,
    config: Config,
) -> None:
    """Judge policies on a simulated server, by load.

    Tokens/s of the engine against the fixed size that is best at each load, latencies, goodput and what was drafted in
    vain. Requests are prompts of a trace, so nothing is decoded: the live loop runs over the trace, and a cost model
    says what each step takes. Policies are taken as they are given. Without `--policy`, all are judged that decide for
    all rows together.

    `bpkit evaluate-load TRACE --cost cost.json --policy goodput --concurrency 1,4,16`

    `bpkit evaluate-load TRACE --cost cost.json --changing 1,4,16,64,16,4,1 --report load.html`

    Next: `bpkit bench --batch-size 16` tries the best of them by wall clock.
    """
    require("pyarrow", extra="traces", purpose="A trace")
    rule = parse_split(split)
    if decisions not in ("charged", "free"):
        raise ValueError(f"--decisions {decisions}: say `charged` or `free`")
    if part not in PARTS:
        raise ValueError(f"--part {part}: say one of {', '.join(PARTS)}")
    named = options.named_policies(policy or [], config)
    from bpkit.cli.models import quiet_libraries
    from bpkit.judge.evaluation.splits import split_prompts
    from bpkit.judge.load import LoadRuns, LoadSetup
    from bpkit.trace.cost import read_cost
    from bpkit.trace.store.joined import open_trace

    quiet_libraries()
    opened, costs, started = open_trace(trace, branches), read_cost(cost), time.time()
    cases = _cases(costs, concurrency, rate, max_rows, changing, requests)
    places = list(range(len(opened)))
    if part != "all":
        places = list(getattr(split_prompts(opened.ids, opened.domains, seed=seed, rule=rule), part))
    prompts = [opened[place] for place in places if not domain or opened.domains[place] in domain]
    runs = LoadRuns(
        LoadSetup(
            prompts,
            opened.spec,
            costs,
            named or _for_all_rows(),
            cases,
            block_sizes=None if block_sizes is None else parse_sizes(block_sizes),
            seeds=seeds,
            seed=seed,
            max_tokens=max_tokens,
            mixes_passes=mixed_passes,
            charges_decisions=decisions == "charged",
            slo_tpot=None if slo_tpot_ms is None else slo_tpot_ms / 1e3,
            trace_seed=opened.manifest.seed,
            bound_seeds=bound_seeds,
            leave_out=not named,
            allow_leaks=allow_leak,
        )
    )
    stopped: KeyboardInterrupt | None = None
    with progress_bar() as bar:
        try:
            runs.run(bar, workers=num_workers)
        except KeyboardInterrupt as interruption:
            stopped = interruption
    result = {**runs.report(), "provenance": provenance(opened, [costs], started)}
    if stopped is not None and not result["loads"]:
        stopped.add_note(nothing_written(files.figures, files.picture, files.page)())
        raise stopped
    from bpkit.judge.load.page import load_page
    from bpkit.judge.load.plots import plot_load_report
    from bpkit.judge.load.tables import print_load_report

    files.deliver(result, print_load_report, plot_load_report, load_page)
    if stopped is not None:
        stopped.add_note("What was done until then is above.")
        raise stopped


def _cases(
    cost: NamedCost,
    concurrency: str | None,
    rate: str | None,
    max_rows: int | None,
    changing: str | None,
    requests: int | None,
) -> list[LoadCase]:
    """The loads that were named. Raises ValueError."""
    from bpkit.judge.load import LoadCase

    if (rate is None) != (max_rows is None):
        raise ValueError("--rate and --max-rows go together: how many arrive a second, and how many may run at once")
    rows = () if concurrency is None else parse_numbers(concurrency, "--concurrency", int, "1,4,16")
    if (concurrency, rate, changing) == (None, None, None):
        rows = [1 << power for power in range(8) if 1 << power <= cost.largest_rows]
    cases = [LoadCase.concurrency(number, requests) for number in rows]
    if rate is not None and max_rows is not None:
        cases += [LoadCase.arrivals(one, max_rows, requests) for one in parse_numbers(rate, "--rate", float, "2,4.5")]
    if changing is not None:
        cases.append(LoadCase.changing(parse_numbers(changing, "--changing", int, "1,4,16,4,1")))
    return cases


def parse_numbers(text: str, option: str, kind: type[Number], example: str) -> list[Number]:
    """Numbers above 0 with commas between them. Raises ValueError."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise ValueError(f"{option} {text}: write numbers above 0 with commas between them, such as {example}")
    return found


def _for_all_rows() -> dict[str, PolicyLike]:
    """Registered policies that decide for all rows together, as far as their names alone are enough."""
    from bpkit.registry.resolve import resolve_policy

    return {name: policy for name, policy in all_policies().items() if resolve_policy(policy).joint}
