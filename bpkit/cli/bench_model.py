"""`bpkit bench model`: modelled speed against wall clock, for the same policies on the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bpkit.cli import completion, options
from bpkit.cli.errors import nothing_written, require, when_interrupted
from bpkit.cli.terminal import console, progress_bar, say

DEFAULT_POLICIES = (
    "fixed:1",
    "fixed:2",
    "fixed:4",
    "fixed:6",
    "fixed:8",
    "fixed:12",
    "fixed:16",
    "threshold",
    "bandit",
)
DEFAULT_LIMIT = 10


def bench_model(
    context: typer.Context,
    trace: Annotated[Path, typer.Argument(help="Folder that `bpkit trace` made.", metavar="TRACE")],
    cost: Annotated[
        str,
        typer.Option(
            help="What `bpkit calibrate` measured on this machine.",
            metavar="FILE|PRESET",
            autocompletion=completion.presets,
        ),
    ],
    policy: options.PolicySpecs = None,
    limit: Annotated[int, typer.Option(help="Prompts of each domain, the first ones.", min=1)] = DEFAULT_LIMIT,
    json: Annotated[Path | None, typer.Option("--json", help="Write all figures here.", metavar="FILE")] = None,
    seed: Annotated[int, typer.Option(help="Of orders and intervals.")] = 0,
    # `options.settled` reads these from the context: flags win over the config file.
    target: options.Target = None,
    drafter: options.Drafter = None,
    config: options.ConfigFile = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """Compare replay's speed with the wall clock's.

    Prompts of a trace are decoded by wall clock and replayed, in turn: how far modelled speed can be trusted. Time of
    steps only, prefill left out, as in `bpkit evaluate`. Use the number of threads of the calibration.

    `bpkit bench model TRACE --cost cost.json --threads 2 --json model_bench.json`
    """
    require("pyarrow", extra="traces", purpose="A trace")
    settled = options.settled(context)
    from bpkit.cli.evaluate import first_prompts
    from bpkit.cli.models import load_decoder
    from bpkit.files import check_writable, write_json
    from bpkit.judge.evaluation.modelled import bench_model as measure
    from bpkit.trace.collect.recompute import check_models
    from bpkit.trace.cost import read_cost
    from bpkit.trace.store.storage import open_trace

    if json is not None:
        check_writable(json)
    opened, table = open_trace(trace), read_cost(cost)
    decoder = load_decoder(settled, "fixed")
    check_models(decoder, opened.manifest)
    names = policy or DEFAULT_POLICIES
    with when_interrupted(nothing_written(json)), progress_bar() as bar:
        report = measure(
            decoder,
            opened.manifest,
            first_prompts(opened, limit),
            dict(zip(names, names, strict=True)),
            table,
            seed=seed,
            progress=bar,
        )
    if json is not None:
        write_json(json, report)
        say(f"wrote {json}")
    print_model_report(report, console())


def print_model_report(report: dict[str, Any], out: Console) -> None:
    """A row for each policy."""
    from bpkit.judge.tables import Row, Table, bracketed

    prompts = len(report["settings"]["prompts"])
    rows = []
    for name, entry in report["policies"].items():
        ratio = entry["modelled_over_measured"]
        rows.append(
            Row(
                (
                    name,
                    f"{entry['measured_tokens_per_second']:.1f}",
                    f"{entry['modelled_tokens_per_second']:.1f}",
                    f"{ratio['value']:.3f} {bracketed(ratio['interval'], '.3f')}",
                    f"{entry['prompts_with_the_same_steps']}/{prompts}",
                )
            )
        )
    head = ("policy", "measured\ntokens/s", "modelled\ntokens/s", "modelled / measured", "same steps")
    out.print(Table(f"{prompts} prompts, time of steps", head, [rows]).terminal())
